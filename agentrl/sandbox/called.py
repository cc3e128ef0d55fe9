"""The client's half of ``calls``: a sandbox and sessions that run wherever their transport leads."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any, Literal

from agentrl.errors import SandboxError, SessionClosed, UserError
from agentrl.sandbox import calls, wire
from agentrl.sandbox.base import (
    FILE_BYTES,
    ExecResult,
    ExecStatus,
    Limits,
    Profile,
    Rng,
    check_deadline,
    check_fork,
    check_seed,
    scratch_path,
)
from agentrl.sandbox.calls import Lost, Reply, Transport
from agentrl.sandbox.one_loop import OneLoop
from agentrl.types import ForkLevel

OPEN_SECONDS = 90.0
EXEC_GRACE_SECONDS = 15.0
"""How much longer than a cell's deadline its answer may take: the backend's own grace, and the way."""
FILE_SECONDS = 45.0
FORK_SECONDS = 45.0
CLOSE_SECONDS = 20.0
PING_SECONDS = 10.0
_PATH_CHARS = 4096  # as in Linux


class CalledSandbox(OneLoop):
    """Opens sessions through ``transport``; an async context manager, bound to the event loop that first uses it.

    Args:
        transport: leads to a ``Dispatcher``; closed with this.
        profile: name of the profile of its sessions; default that of the sandbox at the other end.
    """

    fork_level = ForkLevel.SNAPSHOT

    def __init__(self, transport: Transport, *, profile: str | None = None) -> None:
        _check_profile(profile)
        self._transport, self._profile = transport, profile
        self._numbers = itertools.count(1)
        self._pending: OrderedDict[int, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it was closed, and every session with it."""
        return self._closed

    async def open(
        self, profile: str | Profile | None = None, *, seed: int = 0, limits: Limits | None = None
    ) -> CalledSession:
        """A new session; see ``agentrl.sandbox.base.Sandbox.open``.

        Raises:
            UserError: the profile is a record, the other side does not let this client in, or the sandbox belongs to
                another event loop.
        """
        check_seed(seed)
        self._check_loop()
        name = _check_profile(profile) or self._profile
        arguments: dict[str, Any] = {"profile": name, "seed": seed, "limits": calls.write_limits(limits)}
        head, _ = await self.call("open", OPEN_SECONDS, **arguments)
        return self._session(head)

    async def close(self) -> None:
        """Close every session and the transport. Safe to call twice.

        A server that cannot be reached any more is no error: it closes the sessions by itself once it misses their
        client.
        """
        if self._closed:
            return
        self._check_loop()
        self._closed = True
        try:
            with contextlib.suppress(SandboxError, UserError):
                await self.call("leave", CLOSE_SECONDS)
        finally:
            tasks = tuple(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._transport.close()

    async def call(self, op: str, seconds: float, body: bytes = b"", **arguments: Any) -> Reply:
        """The answer to one call of the protocol. One that is cancelled or lost is also undone at the other end.

        Raises:
            Exception: what the sandbox raised there; ``SandboxError`` where the way there is broken.
        """
        if self._closed and op != "leave":
            raise SandboxError(f"this {type(self).__name__} is closed: make another one.")
        number = next(self._numbers)
        self._pending[number] = None
        head = {"v": calls.VERSION, "id": number, "settled": next(iter(self._pending)), "op": op, **arguments}
        undo = False
        try:
            reply = await self._transport.call(head, body, seconds)
            if "error" in reply[0]:
                raise calls.read_error(reply[0])
        except wire.ProtocolError as error:
            raise Lost(f"the sandbox server sent a malformed answer: {error}.") from error
        except asyncio.CancelledError:
            undo = op not in _NOT_UNDONE
            raise
        except Lost:
            undo = op in ("open", "fork")
            raise
        finally:
            if undo and not self._closed:
                self._own(self._undo(number))
            else:
                del self._pending[number]
        return reply

    async def _undo(self, number: int) -> None:
        try:
            with contextlib.suppress(SandboxError, UserError):  # of a server out of reach nothing can be asked
                await self.call("cancel", CLOSE_SECONDS, call=number)
        finally:
            self._pending.pop(number, None)

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` in the background until ``close``."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _session(self, head: dict[str, Any]) -> CalledSession:
        try:
            return CalledSession(self, *calls.read_session(head))
        except wire.ProtocolError as error:
            raise Lost(f"the sandbox server sent a malformed answer: {error}.") from error


class CalledSession:
    """A session at the other end; see ``agentrl.sandbox.base.Session`` for its methods."""

    def __init__(self, sandbox: CalledSandbox, handle: str, seed: int, rng: Literal["seeded"] | Rng) -> None:
        self._sandbox, self._handle = sandbox, handle
        self.seed, self.rng = seed, rng
        self._lock = asyncio.Lock()
        self._failed: str | None = None  # why nothing is known about it any more
        self._closed = False

    async def exec(self, code: str, deadline: float = 5.0) -> ExecResult:
        """Run one cell; see ``Session.exec``."""
        check_deadline(deadline)
        source = code.encode("utf-8", "surrogatepass")
        if len(source) > calls.MAX_BODY:  # below that, the backend answers
            self._check_usable()
            error = f"ValueError: the cell is {len(source)} bytes long; at most {calls.MAX_BODY} can be sent"
            return ExecResult(ExecStatus.ERROR, "", error, True, 0.0)
        head, body = await self._call("exec", deadline + EXEC_GRACE_SECONDS, source, deadline=float(deadline))
        try:
            return calls.read_result(head, body)
        except wire.ProtocolError as problem:
            self._failed = f"the sandbox server sent a malformed answer: {problem}"
            raise SandboxError(f"{self._failed}.") from problem

    async def fork(self, rng: Rng = "inherit", *, branch: int | None = None) -> CalledSession:
        """A session in the same state; see ``Session.fork``."""
        check_fork(rng, branch)
        head, _ = await self._call("fork", FORK_SECONDS, rng=rng, branch=branch)
        return self._sandbox._session(head)

    async def put_file(self, path: str, data: bytes) -> None:
        """Write a file; see ``Session.put_file``."""
        if len(data) > FILE_BYTES:
            raise UserError(f"{path!r} is {len(data)} bytes; put_file takes at most {FILE_BYTES}. Send it in parts.")
        await self._call("put", FILE_SECONDS, data, path=_sendable(scratch_path(path)))

    async def get_file(self, path: str) -> bytes:
        """Read a file; see ``Session.get_file``."""
        return (await self._call("get", FILE_SECONDS, path=_sendable(scratch_path(path))))[1]

    async def close(self) -> None:
        """End the session; returns when its processes are gone. Safe to call twice.

        Raises:
            SandboxError: the server cannot be reached. It ends the session by itself once it misses its client.
        """
        if self._closed or self._sandbox.closed:
            return
        self._closed = True
        try:
            await self._sandbox.call("close", CLOSE_SECONDS, session=self._handle)
        except SandboxError:
            if self._failed is None:
                raise

    async def _call(self, op: str, seconds: float, body: bytes = b"", **arguments: Any) -> Reply:
        async with self._lock:
            self._check_usable()
            try:
                return await self._sandbox.call(op, seconds, body, session=self._handle, **arguments)
            except Lost as error:
                self._failed = str(error).rstrip(".")
                raise
            except asyncio.CancelledError:
                self._failed = "a call on it was cancelled"
                raise

    def _check_usable(self) -> None:
        if self._closed or self._sandbox.closed:
            raise SessionClosed("this session is closed: open another one.")
        if self._failed is not None:
            raise SandboxError(f"this session has failed ({self._failed}): close it and open another one.")


_NOT_UNDONE = ("close", "cancel", "leave", "ping")


def _check_profile(profile: str | Profile | None) -> str | None:
    if isinstance(profile, Profile):
        raise UserError(
            f"profile {profile.name!r} is a record, which only a sandbox in this process takes: give the name of a "
            "profile that the sandbox server has, as in open('python')."
        )
    return profile


def _sendable(path: str) -> str:
    """Raises the file system's own error for a path that no file system takes."""
    if len(path) > _PATH_CHARS:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
    return path
