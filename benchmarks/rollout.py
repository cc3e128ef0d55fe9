"""Rollouts without a model: does anything wait that need not, and what does the machinery itself cost?

The writer is scripted and answers at once, so all that is left is agentrl: ``Scheduler``, ``play``, ``ToolEnv`` and
``dispatch`` with the scheduler's semaphore, the episode's deadline, the tool's timeout and the turn and call limits on.

1. ``64 rollouts, one 50 ms tool each``: wall time of all of them over the 50 ms of one, median of the rounds. 1.0 is
   perfect concurrency; one after another would be 64. Making and resetting the environments, schemas, rewards and the
   making of the tree are in it.
2. ``env loop, per step``: CPU microseconds of one turn of 64 concurrent episodes of 200 turns, best of the rounds. In
   it: the loop of ``play``, the environment's step, checking the call's arguments, starting and cancelling the tool's
   timeout, the result and its message; and one trip through asyncio's event loop, because the tool suspends once, as
   any tool worth awaiting does. Not in it: sampling and rendering. The episode's deadline and the semaphore act once an
   episode; their cost is spread over its steps. The garbage collector is on, without what the imports left behind.
3. ``asyncio alone, per step``: as many bare ``sleep(0)`` under ``asyncio.timeout`` in 64 tasks, the part of 2 that
   cannot be saved where a call has a deadline. It tells how fast and how busy the machine is; 2 grows with it.

    python benchmarks/rollout.py [--rounds 15] [--json FILE] [--check]
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from _bench import Row, Seconds, best, interleave, measure, parser, report, typical

from agentrl.config import RolloutConfig
from agentrl.env import ToolEnv
from agentrl.rollout.scheduler import Scheduler
from agentrl.tool import tool
from agentrl.types import Episode, Message, Node, Outcome, SamplingParams, StepResult, StopReason, Task, ToolCall

ROLLOUTS = 64
TOOL_SECONDS = 0.05
TURNS = 200


@tool(timeout=10)
async def wait(key: str) -> str:
    """Wait, then give the key back.

    Args:
        key: anything.
    """
    await asyncio.sleep(TOOL_SECONDS)
    return key


@tool(timeout=10)
async def look_up(key: str) -> str:
    """Give the key back after one trip through the event loop.

    Args:
        key: anything.
    """
    await asyncio.sleep(0)
    return key


class Waiting(ToolEnv):
    """One slow call, then the answer."""

    tools = (wait, look_up)
    max_turns = TURNS + 1
    max_tool_calls = TURNS

    def tasks(self, split: str) -> Iterable[Task]:
        """One task."""
        return [Task("go", "done")]

    async def reward(self, task: Task, episode: Episode) -> float:
        """1 for the answer."""
        return float(episode.answer == task.answer)


class Scripted:
    """Writes the same call ``calls`` times and then the answer, at once."""

    def __init__(self, name: str, calls: int) -> None:
        self.nodes: list[Node] = []
        self._call = Message("assistant", "", (ToolCall("call", name, {"key": "a"}),))
        self._left = calls

    def begin(self, opening: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
        """One prompt node."""
        self.nodes.append(Node(-1, "prompt", (0,)))

    async def write(self) -> tuple[Message, StopReason]:
        """The call or the answer."""
        self._left -= 1
        return (self._call if self._left >= 0 else Message("assistant", "done")), StopReason.STOP

    def read(self, step: StepResult) -> None:
        """Nothing to render."""


def play(name: str, calls: int) -> None:
    """Play ``ROLLOUTS`` episodes of ``calls`` calls of one tool, and make sure that they did what they should."""
    limits = RolloutConfig(max_live=ROLLOUTS, deadline=120.0)
    scheduler = Scheduler(Waiting, lambda _: Scripted(name, calls), limits, SamplingParams(1))
    (tree,) = asyncio.run(scheduler.play([Task("go", "done")], group=ROLLOUTS, seed=0))
    for leaf in tree.leaves:
        if leaf.outcome is not Outcome.ANSWERED or leaf.metrics["tool_calls"] != calls or leaf.reward != 1.0:
            sys.exit(f"a rollout went wrong: {leaf}")


def asyncio_alone() -> None:
    """What ``play("look_up", TURNS)`` cannot do without."""

    async def one() -> None:
        for _ in range(TURNS):
            async with asyncio.timeout(10):
                await asyncio.sleep(0)

    async def everyone() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(ROLLOUTS):
                group.create_task(one())

    asyncio.run(everyone())


def main() -> int:
    options = parser(__doc__, rounds=15).parse_args()

    def collected(work: Any, *arguments: Any) -> Seconds:
        gc.collect()
        return measure(lambda: work(*arguments))

    play("look_up", 1)  # warms up: imports, and the schema of the tools
    gc.collect()
    gc.freeze()
    taken = interleave(
        options.rounds,
        {
            "wait": lambda: collected(play, "wait", 1),
            "loop": lambda: collected(play, "look_up", TURNS),
            "asyncio": lambda: collected(asyncio_alone),
        },
    )
    step = 1e6 / (ROLLOUTS * (TURNS + 1))
    rows = [
        Row(f"{ROLLOUTS} rollouts, one 50 ms tool each", typical(taken["wait"]).wall / TOOL_SECONDS, "x", 1.3),
        Row("env loop, per step", best(taken["loop"]).cpu * step, "us", 15),
        Row("asyncio alone, per step", best(taken["asyncio"]).cpu * step, "us"),
    ]
    return report("rollouts without a model", rows, options)


if __name__ == "__main__":
    sys.exit(main())
