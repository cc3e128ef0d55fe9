"""One session as the manager sees it: a socket, a lock, and what is known about the process behind it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from agentrl.errors import IsolationUnavailable, SandboxError, UserError
from agentrl.sandbox import probe, wire
from agentrl.sandbox.base import (
    CODE_BYTES,
    FILE_BYTES,
    OUTPUT_BYTES,
    ExecResult,
    ExecStatus,
    Limits,
    check_deadline,
    scratch_path,
)

GRACE_SECONDS = 1.0
"""Time between the interrupt at a cell's deadline and the kill."""
FILE_SECONDS = 20.0
CLOSE_SECONDS = 10.0
_CPU_TICKS = 0.1  # how finely the kernel measures before it enforces RLIMIT_CPU
_CHUNK_BYTES = 256 * 1024
_GONE = "variables and files are lost"
_REPORTED = {ExecStatus.OK, ExecStatus.ERROR, ExecStatus.TIMEOUT, ExecStatus.MEMORY}


class Ended(Exception):
    """The process behind the socket is gone; the message says how it went."""


class Channel:
    """Frames over a non-blocking socket. One reader and one writer at a time; a cancelled read loses nothing."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._buffer = sock, bytearray()
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        """Send all of ``data``; a peer that has gone is noticed by the next ``receive``."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                await self._wait(self._loop.add_writer, self._loop.remove_writer)
            except OSError:
                return

    async def receive(self, max_body: int) -> tuple[dict[str, Any], bytes]:
        """The next frame.

        Raises:
            ProtocolError: what came is not a frame, or is above its caps.
            EOFError: the other side is gone.
        """
        while (frame := self.arrived(max_body)) is None:
            await self._wait(self._loop.add_reader, self._loop.remove_reader)
        return frame

    def arrived(self, max_body: int) -> tuple[dict[str, Any], bytes] | None:
        """A frame that is already here, or None. Raises as ``receive`` does."""
        while (frame := self._parse(max_body)) is None:
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                return None
            except OSError:
                chunk = b""
            if not chunk:
                raise EOFError
            self._buffer += chunk
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
        """Give the descriptor back; a reader that still waits is left to its own deadline."""
        self.hang_up()
        descriptor = self._socket.fileno()
        if descriptor >= 0:
            self._loop.remove_reader(descriptor)
            self._loop.remove_writer(descriptor)
        self._socket.close()

    def _parse(self, max_body: int) -> tuple[dict[str, Any], bytes] | None:
        start = wire.HEADER.size
        if len(self._buffer) < start:
            return None
        head, body = wire.frame_length(bytes(self._buffer[:start]), max_body)
        end = start + head + body
        if len(self._buffer) < end:
            return None
        frame = wire.decode_head(bytes(self._buffer[start : start + head])), bytes(self._buffer[start + head : end])
        del self._buffer[:end]
        return frame

    async def _wait(self, add: Callable[..., Any], remove: Callable[[int], Any]) -> None:
        ready = asyncio.Event()
        descriptor = self._socket.fileno()
        add(descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            if self._socket.fileno() == descriptor:  # else it is closed, and the number may be somebody else's
                remove(descriptor)


class LocalSession:
    """A session of a ``LocalSandbox``; see ``agentrl.sandbox.base.Session`` for its methods."""

    def __init__(self, channel: Channel, limits: Limits, backend_failed: Callable[[], str | None]) -> None:
        self._channel, self._limits, self._backend_failed = channel, limits, backend_failed
        self._lock = asyncio.Lock()
        self._number = 0
        self._lost: str | None = None  # by the program's own doing: how
        self._failed: str | None = None  # not by the program: why
        self._closed = False
        self.on_close: Callable[[], None] = lambda: None

    async def ready(self) -> None:
        """Wait until the walls stand.

        Raises:
            IsolationUnavailable: a mechanism was refused, and no session of this process ever had it.
            SandboxError: the process did not come up.
        """
        try:
            head, _ = await self._channel.receive(0)
        except (EOFError, wire.ProtocolError) as error:
            raise SandboxError(f"a session did not start: {self._backend_failed() or repr(error)}") from error
        if "fatal" in head and not probe.passed():
            raise IsolationUnavailable([str(head["fatal"])])
        if head.get("ready") is not True:
            raise SandboxError(f"a session did not start; it sent {str(head)[:200]}.")

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
                return self._result(ExecStatus.KILLED, f"Killed: {self._lost}; {_GONE}", began)

    async def put_file(self, path: str, data: bytes) -> None:
        """Write a file; see ``Session.put_file``."""
        if len(data) > FILE_BYTES:
            raise UserError(f"{path!r} is {len(data)} bytes; put_file takes at most {FILE_BYTES}. Send it in parts.")
        await self._file({"op": "put", "path": scratch_path(path)}, data)

    async def get_file(self, path: str) -> bytes:
        """Read a file; see ``Session.get_file``."""
        return await self._file({"op": "get", "path": scratch_path(path), "cap": FILE_BYTES}, b"")

    async def close(self) -> None:
        """End the session; returns when its processes are gone. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._channel.hang_up()
        try:
            async with asyncio.timeout(CLOSE_SECONDS), self._lock:
                await self._channel.drain()
        except TimeoutError as error:
            raise SandboxError(f"a session was killed but its process did not end in {CLOSE_SECONDS:g} s.") from error
        finally:
            self._channel.close()
            self.on_close()

    async def _file(self, request: dict[str, Any], data: bytes) -> bytes:
        async with self._lock:
            self._check_usable()
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
                raise Ended(self._how_it_ended(head))
            if head.get("id") != self._number:
                raise wire.ProtocolError(f"an answer to request {head.get('id')!r} instead of {self._number}")
        except EOFError as error:
            if self._closed or self._backend_failed():
                self._fail("it was closed meanwhile" if self._closed else str(self._backend_failed()))
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

    def _how_it_ended(self, head: dict[str, Any]) -> str:
        code, cpu = head["exit"], head.get("cpu")
        if code == -signal.SIGKILL and isinstance(cpu, float | int) and cpu > self._limits.cpu_seconds - _CPU_TICKS:
            return f"used up its {self._limits.cpu_seconds} s of CPU time"
        if not isinstance(code, int) or code >= 0:
            return f"ended with exit status {str(code)[:20]}"
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        return f"was ended by {name}"

    def _result(self, status: ExecStatus, error: str, began: float) -> ExecResult:
        return ExecResult(status, "", error, self._lost is None, time.perf_counter() - began)

    def _check_usable(self) -> None:
        if self._closed:
            raise SandboxError("this session is closed: open another one.")
        if self._failed is not None:
            raise SandboxError(f"this session has failed ({self._failed}): close it and open another one.")

    def _lose(self, how: str) -> None:
        self._lost = how
        self._channel.hang_up()

    def _fail(self, why: str) -> None:
        self._failed = why
        self._channel.hang_up()


def _printable(text: str) -> str:
    """``text`` without lone surrogates, which no tokenizer and no file takes."""
    return text.encode("utf-8", "backslashreplace").decode()
