"""These tests need vLLM: `make test-vllm` runs them, in an environment of their own."""

from __future__ import annotations

import importlib.util

import pytest

from agentrl.tiny import build_model

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def random_model(tokenizer):
    """As in the other tests, and with it what is made of it; wider, since vLLM's attention here wants heads of 32."""
    return build_model(tokenizer, hidden=128, layers=2, context=512, seed=1)
