"""These tests need vLLM: `make test-vllm` runs them, in an environment of their own."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
