"""Where hostile programs are played: a sandbox, a quiet session beside them, and a look around after each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from agentrl.errors import SandboxError
from agentrl.sandbox import session
from agentrl.sandbox.base import Sandbox, Session

from . import PROGRAMS
from .leftovers import difference, footprint, grown, resident
from .steps import play

_SECONDS = 50.0
_QUIET_SECONDS = 2.0


def shorten_waits() -> None:
    """Let the manager wait less for programs that never answer: each would cost seconds."""
    session.GRACE_SECONDS, session.FILE_SECONDS, session.FORK_SECONDS = 0.4, 1.0, 1.5


class Stage:
    """Plays programs in one sandbox.

    Args:
        sandbox: theirs; closed at the end.
        more: what else the backend may leave behind.
    """

    def __init__(self, sandbox: Sandbox, more: Callable[[], list[str]] = list) -> None:
        self._sandbox, self._more = sandbox, more
        self._quiet: Session | None = None

    async def __aenter__(self) -> Self:
        self._first = footprint(self._more)
        await self._settle()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._sandbox.close()

    async def play(self, name: str) -> list[str]:
        """Play a program; what was not as it has to be, with it and around it."""
        wrong = await self._perform(name)
        wrong += await difference(self._between, self._more) + grown(self._memory)
        if wrong:
            await self._settle()  # so that the next program is judged by what it does itself
        return wrong

    async def finish(self) -> list[str]:
        """Close the sandbox; what is left over, in the end."""
        await self._sandbox.close()
        return await difference(self._first, self._more)

    async def _perform(self, name: str) -> list[str]:
        try:
            async with asyncio.timeout(_SECONDS):
                wrong = await play(PROGRAMS[name], self._sandbox)
        except (SandboxError, TimeoutError) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        return wrong + await self._disturbed()

    async def _settle(self) -> None:
        if self._quiet is not None:
            await self._quiet.close()
        self._quiet = await self._sandbox.open()
        await self._quiet.exec("x = 6")
        await (await self._sandbox.open()).close()
        self._between, self._memory = footprint(self._more), resident()

    async def _disturbed(self) -> list[str]:
        assert self._quiet is not None
        began = time.monotonic()
        try:
            result: object = str(await self._quiet.exec("x * 7", 10.0))
        except SandboxError as error:
            result = error
        seconds = time.monotonic() - began
        if result == "42" and seconds < _QUIET_SECONDS:
            return []
        return [f"another session was disturbed: {result} after {seconds:.1f} s"]


class Crowd(Stage):
    """Plays several programs at a time, where each takes long to set up; looks around only when all is over.

    Args:
        sandbox: theirs; closed at the end.
        names: all programs that will be asked for.
        more: what else the backend may leave behind.
        width: how many at a time.
    """

    def __init__(self, sandbox: Sandbox, names: Iterable[str], more: Callable[[], list[str]], width: int = 6) -> None:
        super().__init__(sandbox, more)
        self._names, self._places = list(names), asyncio.Semaphore(width)
        self._tasks: dict[str, asyncio.Task[list[str]]] = {}

    async def play(self, name: str) -> list[str]:
        """Wait for a program; the first call starts them all."""
        if not self._tasks:
            self._tasks = {name: asyncio.create_task(self._play(name)) for name in self._names}
        return await self._tasks[name]

    async def _play(self, name: str) -> list[str]:
        async with self._places:
            return await self._perform(name)
