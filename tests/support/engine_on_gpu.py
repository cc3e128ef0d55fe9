"""What the tests in ``tests/gpu`` share: when they run, models made from nothing, an engine and its hand-over."""

from __future__ import annotations

import asyncio
import importlib.util
from contextlib import asynccontextmanager

import pytest
import torch

from agentrl.config import load_config
from agentrl.handover import Handover
from agentrl.learner.leader import Leader
from agentrl.learner.step import Learner
from agentrl.sampler.vllm import VLLMSampler
from agentrl.types import SamplingParams

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="needs a GPU: torch.cuda.is_available() is False here"),
    pytest.mark.timeout(600),  # kernels are compiled, engines start
    pytest.mark.filterwarnings("default"),  # the compiler's and vLLM's own
]
NEEDS_VLLM = [
    *NEEDS_GPU,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason='needs vLLM: pip install "agentrl[vllm]"'),
]
VOCABULARY, SIZES = 97, {"max_slots": 32, "max_length": 768}
PROMPT = tuple(range(1, 90))
SHARE = 0.3
"""Of the GPU, for the engine; beside it is a learner of at most 10 GB."""
EAGER = {"gpu_memory_utilization": SHARE, "enforce_eager": True}
"""Options of engines that are not timed: CUDA graphs take most of the start."""


def random_qwen3(*, layers=2, hidden=256, heads=4, size=64, vocabulary=VOCABULARY, scale=3.0, device="cuda"):
    """A Qwen3 in bf16 from nothing; logits as large as a trained policy's where ``scale`` is 3 and layers are few."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    made = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=size,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.mul_(1.0 if "norm" in name else scale)
    return made.to(device, torch.bfloat16)


def half_a_billion(device="cuda"):
    """0.41 B parameters in the proportions of Qwen3-0.6B, with fewer tokens."""
    return random_qwen3(layers=24, hidden=1024, heads=16, size=128, vocabulary=32_000, scale=1.0, device=device)


def handing_over(sampler, model, **changes):
    fixed = {"train.lr": 3e-2, "train.warmup": 0, "train.max_gap": 1e9, "policy.lora_alpha": 64.0}
    fixed |= {"train.max_grad_norm": 1e9, "sampler.backend": "vllm"}
    config = load_config(None, fixed | {key.replace("__", "."): value for key, value in changes.items()})
    return Handover(sampler, Leader(Learner(model, config)), config)


@asynccontextmanager
async def running(model, folder, *, options=EAGER, **settings):
    """An engine with the weights of ``model``, saved in ``folder``; closed at the end."""
    await asyncio.to_thread(model.save_pretrained, folder)
    sampler = await VLLMSampler.start(folder, **SIZES | settings, options=dict(options))
    try:
        yield sampler
    finally:
        await sampler.close()


async def scores(sampler, seed=0, tokens=16):
    return await sampler.sample(PROMPT, SamplingParams(tokens, seed=seed))
