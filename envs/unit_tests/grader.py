"""Runs a submission on hidden tests and compares what comes back, here, with what was expected.

What an expected value is never enters a sandbox. A session is opened for the submission, and one fork of it for every
test; the submission itself first runs inside such a fork. So there is nothing that one test could leave for the next,
nothing to find but the one input, and nothing in the way of forking: what is forked has only ever run our own code.
Where there is no room for more sessions (``sandbox.max_sessions``), tests take turns in the place of the first one.
The submission shares its interpreter with whatever reports the result, so it can report what it likes: that is its
answer to this one test, and is taken as plain data (see ``inside``).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from agentrl.errors import ForkRefused, SandboxError
from agentrl.sandbox.base import ExecResult, ExecStatus, Limits, Sandbox, Session
from agentrl.sandbox.limit import fork_in_place
from agentrl.types import ForkLevel

from .inside import MARK

RELATIVE, ABSOLUTE = 1e-6, 1e-9
"""How far a float may be from what was expected: so much of the larger one, or so much."""
SOURCE_CHARS = 50_000
"""Longest submission."""
ARGUMENTS_CHARS = 200_000
"""Longest list of arguments, as JSON."""

_INSIDE = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
_SETUP_SECONDS = 20.0
_SLOW_TO_IMPORT = re.compile(r"\b(?:numpy|pandas|scipy|sympy|networkx)\b")
_SLACK_SECONDS = 0.25  # between the deadline, which is kept inside, and what is measured here
_DETAIL_CHARS = 200
_PER_CORE = 4
_MEGABYTE = 1024 * 1024

_gates: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

Fresh = Callable[[], AbstractAsyncContextManager[Session]]
"""Lends a session in which ``inside`` has been run and nothing else, and closes it."""


class Kind(StrEnum):
    """How a test ended. Every value is the submission's own doing: a failing sandbox raises ``SandboxError``."""

    PASSED = "passed"
    """The expected value."""
    WRONG = "wrong"
    """Another value."""
    STRANGE = "strange"
    """No plain data, too much of it, or nothing at all."""
    ERROR = "error"
    """It raised, could not be compiled, or does not define the function."""
    TIMEOUT = "timeout"
    """It ran past the deadline of one test."""
    MEMORY = "memory"
    """It asked for more memory than there is."""
    KILLED = "killed"
    """It ended its process, or a limit did."""
    SKIPPED = "skipped"
    """The tests before it took all the time that there was for all of them."""


@dataclass(frozen=True, slots=True)
class Case:
    """A hidden test.

    Attributes:
        arguments: the list of arguments, as JSON text.
        expected: the value, in the form of ``inside.to_json``.
    """

    arguments: str
    expected: Any


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a test.

    Attributes:
        kind: how it ended.
        detail: the error, or what came instead of the expected value, cut to 200 characters.
        seconds: wall time of the submission.
    """

    kind: Kind
    detail: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it counts."""
        return self.kind is Kind.PASSED


@dataclass(frozen=True, slots=True)
class Submission:
    """What is to be tested.

    Attributes:
        source: Python text.
        function: the name of the function in it.
    """

    source: str
    function: str


async def grade(
    sandbox: Sandbox, submission: Submission, cases: Sequence[Case], *, deadline: float, total: float
) -> tuple[Verdict, ...]:
    """One verdict a case, in their order.

    Cases run at the same time, at most four for each core of this machine whatever the number of submissions. A case
    counts only when those before it took less than ``total`` together, which does not depend on how they overlapped.

    Args:
        sandbox: where to open sessions; all of them are closed on return.
        submission: the code.
        cases: the hidden tests.
        deadline: seconds for one case.
        total: seconds for all of them.

    Raises:
        SandboxError: the sandbox failed; nothing is known about the submission.
        IsolationUnavailable: this machine cannot isolate a session.
    """
    if not submission.source.strip():
        return (Verdict(Kind.ERROR, "no code"),) * len(cases)
    if (size := len(submission.source)) > SOURCE_CHARS:
        problem = f"{size} characters of code; at most {SOURCE_CHARS} are read"
        return (Verdict(Kind.ERROR, problem),) * len(cases)
    seconds = [0.0] * len(cases)

    async def run(number: int, fresh: Fresh) -> Verdict:
        async with _gate():
            if sum(seconds[:number]) >= total:
                return Verdict(Kind.SKIPPED)
            verdict = await _run(fresh, submission, cases[number], deadline)
            seconds[number] = verdict.seconds
            return verdict

    failure: Exception | None = None
    try:
        async with _sessions(sandbox, submission, deadline) as fresh, asyncio.TaskGroup() as group:
            running = [group.create_task(run(number, fresh)) for number in range(len(cases))]
    except ExceptionGroup as errors:
        failure = errors.exceptions[0]
    if failure is not None:  # not raised above: its context would be the group that holds it, a circle
        raise failure
    verdicts = [task.result() for task in running]
    late = [sum(seconds[:number]) >= total for number in range(len(cases))]
    return tuple(Verdict(Kind.SKIPPED) if skip else verdict for verdict, skip in zip(verdicts, late, strict=True))


