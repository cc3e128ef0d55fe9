from __future__ import annotations

import random

import pytest

from agentrl import Env, Message, Outcome, Task, ToolCall, ToolEnv, require_answer, tool
from agentrl.errors import EnvError, ForkRefused, RewardError, TaskError, ToolInfrastructureError, UnknownName
from agentrl.tool import Tool
from agentrl.types import ForkLevel


@tool
def double(x: int) -> str:
    """Double a number.

    Args:
        x: the number.
    """
    return str(2 * x)


class Doubling(ToolEnv):
    tools = (double,)
    system = "Use the tool."
    max_turns = 3

    def tasks(self, split):
        for i in range(5):
            yield Task(f"double {i}", answer=str(2 * i))

    async def reward(self, task, episode):
        return float(episode.answer == require_answer(task))


TASK = Task("double 2", answer="4")


def call(*xs, error=None):
    calls = tuple(ToolCall(f"call_{i}", "double", {"x": x}, error) for i, x in enumerate(xs))
    return Message("assistant", "", calls)


async def started(cls=Doubling, task=TASK, seed=0):
    env = cls()
    await env.reset(seed=seed, options={"task": task})
    return env


async def test_the_five_and_the_episode():
    env = Doubling()
    assert isinstance(env, Env)
    opening, info = await env.reset(options={"task": TASK})
    assert [m.content for m in opening] == ["Use the tool.", "double 2"]
    assert [schema["function"]["name"] for schema in info["tools"]] == ["double"]
    observation, reward, terminated, truncated, info = await env.step(call(2, 3))
    assert [(m.role, m.content, m.tool_call_id) for m in observation] == [
        ("tool", "4", "call_0"),
        ("tool", "6", "call_1"),
    ]
    assert (reward, terminated, truncated) == (0.0, False, False)
    observation, reward, terminated, truncated, info = await env.step(Message("assistant", "so <answer> 4 </answer>"))
    assert (observation, reward, terminated, truncated) == ((), 1.0, True, False)
    assert info["outcome"] is Outcome.ANSWERED
    assert len(info["episode"].messages) == 6
    assert [r.content for r in info["episode"].tool_results] == ["4", "6"]


async def test_turn_limit_and_parse_error():
    env = await started()
    for _ in range(2):
        assert not (await env.step(call(1))).truncated
    last = await env.step(call(1))
    assert (last.terminated, last.truncated, last.info["outcome"]) == (False, True, Outcome.TURN_LIMIT)
    assert last.observation[0].content == "2"
    env = await started()
    for _ in range(3):
        last = await env.step(call(1, error="not JSON"))
    assert last.info["outcome"] is Outcome.PARSE_ERROR


async def test_tool_limit_and_truncation_from_outside():
    class Limited(Doubling):
        max_tool_calls = 2

    env = await started(Limited)
    assert (await env.step(call(1, 2, 3))).info["outcome"] is Outcome.TOOL_LIMIT
    env = await started()
    result = await env.truncate(Message("assistant", "4"), Outcome.LENGTH)
    assert (result.reward, result.truncated, result.info["episode"].answer) == (0.0, True, None)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "1"])
async def test_a_reward_that_is_no_finite_number_is_refused(value):
    class Bad(Doubling):
        async def reward(self, task, episode):
            return value

    env = await started(Bad)
    with pytest.raises(RewardError, match=f"Bad.reward gave {value!r} on task {TASK.id}: expected a finite float"):
        await env.step(Message("assistant", "4"))


async def test_a_reward_that_raises_keeps_its_cause():
    class Bad(Doubling):
        async def reward(self, task, episode):
            return 1 / 0

    env = await started(Bad)
    with pytest.raises(RewardError, match="ZeroDivisionError") as failure:
        await env.step(Message("assistant", "4"))
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


async def test_a_missing_answer_is_the_users_to_mend():
    env = await started(task=Task("double 2"))
    with pytest.raises(TaskError, match="has no answer"):
        await env.step(Message("assistant", "4"))


async def test_infrastructure_failures_are_raised():
    @tool
    def down(x: int) -> str:
        """Fail.

        Args:
            x: anything.
        """
        raise ToolInfrastructureError("down")

    class Down(Doubling):
        tools = (down,)

    env = await started(Down)
    with pytest.raises(ToolInfrastructureError):
        await env.step(Message("assistant", "", (ToolCall("a", "down", {"x": 1}),)))


async def test_no_steps_before_reset_or_after_the_end():
    with pytest.raises(EnvError, match="call reset"):
        await Doubling().step(Message("assistant", "4"))
    env = await started()
    await env.step(Message("assistant", "4"))
    with pytest.raises(EnvError, match="call reset"):
        await env.step(Message("assistant", "4"))
    await env.close()
    await env.close()


async def test_reset_draws_a_task_by_seed():
    drawn = [(await Doubling().reset(seed=seed))[1]["task_id"] for seed in (1, 1, *range(20))]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1

    class Empty(Doubling):
        def tasks(self, split):
            return []

    with pytest.raises(TaskError, match="empty"):
        await Empty().reset(seed=0)


async def test_unknown_tool_names_are_refused_with_the_nearest():
    class Wrong(Doubling):
        tools = ("pyton",)

    with pytest.raises(UnknownName, match="did you mean 'python'"):
        await Wrong().reset(options={"task": TASK})


class Counter(Tool):
    """Counts its calls."""

    name = "count"
    fork_level = ForkLevel.REPLAY

    def __init__(self, value=0):
        self.value, self.open = value, True

    async def run(self) -> str:
        """Count."""
        self.value += 1
        return str(self.value)

    async def fork(self):
        return Counter(self.value)

    async def close(self):
        self.open = False


class Counting(Doubling):
    max_turns = 10

    def make_tools(self):
        self.counter = Counter()
        return [self.counter]


COUNT = Message("assistant", "", (ToolCall("a", "count"),))


async def test_forks_are_independent():
    env = await started(Counting)
    await env.step(COUNT)
    twin = await env.fork()
    for expected in ("2", "3"):
        assert (await twin.step(COUNT)).observation[0].content == expected
    assert (await env.step(COUNT)).observation[0].content == "2"
    done = await twin.step(Message("assistant", "4"))
    assert len(done.info["episode"].tool_results) == 3
    assert len((await env.step(Message("assistant", "4"))).info["episode"].tool_results) == 2


async def test_the_weakest_tool_decides_the_fork_level():
    assert Doubling().fork_level is ForkLevel.COPY
    assert Counting().fork_level is ForkLevel.REPLAY

    class Stubborn(Counter):
        fork_level = ForkLevel.REFUSED

    class Refusing(Doubling):
        def make_tools(self):
            return [Stubborn()]

    env = await started(Refusing)
    with pytest.raises(ForkRefused, match="count"):
        await env.fork()


async def test_a_failing_setup_leaves_nothing_open():
    class Failing(Counting):
        async def setup(self, task):
            raise EnvError("no")

    env = Failing()
    with pytest.raises(EnvError, match="no"):
        await env.reset(options={"task": TASK})
    await env.close()
    assert not env.counter.open


async def test_one_failing_close_does_not_leak_the_other_tools():
    class Grumpy(Counter):
        async def close(self):
            raise EnvError("cannot close")

    second = Counter()
    second.name = "second"

    class Two(Doubling):
        def make_tools(self):
            return [Grumpy(), second]

    env = await started(Two)
    with pytest.raises(EnvError, match="cannot close"):
        await env.close()
    assert not second.open


def test_experts_are_optional():
    with pytest.raises(NotImplementedError, match=r"define expert\(task, rng\)"):
        Doubling().expert(TASK, random.Random(0))
