"""Every check of the kit finds what it is there to find."""

from __future__ import annotations

import asyncio
import itertools
import random
import time

import pytest

from agentrl import Message, StepResult, Task, ToolCall, ToolEnv, tool
from agentrl.conformance import CHECKS, check_env
from agentrl.tool import Tool
from agentrl.types import ForkLevel


@tool
def double(x: int) -> str:
    """Double a number.

    Args:
        x: the number.
    """
    return str(2 * x)


class Good(ToolEnv):
    tools = (double,)
    max_turns = 4

    def tasks(self, split):
        for i in range(5):
            yield Task(f"double {i}" + "!" * (split == "test"), answer=str(2 * i), metadata={"i": i})

    async def reward(self, task, episode):
        return float(episode.answer == task.answer)

    def expert(self, task, rng):
        call = ToolCall("call_0_0", "double", {"x": task.metadata["i"]})
        return [Message("assistant", "", (call,)), Message("assistant", task.answer)]


async def failed(cls, **options):
    return {check.name: check.detail for check in await check_env(cls, **options) if not check.ok}


async def test_a_good_environment_passes_every_check():
    checks = await check_env(Good)
    assert [check.name for check in checks] == ["tasks", "play", *CHECKS]
    assert all(check.ok for check in checks), checks
    details = {check.name: check.detail for check in checks}
    assert details["tasks"] == "5 train, 5 test"
    assert details["tools"] == "double"
    assert details["reward"].startswith("expert 1, wrong answer 0")
    assert details["fork"].startswith("copy: ")


def tasks_of(train, test):
    class Env(Good):
        def tasks(self, split):
            return train if split == "train" else test

    return Env


A, B = Task("a", "1", metadata={"i": 1}), Task("b", "2", metadata={"i": 2})


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ([], [A], r"tasks('train') is empty"),
        ([A], [], r"tasks('test') is empty"),
        (["a"], [A], "expected Task records"),
        ([A, B, A], [A], f"repeats the id {A.id!r}"),
        ([A, B], [B], "share 1 ids"),
        ([A], [Task("a", "1", id="other", metadata={"i": 1})], "share 1 tasks"),
        ([Task([Message("assistant", "a")])], [B], "ends with assistant"),
        ([Task([])], [B], "no messages"),
        ([Task([Message("user", "u"), Message("system", "s"), Message("user", "u")])], [B], "a system message after"),
    ],
)
async def test_tasks(train, test, said):
    assert said in (await failed(tasks_of(train, test)))["tasks"]


async def test_order_of_tasks():
    class Shuffled(Good):
        def tasks(self, split):
            tasks = list(super().tasks(split))
            random.shuffle(tasks)
            return tasks

    random.seed(0)
    assert "other tasks the second time" in (await failed(Shuffled))["tasks"]


async def test_endless_splits_are_read_to_a_bound():
    class Endless(Good):
        def tasks(self, split):
            for i in itertools.count(split == "test", 2):
                yield Task(f"double {i}", answer=str(2 * i), metadata={"i": i})

    checks = await check_env(Endless)
    assert checks[0].detail == "2000+ train, 2000+ test"
    assert all(check.ok for check in checks)


async def test_what_cannot_be_played_ends_the_report():
    class Broken(Good):
        async def reward(self, task, episode):
            return None

    checks = await check_env(Broken)
    assert [check.name for check in checks] == ["tasks", "play"]
    assert "RewardError" in checks[1].detail
    assert "expected a finite float" in checks[1].detail


async def test_a_step_that_never_ends_is_named():
    class Stuck(Good):
        async def reward(self, task, episode):
            await asyncio.Event().wait()

    assert "step() did not finish within 0.05 s" in (await failed(Stuck, deadline=0.05))["play"]


async def test_a_step_that_blocks_is_named():
    class Blocking(Good):
        async def reward(self, task, episode):
            time.sleep(0.06)  # noqa: ASYNC251
            return await super().reward(task, episode)

    assert "blocked for 0.1 s; expected at most 0.05 s" in (await failed(Blocking, tasks=1, deadline=0.05))["deadline"]


async def test_reward_range_and_a_useless_expert():
    class Generous(Good):
        async def reward(self, task, episode):
            return 2.0

    assert "reward 2; expected 0 to 1 (reward_range)" in (await failed(Generous))["reward"]

    class Useless(Good):
        async def reward(self, task, episode):
            return 0.5

    assert "expected more for the expert" in (await failed(Useless))["reward"]


