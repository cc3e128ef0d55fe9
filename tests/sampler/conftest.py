"""Samplers under test, by backend, closed at the end of each test; and what it means to get the same again."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import platform
from pathlib import Path

import pytest
import pytest_asyncio
import torch
import torch.nn.functional as F

from agentrl.sampler.hf import HFSampler
from agentrl.sampler.vllm import VLLMSampler
from agentrl.tiny import build_model, save_policy
from agentrl.types import Completion

SIZES = {"max_slots": 48, "max_length": 160}


async def start_hf(_, model, tokenizer, **options):
    return HFSampler(model, tokenizer, **SIZES | options)


async def start_vllm(engine, model, tokenizer, **options):
    """Another sampler around the session's engine, whose weights become those of ``model``."""
    options = SIZES | options
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    sampler = VLLMSampler(engine.engine, engine._board, shapes, model.config.vocab_size, tokenizer, **options)
    await sampler.update_weights(dict(model.named_parameters()), options.get("version", 0))
    return sampler


HAS_VLLM = importlib.util.find_spec("vllm") is not None
BACKENDS = {"vllm": start_vllm} if HAS_VLLM else {"hf": start_hf}
"""vLLM has an environment of its own (`make test-vllm`); what is about ``hf`` alone runs in the other one."""


@pytest.fixture(scope="session")
def random_model(tokenizer):
    """As in the other tests; wider for vLLM, whose attention on the CPU wants heads of 32."""
    return build_model(tokenizer, hidden=128 if HAS_VLLM else 64, layers=2, context=512, seed=1)


@pytest.fixture(scope="session")
def random_folder(random_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    save_policy(random_model, tokenizer, folder)
    return folder


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(random_folder):
    """What all samplers of a backend share: vLLM's engine takes 20 seconds to start."""
    if not HAS_VLLM:
        yield None
        return
    sampler = await VLLMSampler.start(random_folder, max_slots=64, max_length=512)
    yield sampler
    await sampler.close()


@pytest.fixture(params=BACKENDS)
async def make_sampler(request, make_model, engine):
    """``await make_sampler(model=None, tokenizer=None, **options)`` for every backend."""
    made = []

    async def make(model=None, tokenizer=None, **options):
        model = make_model() if model is None else model
        made.append(await BACKENDS[request.param](engine, model, tokenizer, **options))
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
    if HAS_VLLM:
        return False
    sampler = HFSampler(copy.deepcopy(random_model), **SIZES)
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
