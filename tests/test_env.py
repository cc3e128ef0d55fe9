from __future__ import annotations

import random

import pytest

from agentrl import Env, Message, Outcome, Task, ToolCall, ToolEnv, require_answer, tool
from agentrl.env import make_tool
from agentrl.errors import EnvError, ForkRefused, RewardError, TaskError, ToolInfrastructureError, UnknownName
from agentrl.tool import FunctionTool, Tool
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

    async def close(self):
        self.open = False


class Copied(Counter):
    fork_level = ForkLevel.COPY

    async def fork(self):
        return type(self)(self.value)


class Counting(Doubling):
    max_turns = 10
    kind = Counter

    def make_tools(self):
        self.counter = self.kind()
        return [self.counter]


COUNT = Message("assistant", "", (ToolCall("a", "count"),))


class CountingCopied(Counting):
    kind = Copied


@pytest.mark.parametrize("cls", [Counting, CountingCopied])
async def test_forks_are_independent(cls):
    env = await started(cls)
    await env.step(COUNT)
    twin = await env.fork()
    assert twin.forked is cls.kind.fork_level
    assert env.forked is None
    assert twin.counter is twin._tools["count"] is not env.counter
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


# -- forks by replay --------------------------------------------------------------------------------------------------


async def test_a_replay_has_the_seed_the_task_and_whatever_setup_makes():
    class Seeded(Counter):
        async def start(self, seed):
            self.value = seed

    class Env(Counting):
        kind = Seeded

        def __init__(self, data):
            self.data = data

        async def setup(self, task):
            self.pages = [task.id]

        async def step(self, action):
            self.pages.append("turned")
            return await super().step(action)

    data = ["shared"]
    env = Env(data)
    await env.reset(seed=40, options={"task": TASK})
    for expected in ("41", "42"):
        assert (await env.step(COUNT)).observation[0].content == expected
    twin = await (await env.fork()).fork()
    assert (twin.task, twin.forked, twin._turns, twin._calls) == (TASK, ForkLevel.REPLAY, 2, 2)
    assert twin.pages == env.pages == [TASK.id, "turned", "turned"]
    assert twin.pages is not env.pages
    assert twin.data is data
    assert (await twin.step(COUNT)).observation[0].content == "43"
    assert len(env.pages) == 3


async def test_a_drawn_task_and_no_seed_are_replayed_too():
    env = Counting()
    await env.reset()
    await env.step(COUNT)
    assert (await env.fork()).task is env.task


class Clock(Counter):
    """Counts the calls of all episodes."""

    ticks = 0

    async def run(self) -> str:
        """Count."""
        Clock.ticks += 1
        return "at " + "0" * 200 + str(Clock.ticks)


async def test_a_replay_that_gives_something_else_is_refused_naming_the_call():
    class Env(Counting):
        kind = Clock

    Clock.ticks = 0
    env = await started(Env)
    await env.step(COUNT)
    await env.step(COUNT)
    said = r"tool 'count', called again in turn 1 with \{\}, gave '0+3' instead of '0+1' from character 173\."
    with pytest.raises(ForkRefused, match=said):
        await env.fork()
    assert env.counter.open
    assert (await env.step(COUNT)).observation[0].content.endswith("4"), "what was to be forked goes on"


async def test_a_replay_is_refused_where_the_kind_of_error_the_opening_or_the_end_differs():
    class Failing(Counter):
        made = 0

        def __init__(self):
            super().__init__()
            Failing.made += 1
            self.first = Failing.made == 1

        async def run(self) -> str:
            """Fail, but not the first one."""
            if self.first:
                return "fine"
            raise ValueError("late")

    class Env(Counting):
        kind = Failing

    env = await started(Env)
    await env.step(COUNT)
    with pytest.raises(ForkRefused, match=r"gave exception instead of none: 'ValueError: late'"):
        await env.fork()

    class Moody(Counting):
        greetings = iter(["hello", "good-bye"])

        @property
        def system(self):
            return next(self.greetings)

    class Opening(Moody):
        async def reset(self, **options):
            Opening.system = next(self.greetings)
            return await super().reset(**options)

    env = await started(Opening)
    with pytest.raises(ForkRefused, match="opens with other messages"):
        await env.fork()

    env = await started(Counting)
    await env.step(COUNT)
    await env.step(COUNT)
    env._before["max_turns"] = 1
    with pytest.raises(ForkRefused, match="Counting cannot be replayed: it was over after turn 1"):
        await env.fork()


async def test_a_failing_replay_closes_what_it_opened():
    opened = []

    class Noted(Clock):
        def __init__(self):
            super().__init__()
            opened.append(self)

    class Env(Counting):
        kind = Noted

    env = await started(Env)
    await env.step(COUNT)
    with pytest.raises(ForkRefused):
        await env.fork()
    assert [tool.open for tool in opened] == [True, False]


# -- refusals at run time ---------------------------------------------------------------------------------------------


