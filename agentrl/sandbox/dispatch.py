"""The server's half of ``calls``: runs one client's calls on a sandbox, each of them once."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from agentrl.errors import SandboxError, UserError
from agentrl.sandbox import calls, wire
from agentrl.sandbox.base import Sandbox, Session
from agentrl.sandbox.calls import Reply, take
from agentrl.sandbox.ledger import Ledger, Quota

Deliver = Callable[[Reply], None]
"""Takes the answer to a call; called once, from the event loop."""

_UNKNOWN_SESSION = (
    "the sandbox server does not know this session: it was restarted, or it closed the session because its client had "
    "been silent for too long. Open another one."
)
_NOT_AGAIN = (
    "the answer to this call is no longer kept, and a call is never run twice. Close the session and open another one."
)
_CANCELLED = "this call was cancelled, or its client has left."


@dataclass(slots=True)
class _Running:
    task: asyncio.Task[None]
    waiting: list[Deliver]


def print_failure(error: BaseException) -> None:
    """Show a fault of the server itself where its operator looks: on stderr."""
    traceback.print_exception(error, file=sys.stderr)


class Dispatcher:
    """Runs the calls of one client on ``sandbox``. Belongs to one event loop.

    Args:
        sandbox: shared with other clients or not; never closed here.
        quota: what this client may use.
        idle_seconds: told to the client with ``ping``, so that it can show in time that it lives; default: no limit.
        report: is told of errors that are faults of the server; the client gets a ``SandboxError`` then.

    Attributes:
        last_call: ``time.monotonic()`` of the latest request.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        quota: Quota | None = None,
        *,
        idle_seconds: float | None = None,
        report: Callable[[BaseException], None] = print_failure,
    ) -> None:
        self._sandbox, self._quota, self._idle_seconds, self._report = sandbox, quota or Quota(), idle_seconds, report
        self._ledger = Ledger(self._quota)
        self._running: dict[int, _Running] = {}
        self._sessions: dict[str, Session] = {}
        self._opening = 0
        self._closed = False
        self.last_call = time.monotonic()

    @property
    def busy(self) -> int:
        """Number of calls that are running."""
        return len(self._running)

    @property
    def sessions(self) -> int:
        """Number of live sessions."""
        return len(self._sessions)

    def submit(self, head: dict[str, Any], body: bytes, deliver: Deliver) -> None:
        """Run a call, or find that it ran or is running, and hand its answer to ``deliver``, at once or later.

        Raises:
            ProtocolError: this is no request at all, so that there is nothing to answer to.
        """
        number = take(head, "id", int)
        self.last_call = time.monotonic()
        if head.get("v") != calls.VERSION:
            deliver(_failed(number, UserError(_other_version(head.get("v")))))
            return
        self._ledger.settle(take(head, "settled", int))
        self._ledger.trim()
        if number in self._running:
            self._running[number].waiting.append(deliver)
        elif (reply := self._ledger.answer(number)) is not None:
            deliver(reply)
        elif (problem := self._refusal(number)) is not None:
            deliver(_failed(number, SandboxError(problem)))
        else:
            task = asyncio.get_running_loop().create_task(self._run(number, head, body))
            self._running[number] = _Running(task, [deliver])

    async def call(self, head: dict[str, Any], body: bytes) -> Reply:
        """The answer to a request. Cancelling this does not cancel the call: its client may ask again.

        Raises:
            ProtocolError: this is no request.
        """
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.submit(head, body, lambda reply: None if answer.done() else answer.set_result(reply))
        return await answer

    async def close(self) -> None:
        """Stop every call and close every session of this client. Safe to call twice."""
        self._closed = True
        await self._end_all()

    def _refusal(self, number: int) -> str | None:
        if self._closed:
            return "the sandbox server is shutting down."
        if self._ledger.is_over(number):
            return _NOT_AGAIN
        if len(self._running) >= self._quota.calls:
            return f"this client has {self._quota.calls} calls running; raise --max-calls on the server."
        return None

    async def _run(self, number: int, head: dict[str, Any], body: bytes) -> None:
        op = head.get("op")
        try:
            operation = _OPERATIONS.get(op) if isinstance(op, str) else None
            if operation is None:
                raise wire.ProtocolError(f"unknown op {str(op)[:80]!r}; known: {', '.join(_OPERATIONS)}")
            answer, content = await operation(self, number, head, body)
            reply = answer | {"id": number}, content
        except asyncio.CancelledError:  # only by ``cancel`` and ``close``, which wait for the answer
            reply = _failed(number, SandboxError(_CANCELLED))
        except wire.ProtocolError as error:
            reply = _failed(number, SandboxError(f"malformed sandbox call: {error}"))
        except Exception as error:
            written = calls.write_error(error, files=op in ("put", "get"))
            if written is None:
                self._report(error)
                failure = SandboxError(f"the sandbox server failed: {type(error).__name__}: {error}")
                written = calls.write_error(failure) or {}
            reply = written | {"id": number}, b""
        self._settle(number, reply)

    def _settle(self, number: int, reply: Reply) -> None:
        running = self._running.pop(number)
        self._ledger.keep(number, reply)
        for deliver in running.waiting:
            deliver(reply)

    async def _open(self, _number: int, head: dict[str, Any], _body: bytes) -> Reply:
        profile, seed = take(head, "profile", str, type(None)), take(head, "seed", int)
        limits = calls.read_limits(head.get("limits"))
        return await self._add(partial(self._sandbox.open, profile, seed=seed, limits=limits))

    async def _fork(self, _number: int, head: dict[str, Any], _body: bytes) -> Reply:
        session, branch = self._session(head), take(head, "branch", int, type(None))
        return await self._add(partial(session.fork, take(head, "rng", str), branch=branch))

    async def _add(self, start: Callable[[], Awaitable[Session]]) -> Reply:
        if len(self._sessions) + self._opening >= self._quota.sessions:
            raise SandboxError(
                f"this client has {self._quota.sessions} live sessions, as many as the server allows: "
                "close some, or raise --max-sessions on the server."
            )
        self._opening += 1
        try:
            session = await start()
        finally:
            self._opening -= 1
        handle = secrets.token_hex(16)
        self._sessions[handle] = session
        return calls.write_session(handle, session), b""

    async def _exec(self, _number: int, head: dict[str, Any], body: bytes) -> Reply:
        session, deadline = self._session(head), take(head, "deadline", int, float)
        try:
            code = body.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise wire.ProtocolError(f"source that is not UTF-8: {error}") from error
        return calls.write_result(await session.exec(code, deadline))

    async def _put(self, _number: int, head: dict[str, Any], body: bytes) -> Reply:
        await self._session(head).put_file(take(head, "path", str), body)
        return {}, b""

    async def _get(self, _number: int, head: dict[str, Any], _body: bytes) -> Reply:
        return {}, await self._session(head).get_file(take(head, "path", str))

    async def _close(self, _number: int, head: dict[str, Any], _body: bytes) -> Reply:
        session = self._sessions.pop(take(head, "session", str), None)
        if session is not None:
            await session.close()
        return {}, b""

    async def _cancel(self, number: int, head: dict[str, Any], _body: bytes) -> Reply:
        other = take(head, "call", int)
        if other == number:
            raise wire.ProtocolError("a call that cancels itself")
        if other in self._running:
            await self._stop([other])
        made, _ = self._ledger.answer(other) or ({}, b"")
        self._ledger.forget(other)
        session = self._sessions.pop(made.get("session", ""), None)
        if session is not None:
            await session.close()
        return {}, b""

    async def _leave(self, number: int, _head: dict[str, Any], _body: bytes) -> Reply:
        await self._end_all(but=number)
        return {}, b""

    async def _ping(self, _number: int, _head: dict[str, Any], _body: bytes) -> Reply:
        return {"idle_seconds": self._idle_seconds}, b""

    def _session(self, head: dict[str, Any]) -> Session:
        session = self._sessions.get(take(head, "session", str))
        if session is None:
            raise SandboxError(_UNKNOWN_SESSION)
        return session

    async def _stop(self, numbers: list[int]) -> None:
        """Cancel calls and wait until they have ended."""
        tasks = [self._running[number].task for number in numbers]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for number in numbers:
            if number in self._running:  # cancelled before its first step
                self._settle(number, _failed(number, SandboxError(_CANCELLED)))

    async def _end_all(self, but: int | None = None) -> None:
        await self._stop([number for number in self._running if number != but])
        sessions, self._sessions = list(self._sessions.values()), {}
        for result in await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True):
            if isinstance(result, Exception):
                self._report(result)


def _failed(number: int, error: Exception) -> Reply:
    return (calls.write_error(error) or {}) | {"id": number}, b""


def _other_version(version: Any) -> str:
    return (
        f"the sandbox server speaks version {calls.VERSION} of the protocol and this client "
        f"version {str(version)[:20]}: install the same agentrl on both sides."
    )


_OPERATIONS: dict[str, Callable[[Dispatcher, int, dict[str, Any], bytes], Awaitable[Reply]]] = {
    "open": Dispatcher._open,
    "exec": Dispatcher._exec,
    "put": Dispatcher._put,
    "get": Dispatcher._get,
    "fork": Dispatcher._fork,
    "close": Dispatcher._close,
    "cancel": Dispatcher._cancel,
    "leave": Dispatcher._leave,
    "ping": Dispatcher._ping,
}
