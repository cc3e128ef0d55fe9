"""The remote backend: sessions on another machine, through ``agentrl sandbox serve`` there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import uuid
from pathlib import Path
from typing import Any

import httpx

from agentrl.errors import SandboxError, UserError
from agentrl.sandbox import wire
from agentrl.sandbox.base import Limits, Profile
from agentrl.sandbox.called import PING_SECONDS, CalledSandbox, CalledSession
from agentrl.sandbox.calls import MAX_FRAME, MEDIA_TYPE, Lost, Reply, read_frame

TOKEN_VARIABLE = "AGENTRL_SANDBOX_TOKEN"
"""Environment variable with the token, for the server and for its clients."""
CLIENT_HEADER = "agentrl-client"
"""HTTP header with the client's name, 32 hexadecimal digits: the server keeps its sessions and answers under it."""
ATTEMPTS = 6
"""Times that a call is sent, always with the same id, when its connection breaks or the server answers 5xx."""
_PAUSE_SECONDS = 0.1  # before the second attempt; doubled from then on
_CONNECT_SECONDS = 5.0
_LEAST_SECONDS = 5.0  # for an attempt that starts when the call's time is over
_KEEP_SECONDS = 30.0  # shorter than the server's, so that it seldom hangs up first
_MOST_SILENT_SECONDS = 60.0
_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_KEEP_SECONDS)
_SHOWN_CHARS = 200