def same(expected: Any, found: Any) -> bool:
    """Whether two values in the form of ``inside.to_json`` are equal in type and value, floats within the tolerance."""
    if type(expected) is not type(found):
        return False
    if isinstance(expected, float):
        return math.isclose(expected, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    if isinstance(expected, list):
        return len(expected) == len(found) and all(map(same, expected, found))
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and all(same(value, found[key]) for key, value in expected.items())
    return bool(expected == found)


@asynccontextmanager
async def _sessions(sandbox: Sandbox, submission: Submission, deadline: float) -> AsyncIterator[Fresh]:
    """Sessions in the same state: forks of one where the sandbox can fork, else each opened anew.

    Large packages that the submission names are loaded ahead: else every test would pay for them.
    """
    setup = f"{_INSIDE}\npreload({sorted(set(_SLOW_TO_IMPORT.findall(submission.source)))})"
    limits = Limits(
        memory_bytes=256 * _MEGABYTE,
        cpu_seconds=math.ceil(deadline) + 10,
        processes=16,
        file_bytes=4 * _MEGABYTE,
        scratch_bytes=4 * _MEGABYTE,
    )

    @asynccontextmanager
    async def opened() -> AsyncIterator[Session]:
        session = await sandbox.open(seed=0, limits=limits)
        try:
            yield session
        finally:
            await session.close()

    async def prepare(session: Session) -> None:
        result = await session.exec(setup, _SETUP_SECONDS)
        if result.status is not ExecStatus.OK:
            raise SandboxError(f"a grading session could not be prepared: {result.status}, {result.error}")

    @asynccontextmanager
    async def anew() -> AsyncIterator[Session]:
        async with opened() as session:
            await prepare(session)
            yield session

    if sandbox.fork_level is not ForkLevel.SNAPSHOT:
        yield anew
        return
    alone = asyncio.Lock()

    @asynccontextmanager
    async def forked() -> AsyncIterator[Session]:
        try:
            session = await root.fork()
        except ForkRefused:
            async with alone:
                session = await fork_in_place(root)
                try:
                    yield session
                finally:
                    await session.close()
            return
        try:
            yield session
        finally:
            await session.close()

    # Not inside the gate: whoever has a place needs the gate to be done with it.
    async with opened() as root:
        async with _gate():
            await prepare(root)
        yield forked


async def _run(fresh: Fresh, submission: Submission, case: Case, deadline: float) -> Verdict:
    async with fresh() as session:
        cell = f"run({submission.function!r}, {case.arguments!r}, {submission.source!r})"
        result = await session.exec(cell, deadline)
    verdict = _judge(result, case.expected, deadline)
    return replace(verdict, detail=verdict.detail[:_DETAIL_CHARS], seconds=result.seconds)


def _judge(result: ExecResult, expected: Any, deadline: float) -> Verdict:
    if result.status is not ExecStatus.OK:
        lines = (result.error or "").rstrip().splitlines()
        return Verdict(Kind(str(result.status)), lines[-1] if lines else "")
    if result.seconds > deadline + _SLACK_SECONDS:  # it caught the interrupt and went on
        return Verdict(Kind.TIMEOUT, f"it took {result.seconds:.2f} s")
    replies = [line.removeprefix(MARK) for line in result.output.split("\n") if line.startswith(MARK)]
    try:
        reply = json.loads(replies[-1])
        if "value" not in reply:
            return Verdict(Kind.STRANGE, str(reply["strange"]))
        if same(expected, reply["value"]):
            return Verdict(Kind.PASSED)
        return Verdict(Kind.WRONG, json.dumps(reply["value"]))
    except (LookupError, TypeError, ValueError, RecursionError):  # somebody else has written it
        return Verdict(Kind.STRANGE, "no result")


def _gate() -> asyncio.Semaphore:
    """The running loop's bound on cases that run at once: a waiting one must not lose its time to the others."""
    loop = asyncio.get_running_loop()
    if loop not in _gates:
        _gates[loop] = asyncio.Semaphore(_PER_CORE * (os.cpu_count() or 1))
    return _gates[loop]
