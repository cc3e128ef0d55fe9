"""One session as the manager sees it: a socket, a lock, and what is known about the process behind it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import time
from typing import Any, Literal, Protocol

from agentrl.errors import ForkRefused, IsolationUnavailable, SandboxError, SessionClosed, SessionFrozen, UserError
from agentrl.sandbox import probe, wire
from agentrl.sandbox.base import (
    CODE_BYTES,
    FILE_BYTES,
    OUTPUT_BYTES,
    ExecResult,
    ExecStatus,
    Limits,
    Rng,
    check_deadline,
    check_fork,
    scratch_path,
)
from agentrl.seeds import derive_seed

GRACE_SECONDS = 1.0
"""Time between the interrupt at a cell's deadline and the kill."""
FILE_SECONDS = 20.0
CLOSE_SECONDS = 10.0
FORK_SECONDS = 20.0
_TOO_DEEP = (errno.ENOSPC, errno.EUSERS)
_DEPTH = "it is a fork of a fork of ...: the kernel nests namespaces 32 deep"
_CPU_TICKS = 0.1  # how finely the kernel measures before it enforces RLIMIT_CPU
_CHUNK_BYTES = 256 * 1024
_GONE = "variables and files are lost"
_REPORTED = {ExecStatus.OK, ExecStatus.ERROR, ExecStatus.TIMEOUT, ExecStatus.MEMORY}


class Ended(Exception):
    """The process behind the socket is gone by its program's doing; the message says how."""

    def __init__(self, how: str, status: ExecStatus = ExecStatus.KILLED) -> None:
        super().__init__(how)
        self.status = status


