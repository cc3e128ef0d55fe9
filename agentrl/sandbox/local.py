"""The embedded backend: sessions forked from a zygote on this machine. Linux only, no daemon, no root needed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import socket
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from agentrl.errors import IsolationUnavailable, SandboxError
from agentrl.sandbox import probe
from agentrl.sandbox import profile as profiles
from agentrl.sandbox.base import SCRATCH, Limits, Profile, check_seed
from agentrl.sandbox.cgroup import Group, MemoryGroups
from agentrl.sandbox.channel import Channel
from agentrl.sandbox.launcher import Hearer, ZygoteHandle
from agentrl.sandbox.one_loop import OneLoop
from agentrl.sandbox.session import LocalSession
from agentrl.types import ForkLevel

_OPEN_SECONDS = 20.0
_MOST_STARTING = 16


class LocalSandbox(OneLoop):
    """Opens sessions on this machine; bound to the event loop that first uses it.

    There is one zygote per profile, with the profile's packages imported; it starts with the profile's first session.
    Its isolation is then tried out by a hostile program (``probe``), once per process.

    Args:
        profile: what ``open`` opens by default.

    Example:
        ```python
        async with LocalSandbox() as sandbox:
            session = await sandbox.open(seed=1)
            result = await session.exec("1 + 1")
            branch = await session.fork()
        ```
    """

    fork_level = ForkLevel.SNAPSHOT

    def __init__(self, profile: str | Profile = profiles.DEFAULT) -> None:
        self._profile = profile
        self._zygotes: dict[Profile, ZygoteHandle] = {}
        self._sessions: set[LocalSession] = set()
        self._names = itertools.count(1)
        self._groups: MemoryGroups | None = None
        self._starting = asyncio.Lock()
        self._places = asyncio.Semaphore(_MOST_STARTING)
        self._closed = False

    async def open(
        self, profile: str | Profile | None = None, *, seed: int = 0, limits: Limits | None = None
    ) -> LocalSession:
        """A new session: a fresh interpreter, empty /work and /tmp, module-level random numbers from ``seed``.

        Raises:
            UnknownName: no such profile.
            ConfigError: a package of the profile is not installed, or the seed is not an integer.
            IsolationUnavailable: this machine cannot isolate a session; lists what is missing.
            SandboxError: the session could not be started, or this manager is closed.
            UserError: the manager belongs to another event loop.
        """
        check_seed(seed)
        chosen = profiles.resolve(profile, self._profile)
        self._check_loop()
        async with self._starting:
            zygote = await self._running(chosen)
        return await self._open(zygote, seed, limits or chosen.limits)

    async def close(self) -> None:
        """Close every session and stop the zygotes; returns when no process is left. Safe to call twice."""
        self._check_loop()
        self._closed = True
        async with self._starting:
            zygotes, self._zygotes = self._zygotes, {}
            for zygote in zygotes.values():
                await zygote.stop()
            for session in tuple(self._sessions):
                await session.close()
            if self._groups is not None:
                self._groups.close()

    async def _running(self, profile: Profile) -> ZygoteHandle:
        """The profile's zygote: the one there is, or a new one if there is none or it has died."""
        if self._closed:
            raise SandboxError("this LocalSandbox is closed: make another one.")
        zygote = self._zygotes.get(profile)
        if zygote is not None and not zygote.alive:
            await self._zygotes.pop(profile).stop()
            zygote = None
        if zygote is None:
            if not self._zygotes and self._groups is None:
                with contextlib.suppress(OSError):  # then the zygote watches; `agentrl doctor` says so
                    self._groups = MemoryGroups.find()
            zygote = await ZygoteHandle.start(profile.packages, profile.preload, watching=self._groups is None)
            try:
                await self._probe(zygote)
            except BaseException:
                await zygote.stop()
                raise
            self._zygotes[profile] = zygote
        return zygote

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
            manager = _Manager(self, zygote)
            session = LocalSession(manager, limits, seed)
            try:
                session.connect({"op": "open", "seed": seed, "limits": asdict(limits)})
                async with asyncio.timeout(_OPEN_SECONDS):
                    await session.ready()
            except TimeoutError as error:
                session.abandon()
                raise SandboxError(f"a session did not start within {_OPEN_SECONDS:g} s.") from error
            except BaseException:
                session.abandon()
                raise
        manager.adopt(session)
        return session


def _hint(error: OSError) -> str:
    return " Raise `ulimit -n`." if error.errno in (errno.EMFILE, errno.ENFILE) else ""


class _Manager:
    """What the sessions of one zygote share; see ``agentrl.sandbox.session.Owner``."""

    def __init__(self, sandbox: LocalSandbox, zygote: ZygoteHandle) -> None:
        self._sandbox, self._zygote = sandbox, zygote

    def backend_failed(self) -> str | None:
        return None if self._zygote.alive else "the sandbox's zygote is gone"

    def adopt(self, session: LocalSession) -> None:
        self._sandbox._sessions.add(session)

    def forget(self, session: LocalSession) -> None:
        self._sandbox._sessions.discard(session)

    def next_name(self) -> int:
        return next(self._sandbox._names)

    def group(self, limits: Limits) -> Group | None:
        if self._sandbox._groups is None:
            return None
        try:
            return self._sandbox._groups.make(limits.memory_bytes + len(SCRATCH) * limits.scratch_bytes)
        except OSError as error:
            raise SandboxError(f"a session cannot have a memory cgroup ({error}).{_hint(error)}") from error

    def ask(self, request: Mapping[str, Any], hearer: Hearer) -> Channel:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise SandboxError(f"a session cannot have a socket ({error}).{_hint(error)}") from error
        ours.setblocking(False)
        channel = Channel(ours)
        try:
            with theirs:
                self._zygote.ask(theirs, request, hearer)
        except BaseException:
            channel.close()
            raise
        return channel
