"""A sandbox in memory for tests of what carries calls; its programs are words, not Python.

``wait`` waits until the session is closed or ``release`` is set, ``raise NAME`` raises the prepared error of that name,
``lose`` ends the session, ``sleep`` yields once, anything else is its own output.
"""

from __future__ import annotations

import asyncio
import errno
from typing import Any

from agentrl.errors import ForkRefused, SandboxError, SessionClosed, SessionFrozen, UnknownName
from agentrl.sandbox.base import ExecResult, ExecStatus, check_deadline, check_fork, check_seed, scratch_path
from agentrl.types import ForkLevel


class FakeSandbox:
    fork_level = ForkLevel.SNAPSHOT

    def __init__(self, **errors: Exception) -> None:
        self.errors = errors
        self.live: list[FakeSession] = []
        self.ran: list[str] = []
        self.release = asyncio.Event()
        self.opened: list[tuple[Any, ...]] = []
        self.slow_open = False
        self.closed = False

    async def open(self, profile=None, *, seed=0, limits=None):
        check_seed(seed)
        if profile not in (None, "python"):
            raise UnknownName("sandbox profile", str(profile), ["python"])
        self.opened.append((profile, seed, limits))
        if self.slow_open:
            await self.release.wait()
        return FakeSession(self, seed, "seeded")

    async def close(self):
        self.closed = True
        for session in tuple(self.live):
            await session.close()


class FakeSession:
    def __init__(self, sandbox, seed, rng):
        self.sandbox, self.seed, self.rng = sandbox, seed, rng
        self.files: dict[str, bytes] = {}
        self.forks = 0
        self.frozen = self.closed = self.lost = self.cancelled = False
        self.end = asyncio.Event()
        sandbox.live.append(self)

    def _check(self, *, frozen=False):
        if self.closed:
            raise SessionClosed("this session is closed: open another one.")
        if self.cancelled:
            raise SandboxError("this session has failed (a call on it was cancelled): close it and open another one.")
        if self.frozen and not frozen:
            raise SessionFrozen("this session has been forked.")

    async def exec(self, code, deadline=5.0):
        check_deadline(deadline)
        self._check()
        self.sandbox.ran.append(code)
        word, _, name = code.partition(" ")
        if self.lost or word == "lose":
            self.lost = True
            return ExecResult(ExecStatus.KILLED, "", "Killed: lost", False, 0.25)
        if word == "raise":
            raise self.sandbox.errors[name]
        if word == "wait":
            await self._wait()
        elif word == "sleep":
            await asyncio.sleep(0)
        return ExecResult(ExecStatus.OK, code, None, True, 0.5)

    async def _wait(self):
        try:
            waits = [asyncio.ensure_future(event.wait()) for event in (self.sandbox.release, self.end)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.end.is_set():
            raise SandboxError("sandbox: the session is gone: it was closed meanwhile.")

    async def fork(self, rng="inherit", *, branch=None):
        check_fork(rng, branch)
        if self.lost:
            raise SessionClosed("its program has ended it.")
        self._check(frozen=True)
        if "threads" in self.files:
            raise ForkRefused("it cannot be forked", ["a thread", "a child"])
        child = FakeSession(self.sandbox, self.seed + (self.forks if branch is None else branch), rng)
        child.files = dict(self.files)
        self.forks, self.frozen = self.forks + 1, True
        return child

    async def put_file(self, path, data):
        self._check()
        if path.endswith("full"):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        self.files[scratch_path(path)] = data

    async def get_file(self, path):
        self._check()
        try:
            return self.files[scratch_path(path)]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path) from None

    async def close(self):
        if not self.closed:
            self.closed = True
            self.sandbox.live.remove(self)
            self.end.set()
