"""Sandbox calls over a pair of byte streams: what the docker backend speaks with its container.

One end is ``serve_stream`` on two descriptors; the other a ``StreamTransport``, which is told what arrives and given
what sends, as a stream may be wrapped in another one. Answers come in the order in which calls end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from agentrl.errors import SandboxError
from agentrl.sandbox import wire
from agentrl.sandbox.base import Sandbox
from agentrl.sandbox.calls import MAX_BODY, Lost, Reply
from agentrl.sandbox.dispatch import Dispatcher
from agentrl.sandbox.ledger import Quota

_CHUNK_BYTES = 256 * 1024
_UNSENT_BYTES = 64 * 1024 * 1024
"""Answers that may wait for a slow reader before no more calls are taken."""


class Frames:
    """Cuts a stream of bytes into frames of at most ``max_body`` bytes of body."""

    def __init__(self, max_body: int = MAX_BODY) -> None:
        self._max_body, self._buffer = max_body, bytearray()

    def feed(self, data: bytes) -> Iterator[Reply]:
        """The frames that are complete with ``data``.

        Raises:
            ProtocolError: this is no stream of frames; nothing more can be read from it.
        """
        self._buffer += data
        start = wire.HEADER.size
        while len(self._buffer) >= start:
            head, body = wire.frame_length(bytes(self._buffer[:start]), self._max_body)
            end = start + head + body
            if len(self._buffer) < end:
                return
            text, content = bytes(self._buffer[start : start + head]), bytes(self._buffer[start + head : end])
            del self._buffer[:end]
            yield wire.decode_head(text), content


class StreamTransport:
    """Calls over one stream; a ``calls.Transport``.

    Args:
        write: takes bytes to send and never waits, like ``asyncio.StreamWriter.write``.
        drain: waits while too much of it is unsent, like ``asyncio.StreamWriter.drain``; may raise ``OSError``.
        close: ends the stream.
        name: how the other side is called in errors, e.g. ``"container agentrl-1f"``.
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        drain: Callable[[], Awaitable[None]],
        close: Callable[[], Awaitable[None]],
        name: str,
    ) -> None:
        self._write, self._drain, self._close, self._name = write, drain, close, name
        self._frames = Frames()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._gone: str | None = None

    def feed(self, data: bytes) -> None:
        """Take what has arrived. Nonsense ends the stream: every call on it fails."""
        try:
            for head, body in self._frames.feed(data):
                number = head.get("id")
                answer = self._waiting.pop(number, None) if type(number) is int else None
                if answer is not None and not answer.done():  # else nobody waits for it any more
                    answer.set_result((head, body))
        except wire.ProtocolError as error:
            self.lose(f"it broke the protocol: {error}")

    def lose(self, why: str) -> None:
        """The stream has ended: fail every call on it, now and later."""
        if self._gone is None:
            self._gone = why
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._lost())
        self._waiting.clear()

    async def call(self, head: dict[str, Any], body: bytes, seconds: float) -> Reply:
        """The answer to one request; see ``calls.Transport.call``."""
        if self._gone is not None:
            raise self._lost()
        number = head["id"]
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(seconds):
                self._write(wire.encode(head, body))  # whole, or a cancelled call would break the stream
                await self._drain()
                return await answer
        except TimeoutError as error:
            raise Lost(f"{self._name} did not answer {head['op']!r} within {seconds:g} s.") from error
        except OSError as error:
            self.lose(f"{type(error).__name__}: {error}")
            raise self._lost() from error
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """End the stream."""
        self.lose("it was closed")
        await self._close()

    def _lost(self) -> SandboxError:
        return Lost(f"the connection to {self._name} is lost ({self._gone}).")


async def serve_stream(reader_fd: int, writer_fd: int, sandbox: Sandbox, *, quota: Quota | None = None) -> None:
    """Serve the calls that come in on ``reader_fd``, until it ends; then close every session, and ``sandbox``.

    Args:
        reader_fd: pipe, socket or terminal; made non-blocking for the time.
        writer_fd: likewise; may be the same.
        sandbox: what the calls are run on.
        quota: default as for any client.

    Raises:
        ProtocolError: what came in are no calls.
    """
    served = _Stream(reader_fd, writer_fd, Dispatcher(sandbox, quota))
    blocking = {fd: os.get_blocking(fd) for fd in (reader_fd, writer_fd)}
    try:
        for descriptor in blocking:
            os.set_blocking(descriptor, False)
        await served.run()
    finally:
        try:
            await served.dispatcher.close()
            await sandbox.close()
        finally:
            for descriptor, was in blocking.items():
                os.set_blocking(descriptor, was)


class _Stream:
    """The descriptors of ``serve_stream``: callbacks of the event loop, as a task per direction would cost a switch."""

    def __init__(self, reader_fd: int, writer_fd: int, dispatcher: Dispatcher) -> None:
        self.reader_fd, self.writer_fd, self.dispatcher = reader_fd, writer_fd, dispatcher
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[Exception | None] = self.loop.create_future()
        self.frames = Frames()
        self.unsent = bytearray()

    async def run(self) -> None:
        self.loop.add_reader(self.reader_fd, self._read)
        try:
            if (error := await self.ended) is not None:
                raise error
        finally:
            self.loop.remove_reader(self.reader_fd)
            self.loop.remove_writer(self.writer_fd)

    def _read(self) -> None:
        try:
            data = os.read(self.reader_fd, _CHUNK_BYTES)
            if not data:
                self._end(None)
            for head, body in self.frames.feed(data):
                self.dispatcher.submit(head, body, self._answer)
        except BlockingIOError:
            return
        except OSError:
            self._end(None)
        except wire.ProtocolError as error:
            self._end(error)

    def _answer(self, reply: Reply) -> None:
        if self.ended.done():
            return
        frame = wire.encode(*reply)
        if self.unsent:
            self.unsent += frame
            if len(self.unsent) > _UNSENT_BYTES:
                self.loop.remove_reader(self.reader_fd)
            return
        sent = self._write(frame)
        if sent < len(frame):
            self.unsent += frame[sent:]
            self.loop.add_writer(self.writer_fd, self._drain)

    def _drain(self) -> None:
        del self.unsent[: self._write(bytes(self.unsent[:_CHUNK_BYTES]))]
        if not self.unsent and not self.ended.done():
            self.loop.remove_writer(self.writer_fd)
            self.loop.add_reader(self.reader_fd, self._read)

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self.writer_fd, data)
        except BlockingIOError:
            return 0
        except OSError:  # nobody is left to read it
            self._end(None)
            return len(data)

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)
