"""The manager's end of a session's control socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from agentrl.sandbox import wire

_CHUNK_BYTES = 256 * 1024
_SEND_SECONDS = 20.0


class Channel:
    """Frames over a non-blocking socket. One reader and one writer at a time; a cancelled read loses nothing."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._buffer = sock, bytearray()
        self._loop = asyncio.get_running_loop()
        self._ended = self._paused = self._expired = False
        self._news: asyncio.Future[None] | None = None
        self._loop.add_reader(sock.fileno(), self._arrive)

    async def send(self, data: bytes, seconds: float = _SEND_SECONDS) -> None:
        """Send all of ``data``; a peer that has gone is noticed by the next ``receive``.

        Raises:
            TimeoutError: the peer does not take it.
        """
        try:
            sent = self._socket.send(data)
            if sent < len(data):
                async with asyncio.timeout(seconds):
                    await self._loop.sock_sendall(self._socket, memoryview(data)[sent:])
        except BlockingIOError:
            async with asyncio.timeout(seconds):
                await self._loop.sock_sendall(self._socket, data)
        except TimeoutError:
            raise
        except OSError:
            return

    async def receive(self, max_body: int, seconds: float | None = None) -> tuple[dict[str, Any], bytes]:
        """The next frame.

        A plain timer and not ``asyncio.timeout``, which costs a tenth of a short call.

        Raises:
            ProtocolError: what came is not a frame, or is above its caps.
            EOFError: the other side is gone.
            TimeoutError: no frame came in time.
        """
        timer = None if seconds is None else self._loop.call_later(seconds, self._expire)
        try:
            while (frame := self.arrived(max_body)) is None:
                if self._ended:
                    raise EOFError
                if self._expired:
                    self._arrive()  # our own loop may have been the slow one
                    if (late := self.arrived(max_body)) is not None:
                        return late
                    raise TimeoutError
                if self._paused:
                    self._paused = False
                    self._loop.add_reader(self._socket.fileno(), self._arrive)
                self._news = self._loop.create_future()
                await self._news
            return frame
        finally:
            self._news, self._expired = None, False
            if timer is not None:
                timer.cancel()

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

    def _expire(self) -> None:
        self._expired = True
        self._wake()
