"""vLLM on this machine: tokens per second of our samplers beside vLLM called directly, updates, shared prefixes.

The model is a Qwen3 of 128 x 2 layers with random weights; every request has its own prompt of 32 tokens and gets 128
new ones. ``hf`` is the embedded sampler, ``vllm`` the engine in-process, ``server`` the same behind HTTP, started by
``agentrl serve``, and ``LLM.generate`` vLLM called as its documentation does: no log-probs, no entropies, no seeds,
which ours all deliver. ``AsyncLLM.generate`` is the engine of ``vllm`` asked without us, also with none of them: what
lies between the two is what vLLM's own asyncio front costs. The contestants take turns; new prompts in every round, so
that no prefix cache helps anybody.

``x LLM.generate`` is its time over ours, by the wall: the work is spread over processes.

    make test-vllm                                       # once: builds the environment
    PYTHONPATH=. $(tests/vllm/environment.sh) benchmarks/engines.py [--rounds 5] [--json FILE] [--check]
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _bench import Row, parser, report

from agentrl.sampler.hf import HFSampler
from agentrl.sampler.vllm import VLLMSampler
from agentrl.sampler.vllm_server import VLLMServerSampler
from agentrl.serve import ServeOptions, serving
from agentrl.tiny import build_model, build_tokenizer, save_policy
from agentrl.types import SamplingParams

CONCURRENCY, PROMPT, NEW = (1, 16, 64), 32, 128
PREFIX, BRANCHES, BLOCK = 1000, 8, 32
NUMBERS = count()


def prompts(number: int, length: int = PROMPT) -> list[list[int]]:
    """``number`` prompts that nobody has seen before."""
    generator = torch.Generator().manual_seed(next(NUMBERS))
    ids: list[list[int]] = torch.randint(10, 300, (number, length), generator=generator).tolist()
    return ids


async def sample(sampler: Any, number: int) -> None:
    params = [SamplingParams(NEW, seed=seed) for seed in range(number)]
    jobs = [sampler.sample(ids, each) for ids, each in zip(prompts(number), params, strict=True)]
    for done in await asyncio.gather(*jobs):
        expect(len(done.token_ids))


async def generate(llm: Any, number: int) -> None:
    from vllm import SamplingParams as Params
    from vllm import TokensPrompt

    params = Params(temperature=1.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    wanted = [TokensPrompt(prompt_token_ids=ids) for ids in prompts(number)]
    for output in llm.generate(wanted, params, use_tqdm=False):
        expect(len(output.outputs[0].token_ids))


async def generate_async(engine: Any, number: int) -> None:
    from vllm import SamplingParams as Params
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    final = RequestOutputKind.FINAL_ONLY
    params = Params(temperature=1.0, max_tokens=NEW, ignore_eos=True, detokenize=False, output_kind=final)

    async def one(ids: list[int]) -> None:
        async for output in engine.generate(tokens_input(ids), params, f"direct-{next(NUMBERS)}"):
            expect(len(output.outputs[0].token_ids))

    await asyncio.gather(*(one(ids) for ids in prompts(number)))


def expect(tokens: int) -> None:
    if tokens != NEW:
        sys.exit(f"expected {NEW} new tokens, got {tokens}: the contestants do not do the same work")


async def speeds(contestants: dict[str, Callable[[int], Awaitable[None]]], rounds: int) -> list[Row]:
    """Tokens per second of each at every concurrency, and ratios to ``LLM.generate``."""
    rows = []
    for number in CONCURRENCY:
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(rounds + 1):
            for name, contestant in contestants.items():
                began = time.perf_counter()
                await contestant(number)
                if turn:  # the first one warms up
                    taken[name].append(time.perf_counter() - began)
        for name, seconds in taken.items():
            rows.append(Row(f"{number} at once: {name}", number * NEW / median(seconds), "tok/s"))
        for name in ("vllm", "server"):
            for direct in ("LLM.generate", "AsyncLLM.generate"):
                share = median(theirs / ours for theirs, ours in zip(taken[direct], taken[name], strict=True))
                target = 0.9 if number == 64 and direct == "LLM.generate" else None
                rows.append(Row(f"{number} at once: {name}", share, f"x {direct}", target, "higher"))
    return rows


async def updates(samplers: dict[str, Any], model: Any, rounds: int) -> list[Row]:
    """Seconds of an update, from the call to its return."""
    rows = []
    weights = dict(model.named_parameters())
    size = sum(value.numel() * value.element_size() for value in weights.values()) / 2**20
    for name, sampler in samplers.items():
        taken = []
        for _ in range(rounds):
            began = time.perf_counter()
            await sampler.update_weights(weights, sampler.version + 1)
            taken.append(time.perf_counter() - began)
        rows.append(Row(f"update of {size:.1f} MiB: {name}", 1000 * median(taken), "ms"))
    return rows


async def shared_prefix(samplers: dict[str, Any]) -> list[Row]:
    """What eight branches off one prefix take from the cache, of the full blocks that there are."""
    rows = []
    for name, sampler in samplers.items():
        (prefix,) = prompts(1, PREFIX)
        await sampler.sample(prefix, SamplingParams(1))
        before = await reused(sampler)
        branches = [[*prefix, 10 + branch] for branch in range(BRANCHES)]
        await asyncio.gather(*(sampler.sample(ids, SamplingParams(8, seed=i)) for i, ids in enumerate(branches)))
        share = (await reused(sampler) - before) / (BRANCHES * (PREFIX // BLOCK) * BLOCK)
        label = f"{BRANCHES} branches off {PREFIX:,} tokens: {name}"
        rows.append(Row(label, 100 * share, "% of full blocks", 95, "higher"))
    return rows


async def reused(sampler: Any) -> int:
    """Prompt tokens that the engine took from its prefix cache so far."""
    if isinstance(sampler, VLLMServerSampler):
        await sampler.count()
    return int(sampler.reused_tokens)


async def run(folder: Path, rounds: int) -> list[Row]:
    from vllm import LLM

    tokenizer = build_tokenizer(["some words to make a tokenizer of"], vocab=300)
    model = build_model(tokenizer, layers=2, context=2048)
    model.resize_token_embeddings(448)
    save_policy(model, tokenizer, folder)
    limits = {"max_slots": 64, "max_length": 1280}
    hf = HFSampler(copy.deepcopy(model), tokenizer, **limits)
    vllm = await VLLMSampler.start(folder, tokenizer, **limits)
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK,
        max_model_len=1280,
        max_num_seqs=64,
        kv_cache_memory_bytes=256 << 20,
    )
    token = secrets.token_urlsafe(24)
    async with serving(ServeOptions(str(folder), port=0, **limits), token, lambda _: None) as served:
        server = await VLLMServerSampler.start(
            [served.url],
            shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
            tokenizer=tokenizer,
            vocabulary=len(model.get_input_embeddings().weight),
            max_length=limits["max_length"],
            token=token,
        )
        samplers = {"vllm": vllm, "server": server}
        rows = await speeds(
            {
                "hf": lambda number: sample(hf, number),
                "vllm": lambda number: sample(vllm, number),
                "server": lambda number: sample(server, number),
                "LLM.generate": lambda number: generate(llm, number),
                "AsyncLLM.generate": lambda number: generate_async(vllm.engine, number),
            },
            rounds,
        )
        rows += await updates(samplers, model, rounds)
        rows += await shared_prefix(samplers)
        await server.close()
    await vllm.close()
    await hf.close()
    return rows


def main() -> int:
    options = parser(__doc__, rounds=5).parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("benchmarks/engines.py needs vLLM, which is not here: its docstring says how to run it.")
        return 0
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(run(Path(folder), options.rounds))
    return report(f"vLLM, {NEW} new tokens a request, Qwen3 128 x 2, fp32", rows, options)


if __name__ == "__main__":
    sys.exit(main())