class RemoteSandbox(CalledSandbox):
    """Opens sessions on the machine where ``agentrl sandbox serve`` runs; bound to the event loop that first uses it.

    A call whose connection breaks is sent again under the same id, and the server never runs an id twice; so a lost
    answer costs no more than the wait. When the server stays away, or was restarted, its sessions are lost and every
    call raises ``SandboxError``: never a result of the program.

    Args:
        url: address of the server, as it prints it, e.g. ``https://sandboxes.lan:8421``. It is reached directly,
            without the proxies that the environment names.
        token: the server's token; default the variable ``AGENTRL_SANDBOX_TOKEN``.
        profile: name of the profile of its sessions; default the server's.
        verify: whether to check the certificate of an ``https`` server, or a file with the certificates that are
            trusted, such as a self-signed one.
        connections: calls at the same time; more wait. Default 256.

    Raises:
        UserError: the url is none, or there is no token.

    Example:
        ```python
        async with RemoteSandbox("http://127.0.0.1:8421") as sandbox:
            session = await sandbox.open(seed=1)
            result = await session.exec("1 + 1")
        ```
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        profile: str | None = None,
        verify: bool | str | Path = True,
        connections: int = 256,
    ) -> None:
        token = token or os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise UserError(f"no token for the sandbox server {url}: give token=, or set {TOKEN_VARIABLE}.")
        super().__init__(HttpTransport(url, token, verify, connections), profile=profile)
        self._beating = False

    async def open(
        self, profile: str | Profile | None = None, *, seed: int = 0, limits: Limits | None = None
    ) -> CalledSession:
        """A new session; see ``Sandbox.open``."""
        session = await super().open(profile, seed=seed, limits=limits)
        if not self._beating:
            self._beating = True
            self._own(self._beat())
        return session

    async def _beat(self) -> None:
        """Show the server that this client lives, so that it does not take its silence for its end."""
        while True:
            idle: Any = None
            with contextlib.suppress(SandboxError, UserError):  # the next call that matters says it
                idle = (await self.call("ping", PING_SECONDS))[0].get("idle_seconds")
            pause = idle / 4 if isinstance(idle, int | float) and idle > 0 else _MOST_SILENT_SECONDS
            await asyncio.sleep(min(pause, _MOST_SILENT_SECONDS))


class HttpTransport:
    """Carries calls as ``POST /call``; a ``calls.Transport``. Arguments as for ``RemoteSandbox``.

    Each of its *lanes* is an httpx transport with one connection: the work that a pool of httpx does for one request
    grows with the square of its idle connections (20 ms with 256 of them).
    """

    def __init__(self, url: str, token: str, verify: bool | str | Path, connections: int) -> None:
        self._url = _check_url(url)
        self._headers = {
            "authorization": f"Bearer {_check_token(token)}",
            CLIENT_HEADER: uuid.uuid4().hex,
            "content-type": MEDIA_TYPE,
            "accept-encoding": "identity",
        }
        self._ssl = _certificates(verify) if self._url.startswith("https") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._places = asyncio.Semaphore(connections)
        self._idle: list[httpx.AsyncHTTPTransport] = []

    async def call(self, head: dict[str, Any], body: bytes, seconds: float) -> Reply:
        """The answer to one request; see ``calls.Transport.call``."""
        frame = wire.encode(head, body)
        loop = asyncio.get_running_loop()
        async with self._places:
            end = loop.time() + seconds
            problem = ""
            for attempt in range(ATTEMPTS):
                if attempt:
                    await asyncio.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
                try:
                    async with asyncio.timeout(max(end - loop.time(), _LEAST_SECONDS)):
                        status, answer = await self._post(frame)
                except TimeoutError:
                    problem = f"no answer within {seconds:g} s"
                except httpx.TransportError as error:
                    problem = self._explain(error)
                else:
                    if status == 200:
                        return self._read(answer, head["id"])
                    problem = f"HTTP {status}: {answer[:_SHOWN_CHARS].decode(errors='replace')}"
                    if status < 500:
                        raise self._refused(status, problem)
        raise Lost(f"the sandbox server {self._url} failed: {problem}. It was asked {ATTEMPTS} times; is it running?")

    async def close(self) -> None:
        """Close the connections."""
        idle, self._idle = self._idle, []
        for lane in idle:
            await lane.aclose()

    async def _post(self, frame: bytes) -> tuple[int, bytes]:
        timeouts = {"timeout": {"connect": _CONNECT_SECONDS}}  # ``call`` has a deadline of its own
        request = httpx.Request("POST", f"{self._url}/call", headers=self._headers, content=frame, extensions=timeouts)
        lane = (
            self._idle.pop() if self._idle else httpx.AsyncHTTPTransport(verify=self._ssl, limits=_ONE, trust_env=False)
        )
        try:
            response = await lane.handle_async_request(request)
            size = response.headers.get("content-length", "")
            if not size.isdecimal() or int(size) > MAX_FRAME:
                raise Lost(f"the sandbox server {self._url} sent an answer of {size or 'unknown'} bytes.")
            answer = b"".join([chunk async for chunk in response.aiter_raw()])  # not decoded: a bomb would be, too
        except BaseException:
            await lane.aclose()
            raise
        self._idle.append(lane)
        return response.status_code, answer

    def _read(self, data: bytes, number: int) -> Reply:
        try:
            head, body = read_frame(data)
        except wire.ProtocolError as error:
            raise Lost(f"{self._url} sent no answer of a sandbox server ({error}).") from error
        if head.get("id") != number:
            raise Lost(f"the sandbox server {self._url} answered another call.")
        return head, body

    def _explain(self, error: httpx.TransportError) -> str:
        text = f"{type(error).__name__}: {error}".rstrip(": .")
        if "CERTIFICATE_VERIFY_FAILED" in text:
            raise UserError(
                f"the certificate of the sandbox server {self._url} is not trusted ({text}): give its file with "
                "verify='server.crt', or use the host name that it was made for."
            ) from error
        return text

    def _refused(self, status: int, problem: str) -> Exception:
        if status == 401:
            return UserError(
                f"the sandbox server {self._url} refused the token: it has to be the one that the server was started "
                f"with; set {TOKEN_VARIABLE} on both sides, or give token=."
            )
        if status in (400, 408, 410, 413):
            return Lost(f"the sandbox server {self._url} did not understand a call: {problem}.")
        return UserError(f"there is no sandbox server at {self._url}: {problem}. Start one: agentrl sandbox serve")


def _check_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{url!r} is no url ({error}); expected one as in http://127.0.0.1:8421") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"{url!r} is not the url of a sandbox server; expected one as in http://127.0.0.1:8421")
    return url.rstrip("/")


def _check_token(token: str) -> str:
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError("a sandbox token consists of visible ASCII characters; the given one has others.")
    return token


def _certificates(verify: bool | str | Path) -> ssl.SSLContext:
    if isinstance(verify, bool):
        return httpx.create_ssl_context(verify=verify)
    try:
        return ssl.create_default_context(cafile=verify)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"verify={str(verify)!r} cannot be read as certificates: {error}.") from error
