"""Samplers under test, by backend, closed at the end of each test."""

from __future__ import annotations

import pytest

from agentrl.sampler.hf import HFSampler


def make_hf(model, tokenizer=None, **options):
    return HFSampler(model, tokenizer, **{"max_slots": 48, "max_length": 160} | options)


BACKENDS = {"hf": make_hf}


@pytest.fixture(params=BACKENDS)
async def make_sampler(request, make_model):
    """``make_sampler(model=None, tokenizer=None, **options)`` for every backend."""
    made = []

    def make(model=None, tokenizer=None, **options):
        made.append(BACKENDS[request.param](make_model() if model is None else model, tokenizer, **options))
        return made[-1]

    yield make
    for sampler in made:
        await sampler.close()
