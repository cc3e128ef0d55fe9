"""The ASGI application of ``agentrl sandbox serve``."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from agentrl.sandbox import wire
from agentrl.sandbox.base import Sandbox
from agentrl.sandbox.calls import MAX_FRAME, MEDIA_TYPE, VERSION, read_frame
from agentrl.sandbox.dispatch import Dispatcher
from agentrl.sandbox.ledger import Quota
from agentrl.sandbox.remote import CLIENT_HEADER

MOST_CLIENTS = 256
"""Clients at the same time; one ends when it leaves, or has been silent for too long."""
_REMEMBERED = 4096  # names of clients that have left
_BODY_SECONDS = 60.0

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]


class App:
    """The ASGI application: ``POST /call`` with the token, and ``GET /health`` for everybody.

    Args:
        sandbox: serves all clients; not closed here.
        token: what a client has to show.
        quota: of each client.
        idle_seconds: silence after which ``reap`` ends a client.
    """

    def __init__(
        self, sandbox: Sandbox, token: str, *, quota: Quota | None = None, idle_seconds: float = 600.0
    ) -> None:
        self._sandbox, self._quota, self._idle_seconds = sandbox, quota, idle_seconds
        self._secret = f"Bearer {token}".encode()
        self._clients: dict[str, Dispatcher] = {}
        self._left: dict[str, None] = {}
        self._closing = False

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"an ASGI scope of type {scope['type']!r}; this server only speaks http")
        if scope["path"] == "/health" and scope["method"] in ("GET", "HEAD"):
            status = {"status": "closing" if self._closing else "ok", "version": VERSION}
            await _respond(send, 503 if self._closing else 200, json.dumps(status).encode(), b"application/json")
            return
        headers = dict(scope["headers"])
        if scope["path"] != "/call":
            await _respond(send, 404, b"no such path")
        elif not hmac.compare_digest(headers.get(b"authorization", b""), self._secret):
            await _respond(send, 401, b"wrong token")
        elif scope["method"] != "POST":
            await _respond(send, 405, b"POST is expected")
        else:
            await self._call(headers.get(CLIENT_HEADER.encode(), b"").decode("latin-1"), receive, send)

    async def close(self) -> None:
        """End every client; the calls that are running are answered. Safe to call twice."""
        self._closing = True
        await asyncio.gather(*(self._end(name) for name in list(self._clients)))

    async def reap(self) -> None:
        """End clients that have been silent for too long, until cancelled."""
        while True:
            await asyncio.sleep(min(self._idle_seconds / 4, 30.0))
            await self.end_silent()

    async def end_silent(self) -> None:
        """End clients that have been silent for too long; one whose call is running is not silent."""
        latest = time.monotonic() - self._idle_seconds
        silent = [name for name, client in self._clients.items() if not client.busy and client.last_call < latest]
        await asyncio.gather(*(self._end(name) for name in silent))

    async def _end(self, name: str) -> None:
        client = self._clients.pop(name, None)
        if client is not None:
            await client.close()

    async def _call(self, name: str, receive: Receive, send: Send) -> None:
        if not re.fullmatch("[0-9a-f]{32}", name):
            await _respond(send, 400, f"the header {CLIENT_HEADER} must have 32 hexadecimal digits".encode())
            return
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                data = await _read_body(receive)
        except TimeoutError:
            await _respond(send, 408, b"the body did not come in time")
            return
        except wire.ProtocolError as error:
            await _respond(send, 413, str(error).encode())
            return
        if data is None:
            return
        if self._closing or (name not in self._clients and len(self._clients) >= MOST_CLIENTS):
            problem = "shutting down" if self._closing else f"more than {MOST_CLIENTS} clients"
            await _respond(send, 503, problem.encode())
            return
        if name in self._left:
            await _respond(send, 410, b"this client has left")
            return
        try:
            head, body = read_frame(data)
            if name not in self._clients:
                self._clients[name] = Dispatcher(self._sandbox, self._quota, idle_seconds=self._idle_seconds)
            reply = await self._clients[name].call(head, body)
        except wire.ProtocolError as error:
            await _respond(send, 400, str(error).encode())
            return
        if head.get("op") == "leave":  # what it sent before, on slower connections, must not bring it back
            self._left[name] = None
            if len(self._left) > _REMEMBERED:
                del self._left[next(iter(self._left))]
            await self._end(name)
        await _respond(send, 200, wire.encode(*reply), MEDIA_TYPE.encode())


async def _read_body(receive: Receive) -> bytes | None:
    """The body of a request; None when the client has gone."""
    parts: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > MAX_FRAME:
            raise wire.ProtocolError(f"more than {MAX_FRAME} bytes")
        if not event.get("more_body", False):
            return b"".join(parts)


async def _respond(send: Send, status: int, content: bytes, kind: bytes = b"text/plain") -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(content)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
