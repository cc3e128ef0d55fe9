"""One ``agentrl serve`` as its client sees it: requests over HTTP, and what is known of it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

import httpx

from agentrl.errors import SamplerError
from agentrl.sampler.server_wire import BEAT_SECONDS, TOKEN_VARIABLE, Piece, WireError, decode_line

CONNECT_SECONDS = 5.0
SILENT_SECONDS = 6 * BEAT_SECONDS
"""Without even an empty line for so long, a server is taken for gone."""
REST_SECONDS, LONGEST_REST_SECONDS = 0.25, 5.0
"""A server that failed is left alone for so long; doubled with each further failure, up to the second."""
_KEEP_SECONDS = 30.0  # shorter than the server's, so that it seldom hangs up first
_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_KEEP_SECONDS)
_SHOWN_CHARS = 500


T = TypeVar("T")


class Unreachable(Exception):
    """The server did not answer, or not to the end: to be asked again, or another one.

    Args:
        message: what came instead.
        seconds: when to come back, where it said so.
    """

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class Stale(Unreachable):
    """The server has other weights than its client thinks."""


class Failed(Unreachable):
    """The engine behind the server failed."""


class Server:
    """A server.

    Each of its *lanes* is an httpx transport with one connection, as for the remote sandbox: httpx's pool of
    connections costs more than the requests.

    Args:
        url: as ``agentrl serve`` printed it.
        token: the server's.
        silent_seconds: silence after which it is taken for gone.

    Attributes:
        slots: requests of this client at once.
        workers: its GPUs.
        running: requests of this client.
        served: those that have ended, too.
        instance: changes when the server is restarted.
        revisions: of its weights; more than one while they are being replaced.
        version: of its weights.
        ready: whether all that is known of it still holds.
        rests_until: by the loop's clock; it is not asked before.
        failures: in a row.
        problem: the last of them.
    """

    def __init__(self, url: str, token: str, *, silent_seconds: float = SILENT_SECONDS) -> None:
        self.url = _check_url(url)
        self.slots = self.workers = 1
        self.running = self.served = self.failures = self.version = 0
        self.instance = ""
        self.revisions: set[str] = set()
        self.ready = False
        self.rests_until = 0.0
        self.problem = ""
        self.lock = asyncio.Lock()
        self._client = uuid.uuid4().hex
        self._headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        self._timeouts = {"connect": CONNECT_SECONDS, "read": silent_seconds, "write": silent_seconds}
        secure = self.url.startswith("https")  # reading the file of certificates takes 50 ms
        self._ssl = httpx.create_ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._idle: list[httpx.AsyncHTTPTransport] = []
        self._waits: set[asyncio.Timeout] = set()
        self._closed = False

    def rest(self, problem: Unreachable) -> None:
        """Leave it alone for a while; what is known of it has to be asked again, unless it only was too busy."""
        now = asyncio.get_running_loop().time()
        self.problem = str(problem)
        if isinstance(problem, Stale):
            self.ready = False
            return
        if problem.seconds is not None:
            self.rests_until = max(self.rests_until, now + problem.seconds)
            return
        self.ready = False
        if now >= self.rests_until:  # many requests fail at once
            self.rests_until = now + min(REST_SECONDS * 2**self.failures, LONGEST_REST_SECONDS)
            self.failures += 1

    async def info(self) -> dict[str, Any]:
        """What it says of itself.

        Raises:
            Unreachable: nothing.
            SamplerError: it is no such server, or refuses the token.
        """
        return await self._one("GET", "info", None)

    async def sample(self, body: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        """Ask for tokens; leaving the loop ends the request.

        Raises:
            Unreachable: the answer broke off.
            Stale: ``revisions`` in ``body`` has not what the server has.
            SamplerError: a request that can never be served.
        """
        place = 0
        async with contextlib.aclosing(self._lines("POST", "sample", {**body, "client": self._client})) as lines:
            async for line in lines:
                piece = self._read(line)
                if not isinstance(piece, Piece) or piece.place != place:
                    raise Unreachable(f"token {place} was expected, got {line[:_SHOWN_CHARS]!r}")
                place += len(piece.cells.token_ids)
                yield piece

    async def receive(self, method: str, **arguments: Any) -> None:
        """Make a call that takes weights. See ``transport.Receiver``.

        Raises:
            Unreachable: no answer; the call may have been made.
            SamplerError: it was not taken.
        """
        revision, expected = uuid.uuid4().hex, list(self.revisions)
        if "version" in arguments:
            self.revisions.add(revision)
        body = {
            "method": method,
            "arguments": arguments,
            "revision": revision,
            "expected": expected,
            "client": self._client,
        }
        await self._one("POST", "receive", body)
        if "version" in arguments:
            self.revisions, self.version = {revision}, arguments["version"]

    async def close(self) -> None:
        """Close the connections; whoever waits for an answer gets ``Unreachable``."""
        self._closed = True
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())
        lanes, self._idle = self._idle, []
        for lane in lanes:
            await lane.aclose()

    async def _one(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        found: Any = None
        async with contextlib.aclosing(self._lines(method, path, body)) as lines:
            async for line in lines:
                found = self._read(line)
        if not isinstance(found, dict):
            raise Unreachable(f"an object was expected in answer to {path}, got {found!r}")
        return found

    async def _lines(self, method: str, path: str, body: Mapping[str, Any] | None) -> AsyncGenerator[bytes, None]:
        """The lines of an answer that are not empty."""
        request = httpx.Request(
            method,
            f"{self.url}/agentrl/{path}",
            headers=self._headers,
            json=body,
            extensions={"timeout": self._timeouts},
        )
        if self._closed:
            raise Unreachable("closed")
        lane = (
            self._idle.pop() if self._idle else httpx.AsyncHTTPTransport(verify=self._ssl, limits=_ONE, trust_env=False)
        )
        whole = False
        try:
            response = await self._unless_closed(lane.handle_async_request(request))
            if response.status_code != 200:
                content = b"".join([chunk async for chunk in response.aiter_raw()])
                raise self._refused(response, content)
            rest, chunks = b"", response.aiter_raw()
            while (chunk := await self._unless_closed(anext(chunks, None))) is not None:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line:
                        yield line
            if rest:
                raise Unreachable(f"the answer broke off after {rest[-_SHOWN_CHARS:]!r}")
            whole = True
        except httpx.HTTPError as error:
            raise Unreachable(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        finally:
            if whole and not self._closed:
                self._idle.append(lane)
            else:
                await lane.aclose()

    async def _unless_closed(self, work: Awaitable[T]) -> T:
        """Await ``work``; ``close`` ends it, which closing a connection does not do in all of its states."""
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    return await work
                finally:
                    self._waits.discard(wait)
        except TimeoutError as error:
            raise Unreachable("closed") from error

    def _read(self, line: bytes) -> Piece | dict[str, Any]:
        try:
            found = decode_line(line)
        except WireError as error:
            raise Unreachable(f"this is not what a server of agentrl says: {error}") from error
        if isinstance(found, dict) and "error" in found:
            raise self._error(str(found["error"]), str(found.get("message")))
        return found

    def _error(self, kind: str, message: str) -> Exception:
        if kind == "refused":
            return SamplerError(f"the server {self.url} refuses: {message}")
        return {"stale": Stale, "failed": Failed}.get(kind, Unreachable)(message)

    def _refused(self, response: httpx.Response, content: bytes) -> Exception:
        status = response.status_code
        try:
            found = decode_line(content)
        except WireError:
            found = {}
        said = found if isinstance(found, dict) else {}
        shown = " ".join(content[:_SHOWN_CHARS].decode(errors="replace").split())
        message = str(said.get("message") or shown)
        if status == 401:
            return SamplerError(
                f"the server {self.url} refused the token: expected the one that agentrl serve was started with, in "
                f"{TOKEN_VARIABLE}."
            )
        wait = response.headers.get("retry-after", "")
        if status == 503 and wait.isdecimal():
            return Unreachable(f"HTTP 503: {message}", float(wait))
        if "error" in said:
            return self._error(str(said["error"]), message)
        if status >= 500 or status == 429:
            return Unreachable(f"HTTP {status}: {message}")
        return SamplerError(
            f"{self.url} is not a server of agentrl: HTTP {status}: {message}. Start one there: agentrl serve MODEL"
        )


def _check_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise SamplerError(f"{url!r} in sampler.urls is no url ({error}); expected http://127.0.0.1:8000") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise SamplerError(f"{url!r} in sampler.urls is no url; expected one as in http://127.0.0.1:8000")
    return url.rstrip("/")