class Held(Counter):
    """A live state that can be forked until it has counted to two."""

    fork_level = ForkLevel.SNAPSHOT

    async def fork(self):
        if self.value > 1:
            raise ForkRefused("it counts too far", ["far", "too far"])
        return type(self)(self.value)


class PureHeld(Held):
    pure = True


class CountingHeld(Counting):
    kind = Held


class CountingPure(Counting):
    kind = PureHeld


async def test_a_refusal_falls_back_to_a_replay_only_where_the_calls_are_pure():
    env = await started(CountingPure)
    await env.step(COUNT)
    assert (await env.fork()).forked is ForkLevel.SNAPSHOT
    await env.step(COUNT)
    twin = await env.fork()
    assert twin.forked is ForkLevel.REPLAY
    assert (await twin.step(COUNT)).observation[0].content == "3"
    env = await started(CountingHeld)
    await env.step(COUNT)
    await env.step(COUNT)
    said = r"CountingHeld cannot fork: tool 'count': it counts too far Its calls .* count is not declared pure"
    with pytest.raises(ForkRefused, match=said) as refusal:
        await env.fork()
    assert refusal.value.reasons == ("far", "too far")


async def test_every_tool_that_was_called_has_to_be_pure():
    class Both(CountingPure):
        def make_tools(self):
            return [*super().make_tools(), FunctionTool(double.function, pure=self.pure)]

    async def after(pure, *actions):
        Both.pure = pure
        env = await started(Both)
        for action in (COUNT, COUNT, *actions):
            await env.step(action)
        return await env.fork()

    assert (await after(False)).forked is ForkLevel.REPLAY, "who was not called need not be"
    assert (await after(True, call(1))).forked is ForkLevel.REPLAY
    with pytest.raises(ForkRefused, match="double is not declared pure"):
        await after(False, call(1))


async def test_purity_is_declared_with_the_tool():
    @tool(pure=True)
    def pure(x: int) -> str:
        """Be pure.

        Args:
            x: anything.
        """
        return str(x)

    assert pure.pure
    assert not double.pure
    assert not make_tool("python").pure


async def test_a_tool_that_dies_during_a_fork_is_named_and_what_was_forked_before_it_is_closed():
    class Dying(Copied):
        async def fork(self):
            raise ConnectionError("the backend is gone")

    twins = []

    class Noted(Copied):
        name = "noted"

        async def fork(self):
            twins.append(Noted())
            return twins[-1]

    class Env(Doubling):
        def make_tools(self):
            return [Noted(), Dying()]

    env = await started(Env)
    with pytest.raises(ToolInfrastructureError, match="tool 'count' failed while it was forked: ConnectionError"):
        await env.fork()
    assert [twin.open for twin in twins] == [False]
    assert (await env.step(COUNT)).observation[0].content == "1", "what was to be forked goes on"


async def test_a_tool_that_closes_something_is_not_shared_by_its_forks():
    class Client(Counter):
        fork_level = ForkLevel.COPY

    class Env(Counting):
        kind = Client

    env = await started(Env)
    await env.step(COUNT)
    with pytest.raises(ForkRefused, match=r"'count' declares fork level copy and has a close\(\) but defines no fork"):
        await env.fork()


async def test_what_the_episode_has_made_is_copied_and_what_was_there_before_is_shared():
    class Env(CountingCopied):
        def __init__(self):
            self.rows = [1, 2, 3]

        async def setup(self, task):
            self.rng, self.seen = random.Random(1), {"deep": [self.counter]}
            self.alias = self.seen["deep"]

    env = await started(Env)
    twin = await env.fork()
    assert twin.rows is env.rows
    assert twin.alias is twin.seen["deep"] is not env.alias
    assert twin.alias == [twin.counter]
    assert [twin.rng.random() for _ in range(2)] == [env.rng.random() for _ in range(2)]


async def test_state_that_cannot_be_copied_is_named():
    class Env(CountingCopied):
        async def setup(self, task):
            self.numbers = (i for i in range(3))

    env = await started(Env)
    await env.step(COUNT)
    with pytest.raises(ForkRefused, match="its numbers, a generator, cannot be copied"):
        await env.fork()


async def test_refusals_inside_a_call_are_not_read_by_the_policy():
    class Frozen(Counter):
        async def run(self) -> str:
            """Refuse."""
            raise ForkRefused("no room")

    class Env(Counting):
        kind = Frozen

    for calls in (1, 2):
        env = await started(Env)
        with pytest.raises(ForkRefused, match="no room"):
            await env.step(Message("assistant", "", tuple(ToolCall(str(i), "count") for i in range(calls))))


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("12", "12"),
        ("<answer>1</answer> no, <answer> 2\n</answer>", "2"),
        ("<answer>1</answer> or <answer>2", "1"),
        ("1</answer>", "1</answer>"),
        ("<answer>a<answer>b</answer></answer>", "a<answer>b"),
        ("<answer>" * 200_000, "<answer>" * 200_000),
    ],
)
def test_the_answer_is_the_last_whole_block(doubling, content, answer):
    assert doubling().extract_answer(content) == answer
