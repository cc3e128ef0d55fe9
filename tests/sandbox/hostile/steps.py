"""What a hostile program is, and the one way to play it against a sandbox.

A program is data: steps on the session ``root`` and on those that other steps open or fork. Its cells print only what
they got away with, so that a wall that holds leaves the expected text. What must hold whatever the program does is
checked by ``play`` and by whoever calls it, not by the program.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field
from typing import Any

from agentrl.sandbox.base import Limits, Sandbox, Session

ROOT = "root"
_CLOSE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Cell:
    """Run ``code`` and expect one of ``statuses`` and, somewhere in output or error, the text ``shows``.

    Attributes:
        kept: whether the state must be there afterwards; None where both will do.
        raises: names of exceptions that must come instead of a result.
    """

    code: str
    statuses: tuple[str, ...] = ("ok",)
    shows: str = "[]"
    deadline: float = 5.0
    kept: bool | None = None
    raises: tuple[str, ...] = ()
    on: str = ROOT


@dataclass(frozen=True, slots=True)
class Fork:
    """Fork session ``on``; the fork is called ``to``.

    Attributes:
        ends: how it may end: "forked", or the name of an exception. Steps on a fork that there is not are left out.
        shows: a text in the exception.
        never: a text that must not be in it.
    """

    to: str = "fork"
    ends: tuple[str, ...] = ("forked",)
    shows: str = ""
    never: str = "got away"
    on: str = ROOT


@dataclass(frozen=True, slots=True)
class Open:
    """Open another session, which has nothing to do with the first."""

    to: str


@dataclass(frozen=True, slots=True)
class Get:
    """Fetch ``path``: it must hold ``content`` (None: anything) or raise one of ``raises``, and none of ``never``.

    With ``raises`` alone it must raise.
    """

    path: str
    content: bytes | None = None
    raises: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    on: str = ROOT


@dataclass(frozen=True, slots=True)
class Put:
    """Send a file there; it must succeed, or raise one of ``raises``."""

    path: str
    data: bytes = b"data"
    raises: tuple[str, ...] = ()
    on: str = ROOT


@dataclass(frozen=True, slots=True)
class Close:
    """Close a session, in the middle of ``cell`` where there is one; it must not take long."""

    cell: str = ""
    on: str = ROOT


Step = Cell | Fork | Open | Get | Put | Close


@dataclass(frozen=True, slots=True)
class Program:
    """A hostile program: steps, and the limits of the session that it starts in."""

    name: str
    steps: tuple[Step, ...]
    limits: Limits = field(default_factory=Limits)


def cell(name: str, code: str, statuses: Iterable[str] = ("ok",), shows: str = "[]", deadline: float = 5.0) -> Program:
    """A program of one cell."""
    return Program(name, (Cell(code, tuple(statuses), shows, deadline),))


async def play(program: Program, sandbox: Sandbox) -> list[str]:
    """Play ``program`` in a new session; what was not as it has to be, empty if all was."""
    sessions: dict[str, Session] = {ROOT: await sandbox.open(limits=program.limits)}
    wrong: list[str] = []
    try:
        for number, step in enumerate(program.steps):
            if isinstance(step, Open) or step.on in sessions:
                wrong += [f"step {number}: {fault}" for fault in await _take(step, sessions, sandbox)]
    finally:
        for name, session in reversed(sessions.items()):
            wrong += [f"at the end: {fault}" for fault in await _close(name, session)]
    return wrong


async def _take(step: Step, sessions: dict[str, Session], sandbox: Sandbox) -> list[str]:
    match step:
        case Cell():
            return await _run(step, sessions[step.on])
        case Open():
            sessions[step.to] = await sandbox.open()
            return []
        case Fork():
            forked, error = await _attempt(sessions[step.on].fork())
            if forked is not None:
                sessions[step.to] = forked
            end = "forked" if error is None else type(error).__name__
            text = str(error or "")
            good = end in step.ends and step.shows in text and step.never not in text
            return [] if good else [f"fork: {end}: {text[:500]}"]
        case Get():
            content, error = await _attempt(sessions[step.on].get_file(step.path))
            if set(step.never) & _kinds(error):
                return [f"get {step.path}: {type(error).__name__}: {str(error)[:300]}"]
            if error is not None or (step.raises and step.content is None):
                return _expect(f"get {step.path}", error, step.raises)
            return [] if step.content in (None, content) else [f"get {step.path}: {content[:200]!r}"]
        case Put():
            _, error = await _attempt(sessions[step.on].put_file(step.path, step.data))
            return _expect(f"put {step.path}", error, step.raises)
        case Close():
            return await _close_during(step, sessions.pop(step.on))


async def _run(step: Cell, session: Session) -> list[str]:
    result, error = await _attempt(session.exec(step.code, step.deadline))
    if error is not None or step.raises:
        return _expect("cell", error, step.raises)
    good = str(result.status) in step.statuses and step.shows in str(result) and step.kept in (None, result.state_kept)
    return [] if good else [f"cell: {result.status}, state_kept={result.state_kept}: {str(result)[-1500:]}"]


async def _close_during(step: Close, session: Session) -> list[str]:
    if not step.cell:
        return await _close(step.on, session)
    running = asyncio.create_task(_attempt(session.exec(step.cell, 60.0)))
    await asyncio.sleep(0.1)
    wrong = await _close(step.on, session)
    _, error = await running
    return wrong + _expect("a cell of a session that was closed", error, ("SandboxError",))


async def _close(name: str, session: Session) -> list[str]:
    began = time.monotonic()
    _, error = await _attempt(session.close())
    seconds = time.monotonic() - began
    if error is not None or seconds > _CLOSE_SECONDS:
        return [f"close of {name}: {error!r} after {seconds:.1f} s"]
    return []


async def _attempt(call: Awaitable[Any]) -> tuple[Any, Exception | None]:
    try:
        return await call, None
    except Exception as error:
        return None, error


def _expect(what: str, error: Exception | None, raises: tuple[str, ...]) -> list[str]:
    if (error is None) == (not raises) and (error is None or set(raises) & _kinds(error)):
        return []
    return [f"{what}: {str(error)[:300]!r} ({type(error).__name__}) instead of {' or '.join(raises) or 'success'}"]


def _kinds(error: Exception | None) -> set[str]:
    return set() if error is None else {kind.__name__ for kind in type(error).__mro__}
