"""How plain data is compared, and what the grader does with a sandbox, seen with one that is none."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
from collections import Counter, OrderedDict, defaultdict, namedtuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl import Message
from agentrl.envs import unit_tests
from agentrl.envs.unit_tests import grader
from agentrl.envs.unit_tests.grader import same
from agentrl.envs.unit_tests.inside import NotPlain, from_json, to_json
from agentrl.errors import IsolationUnavailable, SandboxError
from agentrl.sandbox.base import ExecResult, ExecStatus
from agentrl.types import ForkLevel

EXACT = "def f(x):\n    return 2 * x"

# -- plain data ------------------------------------------------------------------------------------------------------

keys = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
    ),
    max_leaves=12,
)


def typed(value):
    """A value with its types, to be compared exactly."""
    if isinstance(value, dict):
        return dict, {repr(typed(key)): typed(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return type(value), sorted(repr(typed(item)) for item in value)
    if isinstance(value, list | tuple):
        return type(value), [typed(item) for item in value]
    return type(value), repr(value)


@given(plain)
def test_plain_data_comes_back_as_it_was(value):
    data = to_json(value)
    assert typed(from_json(json.loads(json.dumps(data, allow_nan=False)))) == typed(value)
    assert same(data, json.loads(json.dumps(data)))


@given(plain, plain)
def test_what_is_not_equal_is_not_the_same(one, two):
    if typed(one) != typed(two) and not _close(one, two):
        assert not same(to_json(one), to_json(two))


def _close(one, two):
    """Whether floats might make them the same."""
    return "float" in repr(typed(one)) and "float" in repr(typed(two))


@pytest.mark.parametrize(
    ("expected", "found", "equal"),
    [
        (1, True, False),
        (0, False, False),
        (1, 1.0, False),
        (1.0, 1, False),
        (None, 0, False),
        ("1", 1, False),
        ([1], (1,), False),
        ({1}, frozenset({1}), False),
        ({}, set(), False),
        ({"a": 1}, {"a": True}, False),
        ({1: 2}, {"1": 2}, False),
        ({1: "a", "1": "b"}, {"1": "b", 1: "a"}, True),
        ({"$int": "0x1"}, {"$int": "0x1"}, True),
        ({"$int": "0x8000000000000000"}, 2**63, False),
        (1 << 20000, 1 << 20000, True),
        (1 << 20000, (1 << 20000) + 1, False),
        (0.3, 0.1 + 0.2, True),
        (1.0, 1.0 + 1e-5, False),
        (1e20, 1e20 * (1 + 1e-8), True),
        (0.0, 1e-10, True),
        (0.0, 1e-8, False),
        (math.inf, math.inf, True),
        (math.inf, -math.inf, False),
        (1.0, math.nan, False),
        (math.nan, math.nan, True),
        ([1, [2.0, {"x": (None,)}]], [1, [2.0, {"x": (None,)}]], True),
        ([1, 2], [1, 2, 3], False),
        ("\ud800", "\ud800", True),
        ({3, 1, 2}, {1, 2, 3}, True),
    ],
    ids=lambda value: "",
)
def test_equal_means_type_and_value(expected, found, equal):
    assert same(to_json(expected), json.loads(json.dumps(to_json(found)))) is equal


def test_subclasses_count_as_their_plain_value():
    class Liar(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

        def __index__(self):
            return 7

    Point = namedtuple("Point", "x y")
    assert to_json(Liar(3)) == 3
    assert type(to_json(Liar(3))) is int
    assert to_json(Counter("aab")) == to_json(defaultdict(int, a=2, b=1)) == to_json(OrderedDict(a=2, b=1))
    assert to_json(Point(1, 2)) == {"$tuple": [1, 2]}


@pytest.mark.parametrize("value", [object(), (i for i in "ab"), map(str, "ab"), range(3), b"x", 1j, {"a": [print]}])
def test_other_things_are_not_plain(value):
    with pytest.raises(NotPlain, match="a value of type"):
        to_json(value)


# -- a sandbox that is none, to see what the grader does with it -----------------------------------------------------


class Fake:
    """Runs cells in this process; ``broken`` names the call that fails."""

    def __init__(self, fork_level=ForkLevel.SNAPSHOT, broken="", error=None, hang=False):
        self.fork_level, self.broken, self.hang = fork_level, broken, hang
        self.error = error or SandboxError("lost")
        self.live, self.calls, self.most = set(), Counter(), 0

    def note(self, call):
        self.calls[call] += 1
        if call == self.broken:
            raise self.error

    async def open(self, profile=None, *, seed=0, limits=None):
        self.note("open")
        return FakeSession(self, {})

    async def close(self):
        pass


class FakeSession:
    def __init__(self, sandbox, names):
        self.sandbox, self.names = sandbox, names
        sandbox.live.add(self)
        sandbox.most = max(sandbox.most, len(sandbox.live))

    async def exec(self, code, deadline=5.0):
        setup = code.startswith(grader._INSIDE)
        self.sandbox.note("setup" if setup else "exec")
        await asyncio.sleep(3600 if self.sandbox.hang and not setup else 0)
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                exec(code, self.names)
        except Exception as error:
            return ExecResult(ExecStatus.ERROR, output.getvalue(), f"{type(error).__name__}: {error}", True, 0.01)
        return ExecResult(ExecStatus.OK, output.getvalue(), None, True, 0.01)

    async def fork(self, rng="inherit", *, branch=None):
        self.sandbox.note("fork")
        return FakeSession(self.sandbox, dict(self.names))

    async def close(self):
        self.sandbox.live.discard(self)
        self.sandbox.note("close")


@pytest.mark.parametrize("level", [ForkLevel.SNAPSHOT, ForkLevel.REPLAY])
async def test_every_test_has_a_session_of_its_own(level, score):
    fake = Fake(level)
    assert await score(fake, EXACT) == ["passed"] * 4
    opened = (1, 4) if level is ForkLevel.SNAPSHOT else (4, 0)
    assert (fake.calls["open"], fake.calls["fork"], fake.calls["exec"]) == (*opened, 4)
    assert fake.calls["close"] == sum(opened)
    assert not fake.live


@pytest.mark.parametrize("level", [ForkLevel.SNAPSHOT, ForkLevel.REPLAY])
@pytest.mark.parametrize("broken", ["open", "setup", "fork", "exec", "close"])
async def test_a_failure_of_the_sandbox_is_raised(broken, level, score):
    if broken == "fork" and level is ForkLevel.REPLAY:
        return
    fake = Fake(level, broken)
    with pytest.raises(SandboxError, match="lost"):
        await score(fake, EXACT)
    assert not fake.live


@pytest.mark.parametrize("error", [SandboxError("lost"), IsolationUnavailable(["seccomp"])])
async def test_a_failure_of_the_sandbox_is_no_reward(error):
    env = unit_tests.UnitTests(sandbox=Fake(broken="open", error=error))
    task = env.tasks("train")[0]
    await env.reset(options={"task": task})
    with pytest.raises(type(error)):
        await env.step(Message("assistant", task.metadata["solution"]))
    await env.close()


async def test_nothing_is_left_open_when_grading_is_cancelled(score):
    fake = Fake(hang=True)
    running = asyncio.create_task(score(fake, EXACT))
    await asyncio.sleep(0.05)
    assert fake.calls["exec"] == 4
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not fake.live
    assert await score(Fake(), EXACT) == ["passed"] * 4  # and the gate is open again


async def test_tests_run_at_once_but_not_all(monkeypatch, score, make_cases):
    monkeypatch.setattr(grader, "_PER_CORE", 1)
    monkeypatch.setattr(grader.os, "cpu_count", lambda: 3)
    fake = Fake()
    await asyncio.gather(*(score(fake, EXACT, make_cases(((3,), 6)) * 20) for _ in range(3)))
    assert fake.most == 3 + 3  # a root for each submission


async def test_expected_values_and_other_tests_never_go_in(score, make_cases):
    class Spy(FakeSession):
        async def exec(self, code, deadline=5.0):
            seen.append(code)
            return await super().exec(code, deadline)

        async def fork(self, rng="inherit", *, branch=None):
            return Spy(self.sandbox, dict(self.names))

    class SpyBox(Fake):
        async def open(self, profile=None, *, seed=0, limits=None):
            return Spy(self, {})

    seen = []
    hidden = make_cases(((111,), "secret one"), ((222,), "secret two"))
    await score(SpyBox(), "def f(x):\n    return x", hidden)
    assert not any("secret" in code for code in seen)
    assert sorted(("111" in code, "222" in code) for code in seen) == [(False, False), (False, True), (True, False)]


async def test_without_code_nothing_is_opened(score):
    fake = Fake(broken="open")
    assert await score(fake, " \n") == ["error"] * 4
    assert await score(fake, "#" * (grader.SOURCE_CHARS + 1)) == ["error"] * 4


async def test_the_total_does_not_depend_on_what_overlapped(score):
    fake = Fake()  # whose cells take 0.01 s each
    assert await score(fake, EXACT, total=0.015) == ["passed", "passed", "skipped", "skipped"]
    assert await score(fake, EXACT, total=0.025) == ["passed", "passed", "passed", "skipped"]
