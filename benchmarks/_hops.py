"""A policy for the benchmarks of rollouts: an environment whose tool takes time, and a model that knows its way in it.

A Qwen3 of width 64 with two layers, warm-started in seconds on ``Hops``: every turn is a thought of 4 to 16 random
digits and one tool call, and after ``CALLS`` results comes the answer. So turns differ in length, branches differ from
their parents, and most trajectories make ``CALLS`` calls. Only the tool's time is made up: it sleeps.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from agentrl.config import SFTConfig
from agentrl.demonstrations import encode, record
from agentrl.env import ToolEnv
from agentrl.renderer import Renderer
from agentrl.sandbox.shared import close_shared_sandboxes
from agentrl.tiny import build_model, build_tokenizer, render_texts
from agentrl.tool import Tool
from agentrl.types import Episode, Message, Task, ToolCall
from agentrl.warmstart import sft

CALLS = 4
Latency = Callable[[random.Random], float]
SLOW_SHARE, SLOW_SECONDS, MEDIAN_SECONDS, SPREAD = 0.05, 2.0, 0.05, 0.5


def long_tailed(rng: random.Random) -> float:
    """Seconds: log-normal around 50 ms, and now and then 2 s."""
    return SLOW_SECONDS if rng.random() < SLOW_SHARE else MEDIAN_SECONDS * rng.lognormvariate(0, SPREAD)


LATENCIES: dict[str, Latency] = {
    "0 ms": lambda _: 0.0,
    "50 ms": lambda _: 0.05,
    "500 ms": lambda _: 0.5,
    "long tail": long_tailed,
}


class Hop(Tool):
    """Hops, and counts; its state is the number of hops that are left.

    Args:
        latency: seconds of a call, drawn from ``rng``.
        rng: shared by all episodes.
    """

    name = "hop"
    timeout = 60.0

    def __init__(self, latency: Latency, rng: random.Random) -> None:
        self._latency, self._rng, self._left = latency, rng, CALLS

    async def run(self, x: int) -> str:
        """Hop once.

        Args:
            x: where from.
        """
        self._left -= 1
        await asyncio.sleep(self._latency(self._rng))
        return f"{_next(x)} left {max(self._left, 0)}"

    async def fork(self) -> Hop:
        """One that has hopped as often."""
        return copy.copy(self)


class Hops(ToolEnv):
    """Follow a rule for ``CALLS`` hops, then say where one is; the tool says how many hops are left.

    Args:
        latency: see ``Hop``.
        rng: see ``Hop``.
    """

    max_turns = CALLS + 4

    def __init__(self, latency: Latency = lambda _: 0.0, rng: random.Random | None = None) -> None:
        self._latency, self._rng = latency, rng or random.Random(0)

    def make_tools(self) -> Sequence[Tool]:
        """A counter of its own for each episode."""
        return [Hop(self._latency, self._rng)]

    def tasks(self, split: str) -> Iterable[Task]:
        """All starts, in a fixed random order."""
        starts = random.Random(split).sample(range(100, 1000), 900)
        return [Task(f"hop {CALLS} times from {x}", str(_end(x)), id=str(x)) for x in starts]

    async def reward(self, task: Task, episode: Episode) -> float:
        """1 for the right place."""
        return float(episode.answer == task.answer)

    def expert(self, task: Task, rng: random.Random) -> list[Message]:
        """Think of some digits, hop, and so on."""
        x, said = int(task.id), []
        for turn in range(CALLS):
            thought = "".join(rng.choices("0123456789", k=rng.randint(4, 16)))
            said.append(Message("assistant", thought, (ToolCall(f"call_{turn}_0", "hop", {"x": x}),)))
            x = _next(x)
        return [*said, Message("assistant", str(x))]


def _next(x: int) -> int:
    return 100 + (37 * x + 11) % 900  # three digits: 068 is no JSON


def _end(x: int) -> int:
    for _ in range(CALLS):
        x = _next(x)
    return x


def warm_start(env: Callable[[], ToolEnv], *, demonstrations: int, steps: int) -> tuple[Any, Any]:
    """A tiny model that does about what ``env``'s expert does, and its tokenizer."""

    async def recorded() -> Any:
        try:
            return await record(env, list(env().tasks("train"))[:demonstrations], seed=0)
        finally:
            await close_shared_sandboxes()

    shown = asyncio.run(recorded())
    tokenizer = build_tokenizer(render_texts((each.messages, each.tools) for each in shown), vocab=448)
    model = build_model(tokenizer, hidden=64, layers=2, context=512)
    renderer = Renderer(tokenizer)
    config = SFTConfig(steps=steps, batch=32, lr=3e-3, optimizer="muon", warmup=5)
    sft(model, [encode(renderer, each) for each in shown], [], config, seed=0)
    return model.eval(), tokenizer
