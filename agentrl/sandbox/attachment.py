"""The standard streams of a container over one socket: what an engine's "attach" gives, driven by the event loop.

What comes out is cut into blocks with an eight byte header: which stream it was (1 output, 2 error), three zeros, and
the length, big-endian. What goes in is not wrapped.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable

from agentrl.sandbox.stream import StreamTransport

_HEADER = struct.Struct(">B3xI")
_OUTPUT, _ERROR = 1, 2
_COMPLAINT_BYTES = 4096
_UNSENT_BYTES = 1024 * 1024


class Blocks:
    """Takes the bytes of an attached socket apart; hands on each piece as it comes, not only whole blocks.

    Args:
        output: is given what the container wrote to its standard output.
        error: likewise, its standard error.
    """

    def __init__(self, output: Callable[[bytes], None], error: Callable[[bytes], None]) -> None:
        self._takers = {_OUTPUT: output, _ERROR: error}
        self._header = bytearray()
        self._stream, self._left = _OUTPUT, 0

    def feed(self, data: bytes) -> None:
        """Take what has arrived.

        Raises:
            ValueError: this is no such stream.
        """
        position = 0
        while position < len(data):
            if not self._left:
                missing = _HEADER.size - len(self._header)
                self._header += data[position : position + missing]
                position += missing
                if len(self._header) < _HEADER.size:
                    return
                self._stream, self._left = _HEADER.unpack(self._header)
                self._header.clear()
                if self._stream not in self._takers:
                    raise ValueError(f"a block for stream {self._stream}")
                continue
            piece = data[position : position + self._left]
            position += len(piece)
            self._left -= len(piece)
            self._takers[self._stream](piece)


class Attachment(asyncio.Protocol):
    """An attached socket as a ``calls.Transport``.

    Args:
        attached: non-blocking, connected.
        name: of the container, for errors.
        on_loss: called once, when nothing more can come.

    Attributes:
        transport: the calls.
        lost: whether nothing more can come.
    """

    def __init__(self, attached: socket.socket, name: str, on_loss: Callable[[], None]) -> None:
        self._socket, self._on_loss = attached, on_loss
        self._stream: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._complaints = bytearray()
        self.lost = False
        self.transport = StreamTransport(self._write, self._drain, self._hang_up, f"container {name}")
        self._blocks = Blocks(self.transport.feed, self._complain)

    @property
    def complaints(self) -> str:
        """The end of what the container wrote to its standard error."""
        return self._complaints.decode("utf-8", "replace").strip()

    async def connect(self) -> None:
        """Let the event loop take over the socket."""
        await asyncio.get_running_loop().create_connection(lambda: self, sock=self._socket)

    def close(self) -> None:
        """Hang up, at once. Safe to call twice, and before ``connect``."""
        self._lose("it was closed")
        if self._stream is None:
            self._socket.close()
        else:
            self._stream.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        assert isinstance(transport, asyncio.Transport)
        self._stream = transport
        transport.set_write_buffer_limits(high=_UNSENT_BYTES)
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        try:
            self._blocks.feed(data)
        except ValueError as error:
            self._lose(f"the engine sent {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._lose(f"{type(exc).__name__}: {exc}" if exc else "it has hung up")
        self._writable.set()

    def pause_writing(self) -> None:
        """Called by the event loop."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Called by the event loop."""
        self._writable.set()

    def _write(self, data: bytes) -> None:
        if self._stream is not None:
            self._stream.write(data)

    async def _drain(self) -> None:
        await self._writable.wait()

    async def _hang_up(self) -> None:
        self.close()

    def _complain(self, data: bytes) -> None:
        self._complaints += data
        del self._complaints[:-_COMPLAINT_BYTES]

    def _lose(self, why: str) -> None:
        if not self.lost:
            self.lost = True
            self._on_loss()
        self.transport.lose(why)