class Channel:
    """Frames over a non-blocking socket. One reader and one writer at a time; a cancelled read loses nothing."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._buffer = sock, bytearray()
        self._loop = asyncio.get_running_loop()
        self._ended = self._paused = False
        self._news: asyncio.Future[None] | None = None
        self._loop.add_reader(sock.fileno(), self._arrive)

    async def send(self, data: bytes) -> None:
        """Send all of ``data``; a peer that has gone is noticed by the next ``receive``."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                await self._writable()
            except OSError:
                return

    async def receive(self, max_body: int) -> tuple[dict[str, Any], bytes]:
        """The next frame.

        Raises:
            ProtocolError: what came is not a frame, or is above its caps.
            EOFError: the other side is gone.
        """
        while (frame := self.arrived(max_body)) is None:
            if self._ended:
                raise EOFError
            self._news = self._loop.create_future()
            if self._paused:
                self._paused = False
                self._loop.add_reader(self._socket.fileno(), self._arrive)
            try:
                await self._news
            finally:
                self._news = None
        return frame

    def arrived(self, max_body: int) -> tuple[dict[str, Any], bytes] | None:
        """A frame that is already here, or None.

        Raises:
            ProtocolError: what came is not a frame, or is above its caps.
        """
        buffer, start = self._buffer, wire.HEADER.size
        if len(buffer) < start:
            return None
        head, body = wire.frame_length(buffer, max_body)
        end = start + head + body
        if len(buffer) < end:
            return None
        frame = wire.decode_head(bytes(buffer[start : start + head])), bytes(buffer[start + head : end])
        del buffer[:end]
        return frame

    async def drain(self) -> None:
        """Read and forget until the other side is gone."""
        with contextlib.suppress(EOFError):
            while True:
                self._buffer.clear()
                with contextlib.suppress(wire.ProtocolError):
                    await self.receive(0)

    def hang_up(self) -> None:
        """Tell the zygote that the session is not wanted any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)  # not close: a forked child of ours may hold a copy

    def close(self) -> None:
        """Give the descriptor back; a reader that still waits reads the end."""
        self.hang_up()
        descriptor = self._socket.fileno()
        if descriptor >= 0:
            self._loop.remove_reader(descriptor)
            self._loop.remove_writer(descriptor)
        self._socket.close()
        self._ended = True
        self._wake()

    def _arrive(self) -> None:
        try:
            chunk = self._socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        self._buffer += chunk
        self._ended = not chunk
        self._paused = self._news is None and len(self._buffer) >= _CHUNK_BYTES  # a program that nobody has asked
        if self._ended or self._paused:
            self._loop.remove_reader(self._socket.fileno())
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _writable(self) -> None:
        ready = asyncio.Event()
        descriptor = self._socket.fileno()
        self._loop.add_writer(descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            if self._socket.fileno() == descriptor:  # else it is closed, and the number may be somebody else's
                self._loop.remove_writer(descriptor)


class Owner(Protocol):
    """What a session needs of the manager that opened it."""

    def backend_failed(self) -> str | None:
        """Why no session can be alive any more, or None."""
        ...

    async def start_fork(self, parent: LocalSession, name: int) -> Channel:
        """Ask the zygote to let ``parent`` fork; the channel to the child to be."""
        ...

    def adopt(self, session: LocalSession) -> None:
        """A session has come to life."""
        ...

    def forget(self, session: LocalSession) -> None:
        """A session is gone."""
        ...

    def next_name(self) -> int:
        """A number that no other session has."""
        ...


class LocalSession:
    """A session of a ``LocalSandbox``; see ``agentrl.sandbox.base.Session`` for its methods."""

    def __init__(
        self, owner: Owner, channel: Channel, name: int, limits: Limits, seed: int, parent: LocalSession | None = None
    ) -> None:
        self.name, self.limits, self.seed = name, limits, seed
        self.rng: Literal["seeded"] | Rng = "seeded"
        self._owner, self._channel, self._parent = owner, channel, parent
        self._lock = asyncio.Lock()
        self._number = 0
        self._branches = 0
        self._forks: set[LocalSession] = set()  # those that live
        self._lost: str | None = None  # by the program's own doing: how
        self._failed: str | None = None  # not by the program: why
        self._frozen = self._closed = False

    async def ready(self) -> None:
        """Wait until the walls stand.

        Raises:
            IsolationUnavailable: a mechanism was refused, and no session of this process ever had it.
            SandboxError: the process did not come up.
        """
        head: dict[str, Any] = {}
        try:
            while not (head.get("ready") is True and "pid" in head) and "fatal" not in head:
                head |= (await self._channel.receive(0))[0]  # from the zygote and from the session, in any order
        except (EOFError, wire.ProtocolError) as error:
            raise SandboxError(f"a session did not start: {self._owner.backend_failed() or repr(error)}") from error
        if "fatal" in head and not probe.passed():
            raise IsolationUnavailable([str(head["fatal"])])
        if "fatal" in head:
            raise SandboxError(f"a session did not start; it said {str(head['fatal'])[:200]}.")

    async def exec(self, code: str, deadline: float = 5.0) -> ExecResult:
        """Run one cell; see ``Session.exec``."""
        check_deadline(deadline)
        source = code.encode("utf-8", "surrogatepass")
        async with self._lock:
            began = time.perf_counter()
            self._check_usable()
            if self._lost is not None:
                return self._result(ExecStatus.KILLED, f"the session was lost earlier: {self._lost}", began)
            if len(source) > CODE_BYTES:
                error = f"ValueError: the cell is {len(source)} bytes long; at most {CODE_BYTES} can be run"
                return self._result(ExecStatus.ERROR, error, began)
            request = {"op": "exec", "deadline": float(deadline)}
            try:
                head, output = await self._request(request, source, OUTPUT_BYTES, deadline + GRACE_SECONDS)
                return self._read_result(head, output, began)
            except TimeoutError:
                self._lose(f"a cell ran for more than {deadline:g} s, could not be interrupted and was killed")
                return self._result(ExecStatus.TIMEOUT, f"TimeoutError: {self._lost}; {_GONE}", began)
            except Ended as end:
                self._lose(f"the Python process {end}")
                return self._result(end.status, f"Killed: {self._lost}; {_GONE}", began)

    async def put_file(self, path: str, data: bytes) -> None:
        """Write a file; see ``Session.put_file``."""
        if len(data) > FILE_BYTES:
            raise UserError(f"{path!r} is {len(data)} bytes; put_file takes at most {FILE_BYTES}. Send it in parts.")
        await self._file({"op": "put", "path": scratch_path(path)}, data)

    async def get_file(self, path: str) -> bytes:
        """Read a file; see ``Session.get_file``."""
        return await self._file({"op": "get", "path": scratch_path(path), "cap": FILE_BYTES}, b"")

    async def fork(self, rng: Rng = "inherit", *, branch: int | None = None) -> LocalSession:
        """A session in the same state; see ``Session.fork``."""
        check_fork(rng, branch)
        async with self._lock:
            self._check_usable(frozen=True)
            if self._lost is not None:
                raise SessionClosed(f"the session was lost ({self._lost}), so there is nothing to fork.")
            branch = self._branches if branch is None else branch
            seed = derive_seed(self.seed, "branch", branch) if rng == "derive" else self.seed
            name = self._owner.next_name()
            channel = await self._owner.start_fork(self, name)
            try:
                async with asyncio.timeout(FORK_SECONDS):
                    await self._split({"op": "fork", "rng": rng, "seed": seed}, channel)
            except TimeoutError as error:
                channel.close()
                raise SandboxError(f"a fork did not come up within {FORK_SECONDS:g} s.") from error
            except BaseException:
                channel.close()
                raise
            child = LocalSession(self._owner, channel, name, self.limits, seed, self)
            child.rng = rng
            self._frozen = True
            self._branches += 1
            self._forks.add(child)
            self._owner.adopt(child)
            return child

    async def _split(self, request: dict[str, Any], channel: Channel) -> None:
        """Let the process clone itself and wait for the child."""
        reasons: list[str] = []
        answer: dict[str, Any] = {}
        try:
            answer, _ = await self._request(request, b"", 0, FORK_SECONDS)
        except Ended as end:
            self._lose(f"the Python process {end}")
            raise SessionClosed(f"the session was lost while it was forked: {self._lost}.") from end
        reasons += _texts(answer.get("reasons"))
        head: dict[str, Any] = {}
        with contextlib.suppress(EOFError, wire.ProtocolError):
            while head.get("ready") is not True:
                frame = await channel.receive(0) if answer.get("forked") is True else channel.arrived(0)
                if frame is None:
                    break
                head = frame[0]
                reasons += _texts(head.get("reasons"))
        if reasons:
            raise ForkRefused(f"the session cannot be forked: {'; '.join(reasons)}.", reasons)
        if answer.get("forked") is True and head.get("ready") is True:
            return
        if answer.get("errno") in _TOO_DEEP:
            raise ForkRefused(_DEPTH, [_DEPTH])
        why = self._owner.backend_failed() or answer.get("strerror") or f"the child ended ({str(head)[:100]})"
        raise SandboxError(f"a session could not be forked: {why}.")

    async def close(self) -> None:
        """End the session; returns when its processes are gone, or at once while it has live forks. Safe twice."""
        if self._closed:
            return
        self._closed = True
        if not self._forks:
            await self._end()

    async def _end(self) -> None:
        """End the process, and those of its ancestors that were closed and only lived on for their forks."""
        self._channel.hang_up()
        try:
            async with asyncio.timeout(CLOSE_SECONDS), self._lock:
                await self._channel.drain()
        except TimeoutError as error:
            raise SandboxError(f"a session was killed but its process did not end in {CLOSE_SECONDS:g} s.") from error
        finally:
            self._channel.close()
            self._owner.forget(self)
            parent, self._parent = self._parent, None
            if parent is not None:
                parent._forks.discard(self)
                if parent._closed and not parent._forks:
                    await parent._end()

    async def _file(self, request: dict[str, Any], data: bytes) -> bytes:
        async with self._lock:
            self._check_usable(frozen=request["op"] == "get")
            if self._lost is not None:
                raise FileNotFoundError(
                    errno.ENOENT, f"the session and its files were lost: {self._lost}", request["path"]
                )
            try:
                head, content = await self._request(request, data, FILE_BYTES, FILE_SECONDS)
            except TimeoutError as error:
                self._fail(f"{request['op']} {request['path']} took more than {FILE_SECONDS:g} s")
                raise SandboxError(f"sandbox: {self._failed}; the session was killed.") from error
            except Ended as end:
                self._lose(f"the Python process {end}")
                raise FileNotFoundError(
                    errno.ENOENT, f"the session and its files were lost: {self._lost}", request["path"]
                ) from end
        if "errno" in head:
            code = head["errno"] if isinstance(head["errno"], int) else errno.EIO
            raise OSError(code, _printable(str(head.get("strerror"))), request["path"])
        return content

    async def _request(
        self, request: dict[str, Any], body: bytes, max_body: int, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for its answer.

        Raises:
            TimeoutError: no answer in ``seconds``.
            Ended: the process ended, by the program's doing, or it sent nonsense.
            SandboxError: the zygote is gone.
        """
        self._number += 1
        frame = wire.encode(request | {"id": self._number}, body)
        try:
            try:
                async with asyncio.timeout(seconds):
                    await self._channel.send(frame)
                    head, content = await self._channel.receive(max_body)
            except TimeoutError:
                late = self._channel.arrived(max_body)  # our own loop may have been the slow one
                if late is None:
                    raise
                head, content = late
            if self._closed:
                raise EOFError
            if "exit" in head:
                raise self._end_of(head)
            if head.get("id") != self._number:
                raise wire.ProtocolError(f"an answer to request {head.get('id')!r} instead of {self._number}")
        except EOFError as error:
            if self._closed or self._owner.backend_failed():
                self._fail("it was closed meanwhile" if self._closed else str(self._owner.backend_failed()))
                raise SandboxError(f"sandbox: the session is gone: {self._failed}.") from error
            raise Ended("ended") from error
        except wire.ProtocolError as error:
            # Only the program can have written it. As an infrastructure failure it would be a way out of a bad reward.
            raise Ended(f"broke the control protocol ({error}) and was killed") from error
        except asyncio.CancelledError:
            self._fail("a call on it was cancelled")
            raise
        return head, content

    def _read_result(self, head: dict[str, Any], output: bytes, began: float) -> ExecResult:
        status: Any = head.get("status")
        error: Any = head.get("error")
        cut: Any = head.get("cut")
        well_formed = isinstance(status, str) and isinstance(error, str | None) and type(cut) is int
        if not well_formed or status not in _REPORTED or cut < 0:
            raise Ended("broke the control protocol (an answer without a valid status, error or cut) and was killed")
        text = output.decode("utf-8", "backslashreplace")
        if cut:
            text += f"\n[... {cut} more bytes of output cut ...]"
        seconds = time.perf_counter() - began
        return ExecResult(ExecStatus(status), text, None if error is None else _printable(error), True, seconds)

    def _end_of(self, head: dict[str, Any]) -> Ended:
        """How the process ended, from what the zygote wrote as its last word.

        Raises:
            SandboxError: it was killed by something that is not the program's doing.
        """
        code, cpu = head["exit"], head.get("cpu")
        if head.get("killed_for") == "memory":
            return Ended(f"held more than its {self.limits.memory_bytes} bytes of memory", ExecStatus.MEMORY)
        if head.get("killed_for"):
            return Ended(f"was ended for {head['killed_for']}")
        if code == -signal.SIGKILL and isinstance(cpu, float | int) and cpu > self.limits.cpu_seconds - _CPU_TICKS:
            return Ended(f"used up its {self.limits.cpu_seconds} s of CPU time")
        if code is None or code == -signal.SIGKILL:
            # The first process of a PID namespace cannot be killed from within; so it was somebody outside.
            self._fail("its process was killed from outside the sandbox")
            raise SandboxError(f"sandbox: {self._failed}: by an operator, or for lack of memory on the machine.")
        if not isinstance(code, int) or code >= 0:
            return Ended(f"ended with exit status {str(code)[:20]}")
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        return Ended(f"was ended by {name}")

    def _result(self, status: ExecStatus, error: str, began: float) -> ExecResult:
        return ExecResult(status, "", error, self._lost is None, time.perf_counter() - began)

    def _check_usable(self, *, frozen: bool = False) -> None:
        if self._closed:
            raise SessionClosed("this session is closed: open another one.")
        if self._frozen and not frozen:
            raise SessionFrozen("this session has been forked and runs no more: fork it again and use the fork.")
        if self._failed is not None:
            raise SandboxError(f"this session has failed ({self._failed}): close it and open another one.")

    def _lose(self, how: str) -> None:
        self._lost = how
        self._channel.hang_up()

    def _fail(self, why: str) -> None:
        self._failed = why
        self._channel.hang_up()


def _texts(value: object) -> list[str]:
    """Reasons as they came over the socket: text, and little of it."""
    return [_printable(str(item))[:300] for item in value[:50]] if isinstance(value, list) else []


def _printable(text: str) -> str:
    """``text`` without lone surrogates, which no tokenizer and no file takes."""
    return text.encode("utf-8", "backslashreplace").decode()
