"""Samplers under test, by backend, closed at the end of each test; and what it means to get the same again."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import importlib.util
import platform
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
import torch
import torch.nn.functional as F

from agentrl.sampler.hf import HFSampler
from agentrl.sampler.vllm import VLLMSampler
from agentrl.sampler.vllm_server import VLLMServerSampler
from agentrl.serve import ServeOptions, serving
from agentrl.tiny import build_model, save_policy
from agentrl.types import Completion

SIZES = {"max_slots": 48, "max_length": 160}
TOKEN = "a-token-of-the-tests"


def shapes_of(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


class HF:
    """The embedded engine: every sampler has one of its own."""

    @staticmethod
    @asynccontextmanager
    async def running(_):
        async def start(model, tokenizer, **options):
            return HFSampler(model, tokenizer, **options)

        yield start


class VLLM:
    """Samplers around one engine, whose weights become those of the model."""

    @staticmethod
    @asynccontextmanager
    async def running(folder):
        first = await VLLMSampler.start(folder, max_slots=64, max_length=512)

        async def start(model, tokenizer, **options):
            shapes = shapes_of(model)
            sampler = VLLMSampler(first.engine, first._board, shapes, model.config.vocab_size, tokenizer, **options)
            await sampler.update_weights(dict(model.named_parameters()), options.get("version", 0))
            return sampler

        yield start
        await first.close()


class VLLMServer:
    """Clients of one server, which the command's own functions start."""

    @staticmethod
    @asynccontextmanager
    async def running(folder):
        options = ServeOptions(str(folder), port=0, max_slots=64, max_length=512)
        holds = None  # a client that finds other weights than it gave is right to complain: so give them only where due
        async with serving(options, TOKEN) as served:

            async def start(model, tokenizer, **options):
                nonlocal holds
                sampler = await VLLMServerSampler.start(
                    [served.url],
                    shapes=shapes_of(model),
                    tokenizer=tokenizer,
                    vocabulary=model.config.vocab_size,
                    token=TOKEN,
                    patience=10.0,
                    **options,
                )
                (server,) = sampler.servers
                wanted = digest(model), options.get("version", 0)
                if holds != (wanted, server.revisions):
                    await sampler.update_weights(dict(model.named_parameters()), wanted[1])
                    holds = wanted, server.revisions
                return sampler

            yield start


def digest(model):
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


HAS_VLLM = importlib.util.find_spec("vllm") is not None
BACKENDS = {"vllm": VLLM, "vllm_server": VLLMServer} if HAS_VLLM else {"hf": HF}
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


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=BACKENDS)
async def start_sampler(request, random_folder):
    """``await start_sampler(model, tokenizer, **options)``; what all samplers of a backend share is started here."""
    async with BACKENDS[request.param].running(random_folder) as start:
        yield start


@pytest.fixture
async def make_sampler(make_model, start_sampler):
    """``await make_sampler(model=None, tokenizer=None, **options)`` for every backend."""
    made = []

    async def make(model=None, tokenizer=None, **options):
        model = make_model() if model is None else model
        made.append(await start_sampler(model, tokenizer, **SIZES | options))
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
