"""Samplers under test, by backend, closed at the end of each test; and what it means to get the same again."""

from __future__ import annotations

import asyncio
import copy
import platform
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from agentrl.sampler.hf import HFSampler
from agentrl.types import Completion


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


@pytest.fixture(scope="session")
def processor():
    """Its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


@pytest.fixture(scope="session")
def processor_keeps_bits():
    """Whether plain products and attention give a row the same bits among few and many; asks nothing of the engine."""
    torch.manual_seed(0)
    rows, weight, keys = torch.randn(64, 64), torch.randn(96, 64), torch.randn(2, 2, 96, 16)
    queries = torch.randn(2, 2, 64, 16)

    def attend(count):
        return F.scaled_dot_product_attention(queries[:, :, :count], keys, keys)[:, :, :4]

    return torch.equal(F.linear(rows[:16], weight), F.linear(rows, weight)[:16]) and torch.equal(attend(4), attend(64))


@pytest.fixture(scope="session")
def exact(random_model, processor_keeps_bits):
    """Whether equal means equal bits here: the sampler proves it, or the processor gives it no excuse not to."""
    sampler = make_hf(copy.deepcopy(random_model))
    asyncio.run(sampler.close())
    return sampler.deterministic or processor_keeps_bits


@pytest.fixture(scope="session")
def same(exact):
    """``same(found, expected)`` asserts that completions, or lists of them, are equal, floats too where ``exact``."""

    def compare(found, expected):
        if exact:
            assert found == expected
        elif isinstance(expected, Completion):
            parts = ("token_ids", "stop_reason", "policy_version", "temperature", "top_p", "logprobs", "entropies")
            for part in parts:
                compare(getattr(found, part), getattr(expected, part))
        elif isinstance(expected, list | tuple):
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                compare(one, other)
        else:
            assert found == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected)

    return compare
