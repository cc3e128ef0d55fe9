"""Rollouts: what the machinery costs, what trees cost beside groups, and a thousand episodes at once.

Without a model. The writer is scripted and answers at once, so all that is left is agentrl: ``Scheduler``, ``play``,
``ToolEnv`` and ``dispatch`` with the scheduler's gates, the episode's deadline, the tool's timeout and the turn and
call limits on.

1. ``64 rollouts, one 50 ms tool each``: wall time of all of them over the 50 ms of one, median of the rounds. 1.0 is
   perfect concurrency; one after another would be 64. Making and resetting the environments, schemas, rewards and the
   making of the tree are in it.
2. ``env loop, per step``: CPU microseconds of one turn of 64 concurrent episodes of 200 turns, best of the rounds. In
   it: the loop of ``play``, the environment's step, checking the call's arguments, starting and cancelling the tool's
   timeout, the result and its message; and one trip through asyncio's event loop, because the tool suspends once, as
   any tool worth awaiting does. Not in it: sampling and rendering. The episode's deadline and its place among the live
   ones act once an episode; their cost is spread over its steps. The garbage collector is on, without what the imports
   left behind.
3. ``asyncio alone, per step``: as many bare ``sleep(0)`` under ``asyncio.timeout`` in 64 tasks, the part of 2 that
   cannot be saved where a call has a deadline. It tells how fast and how busy the machine is; 2 grows with it.

With the embedded sampler and a tiny policy that calls a tool (``_hops.py``), 8 tasks of 8 leaves at once, torch on one
thread. All policies take turns, on tasks that nobody has played, in every round:

4. ``tool 50 ms: random_tree, leaves/s``: group's wall time over the tree's for as many leaves, median of the rounds.
   ``long tail`` is log-normal with a median of 50 ms, and 2 s in one call of 20.
5. ``sampler busy``: share of the wall time in which the sampler's thread admitted requests or computed.
6. ``leaves per generated token`` and ``per tool call``: sums over all rounds and latencies. What is generated is
   counted once, however many leaves share it.
7. ``leaves begun late from the prompt``: those of a second wave, because too few trajectories branched.
8. ``decision to sibling's token``: from the return of the policy's ``decide`` to the draw of the token: the
   fork of the environment, a place among the live trajectories, the rest of the sampler's present step, the prompt's
   copy and its new tokens are in it; the sampler's step is given beside it.

And 9. ``1,000 episodes of arithmetic``: 125 tasks of 8 answers, all live at once, by a tiny policy that computes with
the ``python`` tool, in a process of its own. ``peak memory`` is the most resident memory of that process (``VmHWM``),
with what it held before the first episode; the machine's is the fall of what it has left (``MemAvailable``), sandboxes
included.

    python benchmarks/rollout.py [--rounds 15] [--tree-rounds 3] [--json FILE] [--check]
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from _bench import Row, Seconds, best, interleave, measure, parser, report, typical
from _hops import warm_start
from _trees import tree_rows

from agentrl import registry
from agentrl.assemble import local_actors
from agentrl.config import RolloutConfig, load_config
from agentrl.env import ToolEnv
from agentrl.learner.checkpoint import load_policy
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import Watch
from agentrl.tiny import save_policy
from agentrl.tool import tool
from agentrl.types import Episode, Message, Node, Outcome, SamplingParams, StepResult, StopReason, Task, ToolCall

ROLLOUTS = 64
TOOL_SECONDS = 0.05
TURNS = 200
EPISODES = 1000


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

    async def write(self, watch: Watch) -> tuple[Message, StopReason]:
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


def crowd_rows() -> list[Row]:
    """Warm-start a policy here, and let a process of its own, which has never trained, play the crowd."""
    with tempfile.TemporaryDirectory() as folder:
        save_policy(*warm_start(registry.load("envs", "arithmetic"), demonstrations=200, steps=60), Path(folder))
        command = [sys.executable, __file__, "--crowd", folder]
        before = least = available()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as playing:
            while playing.poll() is None:
                least = min(least, available())
                time.sleep(0.05)
            assert playing.stdout is not None
            written = playing.stdout.read()
    if playing.returncode:
        sys.exit(f"the crowd ended with status {playing.returncode}")
    told = json.loads(written.splitlines()[-1])
    label = f"{EPISODES:,} episodes of arithmetic"
    return [
        Row(f"{label}, all live at once", told["seconds"], "s"),
        Row(f"{label}, speed", EPISODES / told["seconds"], "episodes/s", better="higher"),
        Row(f"{label}, calls of python", told["calls"], "calls"),
        Row(f"{label}, failed", told["failed"], "episodes", 0),
        Row(f"{label}, peak memory", told["peak"] / 2**20, "MiB"),
        Row(f"{label}, of which before the first", told["start"] / 2**20, "MiB"),
        Row(f"{label}, peak memory of the machine", (before - least) / 2**20, "MiB"),
    ]


def play_crowd(folder: str) -> dict[str, float]:
    """Play ``EPISODES`` at once with the policy in ``folder``."""
    model, tokenizer = load_policy(folder, "cpu")
    overrides = {
        "env": "arithmetic",
        "policy.threads": 1,
        "sampler.max_slots": EPISODES,
        "sampler.max_length": 512,
        "rollout.max_tokens": 64,
        "rollout.max_live": EPISODES,
        "rollout.max_calls": EPISODES,
    }
    config = load_config(overrides=overrides)
    tasks = list(registry.load("envs", "arithmetic")().tasks("train"))[: EPISODES // 8]

    async def played() -> dict[str, float]:
        async with local_actors(config, model, tokenizer, folder) as actors:
            start, began = status("VmHWM"), time.perf_counter()
            trees = await actors.scheduler.play(tasks, group=8, seed=0)
            seconds = time.perf_counter() - began
        leaves = [leaf for tree in trees for leaf in tree.leaves]
        failed = sum(leaf.outcome.failed for leaf in leaves)
        calls = sum(leaf.metrics["tool_calls"] for leaf in leaves)
        return {"seconds": seconds, "failed": failed, "calls": calls, "start": start, "peak": status("VmHWM")}

    return asyncio.run(played())


def status(name: str) -> int:
    """Bytes, of this process alone: ``ru_maxrss`` would begin with what the parent held."""
    return _kilobytes(Path("/proc/self/status"), name)


def available() -> int:
    """Bytes that the machine could still give to programs."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _kilobytes(file: Path, name: str) -> int:
    match = re.search(rf"^{name}: +(\d+) kB", file.read_text().replace("\t", " "), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def main() -> int:
    words = parser(__doc__, rounds=15)
    words.add_argument("--tree-rounds", type=int, default=3, help="rounds of trees against groups (3)")
    words.add_argument("--crowd", metavar="FOLDER", help="play the crowd with this policy and print what it took")
    options = words.parse_args()
    torch.set_num_threads(1)  # so tiny a model gains nothing from two, and they would spin beside the event loop
    if options.crowd:
        print(json.dumps(play_crowd(options.crowd)))
        return 0

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
    gc.unfreeze()
    rows += tree_rows(options.tree_rounds) + crowd_rows()
    return report("rollouts", rows, options)


if __name__ == "__main__":
    sys.exit(main())
