"""The embedded backend: sessions forked from a zygote on this machine. Linux only, no daemon, no root needed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Self

from agentrl.errors import ConfigError, IsolationUnavailable, SandboxError, UserError
from agentrl.sandbox import probe
from agentrl.sandbox.base import Limits
from agentrl.sandbox.launcher import PRELOAD, ZygoteHandle
from agentrl.sandbox.session import Channel, LocalSession

_OPEN_SECONDS = 20.0
_MOST_STARTING = 16
_DEFAULT_LIMITS = Limits()


class LocalSandbox:
    """Opens sessions on this machine; bound to the event loop that first uses it.

    The zygote starts with the first session. Its isolation is then tried out by a hostile program (``probe``), once
    per process.

    Args:
        packages: installed packages that sessions may import besides the standard library; default numpy.
        preload: modules loaded ahead, so that importing them costs a session nothing.

    Example:
        ```python
        async with LocalSandbox() as sandbox:
            session = await sandbox.open(seed=1)
            result = await session.exec("1 + 1")
        ```
    """

    def __init__(self, *, packages: Sequence[str] = ("numpy",), preload: Iterable[str] = PRELOAD) -> None:
        self._packages, self._preload = tuple(packages), tuple(preload)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._zygote: ZygoteHandle | None = None
        self._sessions: set[LocalSession] = set()
        self._starting = asyncio.Lock()
        self._places = asyncio.Semaphore(_MOST_STARTING)
        self._closed = False

    async def open(self, *, seed: int = 0, limits: Limits = _DEFAULT_LIMITS) -> LocalSession:
        """A new session: a fresh interpreter, empty /work and /tmp, module-level random numbers from ``seed``.

        Raises:
            IsolationUnavailable: this machine cannot isolate a session; lists what is missing.
            SandboxError: the session could not be started, or this manager is closed.
            UserError: the manager belongs to another event loop.
            ConfigError: the seed is not an integer.
        """
        if not isinstance(seed, int):
            raise ConfigError(f"a sandbox seed is an integer, got {seed!r}.")
        self._check_loop()
        async with self._starting:
            zygote = await self._running()
        return await self._open(zygote, seed, limits)

    async def close(self) -> None:
        """Close every session and stop the zygote; returns when no process is left. Safe to call twice."""
        self._check_loop()
        self._closed = True
        async with self._starting:
            zygote, self._zygote = self._zygote, None
            if zygote is not None:
                await zygote.stop()
            for session in tuple(self._sessions):
                await session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise UserError(
                "this LocalSandbox belongs to the event loop that first used it and cannot serve another one; "
                "make one LocalSandbox per event loop."
            )

    async def _running(self) -> ZygoteHandle:
        """The zygote: the one there is, or a new one if there is none or it has died."""
        if self._closed:
            raise SandboxError("this LocalSandbox is closed: make another one.")
        if self._zygote is not None and not self._zygote.alive:
            dead, self._zygote = self._zygote, None
            await dead.stop()
        if self._zygote is None:
            zygote = await ZygoteHandle.start(self._packages, self._preload)
            try:
                await self._probe(zygote)
            except BaseException:
                await zygote.stop()
                raise
            self._zygote = zygote
        return self._zygote

    async def _probe(self, zygote: ZygoteHandle) -> None:
        if probe.passed():
            return
        session = await self._open(zygote, 0, probe.LIMITS)
        try:
            missing = await probe.audit(session)
        finally:
            await session.close()
        if missing:
            raise IsolationUnavailable(missing)

    async def _open(self, zygote: ZygoteHandle, seed: int, limits: Limits) -> LocalSession:
        async with self._places:
            try:
                ours, theirs = socket.socketpair()
            except OSError as error:
                raise SandboxError(f"no descriptors left for a session ({error}); raise `ulimit -n`.") from error
            ours.setblocking(False)
            channel = Channel(ours)
            try:
                with theirs:
                    zygote.open(theirs, {"seed": seed, "limits": asdict(limits)})
                session = LocalSession(
                    channel, limits, lambda: None if zygote.alive else "the sandbox's zygote is gone"
                )
                async with asyncio.timeout(_OPEN_SECONDS):
                    await session.ready()
            except TimeoutError as error:
                channel.close()
                raise SandboxError(f"a session did not start within {_OPEN_SECONDS:g} s.") from error
            except BaseException:
                channel.close()
                raise
        self._sessions.add(session)
        session.on_close = lambda: self._sessions.discard(session)
        return session
