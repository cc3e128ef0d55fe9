"""Tokens per second of the embedded sampler against transformers' ``model.generate``, on the same 64 sequences.

The model is the TRL peer's (vocabulary 1000, hidden 128, 4 layers), with random weights; 8 prompts, 8 answers each, 64
new tokens an answer, temperature 1, no top-k and no end token, so that everybody writes exactly 64 x 64 tokens. Both
get the same prompts, new ones in every round, since ours keeps what it has computed. ``generate`` takes all 64 at once,
as trainers call it; ours takes 64 separate requests, as coroutines send them, computes the prompt of a group once, and
delivers log-probs and entropies besides, which ``generate`` is not asked for.

``x generate`` is generate's time over ours, above 1 where ours is faster. CPU time is that of the whole process and is
meant for 1 thread: with 2 it counts a thread that spins while it waits, so there look at the wall.

    python benchmarks/sampler.py [--threads 1 2] [--prompts 448 64] [--rounds 5] [--json FILE] [--check]
"""

from __future__ import annotations

import asyncio
import copy
import sys
from functools import partial
from itertools import count
from typing import Any

import torch
from _bench import Row, Seconds, interleave, measure, parser, ratio, report, tiny_qwen3, typical

from agentrl.sampler.hf import HFSampler
from agentrl.types import SamplingParams

SEQUENCES, GROUP, NEW = 64, 8, 64
TARGETS = {448: 1.5, 64: 1.1}


def draw_prompts(length: int, number: int) -> torch.Tensor:
    """[SEQUENCES, length] random prompts, each ``GROUP`` times; the same for the same number."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(1, 1000, (SEQUENCES // GROUP, length), generator=generator).repeat_interleave(GROUP, 0)


def generate(model: Any, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=NEW)
    expect(out.shape[1] - ids.shape[1])


def sample(sampler: HFSampler, ids: torch.Tensor) -> None:
    async def everyone() -> list[Any]:
        rows = enumerate(ids.tolist())
        return await asyncio.gather(*(sampler.sample(row, SamplingParams(NEW, seed=i)) for i, row in rows))

    for completion in asyncio.run(everyone()):
        expect(len(completion.token_ids))


def expect(tokens: int) -> None:
    if tokens != NEW:
        sys.exit(f"expected {NEW} new tokens, got {tokens}: the contestants do not do the same work")


def compare(length: int, threads: int, rounds: int) -> list[Row]:
    """The rows of one prompt length and one number of threads."""
    torch.set_num_threads(threads)
    model = tiny_qwen3()
    sampler = HFSampler(copy.deepcopy(model))
    numbers = {"generate": count(), "ours": count()}

    def turn(name: str) -> Seconds:
        ids = draw_prompts(length, next(numbers[name]))
        return measure(lambda: generate(model, ids) if name == "generate" else sample(sampler, ids))

    contestants = {name: partial(turn, name) for name in numbers}
    for warm_up in contestants.values():
        warm_up()
    taken = interleave(rounds, contestants)
    asyncio.run(sampler.close())
    label = f"prompt {length}, {threads} thread{'s' * (threads > 1)}"
    faster = ratio(taken["generate"], taken["ours"])
    kind, gain = ("CPU", faster.cpu) if threads == 1 else ("wall", faster.wall)
    rows = [Row(f"{label}: {kind}", gain, "x generate", TARGETS.get(length), "higher")]
    if threads == 1:
        rows.append(Row(f"{label}: wall", faster.wall, "x generate"))
    for name, seconds in taken.items():
        rows.append(
            Row(f"{label}: {name}, {kind} time", SEQUENCES * NEW / getattr(typical(seconds), kind.lower()), "tok/s")
        )
    return rows


def main() -> int:
    words = parser(__doc__, rounds=5)
    words.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of torch (1 2)")
    words.add_argument("--prompts", type=int, nargs="+", default=[448, 64], help="prompt lengths, in tokens (448 64)")
    options = words.parse_args()
    rows = [
        row
        for threads in options.threads
        for length in options.prompts
        for row in compare(length, threads, options.rounds)
    ]
    return report(f"sampler, {SEQUENCES} sequences in groups of {GROUP}, {NEW} new tokens each", rows, options)


if __name__ == "__main__":
    sys.exit(main())
