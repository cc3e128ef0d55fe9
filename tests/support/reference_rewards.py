"""Adapters of the rewards' and the branching signal's reference cases: one function per ``fn`` of a case."""

from __future__ import annotations

from reference_harness import Adapter

DELIBERATE: dict[str, str] = {}
ADAPTERS: dict[str, Adapter] = {}