async def test_determinism():
    class Fickle(Good):
        async def reward(self, task, episode):
            return random.random()

    assert "the same seed and actions gave" in (await failed(Fickle))["determinism"]

    class Shared(Good):
        """Episodes that see each other's state are only found when they run at the same time."""

        current = None

        async def step(self, action):
            type(self).current = self.task
            await asyncio.sleep(0)
            return await super().step(action)

        async def reward(self, task, episode):
            return float(episode.answer == self.current.answer)

    assert "the same seed and actions gave" in (await failed(Shared))["determinism"]


async def test_steps():
    class Repeating(Good):
        async def step(self, action):
            result = await super().step(action)
            return result._replace(observation=(*self.task.prompt, *result.observation))

    class Speaking(Good):
        async def step(self, action):
            result = await super().step(action)
            return result._replace(observation=(*result.observation, Message("assistant", "I say")))

    class Integer(Good):
        async def step(self, action):
            return (await super().step(action))._replace(reward=1)

    class Four(Good):
        async def step(self, action):
            return (await super().step(action))[:4]

    class Silent(Good):
        async def step(self, action):
            return StepResult((), 0.0, True, False, {})

    assert "'double 0' came again" in (await failed(Repeating))["steps"]
    assert "expected a message of a tool or a user" in (await failed(Speaking))["steps"]
    assert "reward is 1; expected a float" in (await failed(Integer))["steps"]
    assert "gymnasium's five" in (await failed(Four))["play"]
    assert "info['outcome'] is None" in (await failed(Silent))["steps"]


async def test_tools():
    class Undescribed(Good):
        async def reset(self, **options):
            opening, info = await super().reset(**options)
            info["tools"] = [*info["tools"], {"name": "f"}]
            return opening, info

    assert "expected {'function'" in (await failed(Undescribed))["tools"]


class Counter(Tool):
    name = "double"
    fork_level = ForkLevel.COPY

    def __init__(self):
        self.calls = 0

    async def run(self, x: int) -> str:
        """Count.

        Args:
            x: anything.
        """
        self.calls += 1
        return str(self.calls)


async def test_forks_that_share_state():
    class Counting(Good):
        def make_tools(self):
            return [Counter()]

        def expert(self, task, rng):
            call = Message("assistant", "", (ToolCall("c", "double", {"x": 1}),))
            return [call, call, Message("assistant", task.answer)]

    assert "a fork after turn 0 gave" in (await failed(Counting))["fork"]


async def test_fork_levels_are_declared():
    class Refusing(Good):
        def make_tools(self):
            counter = Counter()
            counter.fork_level = ForkLevel.REFUSED
            return [counter]

    assert not await failed(Refusing)

    class Undeclared(Good):
        fork_level = "cheap"

    assert "fork_level is 'cheap'" in (await failed(Undeclared))["fork"]

    class Pretending(Good):
        fork_level = ForkLevel.REFUSED

    assert "expected ForkRefused" in (await failed(Pretending))["fork"]


async def test_the_fixture_lists_what_failed(env_conformance):
    class Generous(Good):
        async def reward(self, task, episode):
            return 2.0

    assert len(await env_conformance(Good, tasks=1)) == 2 + len(CHECKS)
    with pytest.raises(AssertionError, match=r"breaks its contract:\n  reward: .*reward_range"):
        await env_conformance(Generous, tasks=1)


async def test_forks_by_replay():
    class Counting(Counter):
        fork_level = ForkLevel.REPLAY

    class Replayed(Good):
        def make_tools(self):
            return [Counting()]

        def expert(self, task, rng):
            call = Message("assistant", "", (ToolCall("c", "double", {"x": 1}),))
            return [call, call, Message("assistant", task.answer)]

    details = {check.name: (check.ok, check.detail) for check in await check_env(Replayed)}
    assert details["fork"][0]
    assert details["fork"][1].startswith("replay: ")

    class Timed(Counting):
        async def run(self, x: int) -> str:
            """Tell the time.

            Args:
                x: anything.
            """
            return f"{time.perf_counter_ns()}"

    class Unrepeatable(Replayed):
        def make_tools(self):
            return [Timed()]

    assert "raised ForkRefused: Unrepeatable cannot be replayed: tool 'double'" in (await failed(Unrepeatable))["fork"]


async def test_forks_of_forks_that_share_state():
    class Twice(Counter):
        """The first fork is a fork; a fork of it is itself."""

        forked = False

        async def fork(self):
            if self.forked:
                return self
            twin = Twice()
            twin.calls, twin.forked = self.calls, True
            return twin

    class Env(Good):
        def make_tools(self):
            return [Twice()]

        def expert(self, task, rng):
            call = Message("assistant", "", (ToolCall("c", "double", {"x": 1}),))
            return [call, call, Message("assistant", task.answer)]

    assert "a fork after turn" in (await failed(Env))["fork"]
