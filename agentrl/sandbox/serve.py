"""``agentrl sandbox serve``: lends this machine's sandbox to others, over HTTP with a token.

Whoever has the token can run code in sessions here. Clients are told apart by a name that they give themselves, so the
limits per client guard against mistakes, not against each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from agentrl._serving import check_token, find_token, flag, is_loopback
from agentrl.errors import ConfigError, UnknownName, UserError
from agentrl.sandbox.app import App
from agentrl.sandbox.base import Sandbox
from agentrl.sandbox.ledger import Quota
from agentrl.sandbox.local import LocalSandbox
from agentrl.sandbox.remote import TOKEN_VARIABLE

_KEEP_SECONDS = 75
_SHUTDOWN_SECONDS = 5


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of ``agentrl sandbox serve``; each is a flag.

    Args:
        host: address to listen on; default 127.0.0.1, which only this machine can reach.
        port: default 8421; 0 takes a free one.
        certfile: certificate chain for TLS; default none: plain HTTP.
        keyfile: its private key; default: in ``certfile``.
        token_file: file with the token; default the variable ``AGENTRL_SANDBOX_TOKEN``, else a new one is printed.
        max_sessions: live sessions of one client; default 512.
        max_calls: calls of one client at the same time; default 1024.
        idle_seconds: silence after which a client's sessions are closed; default 600.

    Raises:
        ConfigError: one of them is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8421
    certfile: str | None = None
    keyfile: str | None = None
    token_file: str | None = None
    max_sessions: int = 512
    max_calls: int = 1024
    idle_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            kinds = (int, float) if name == "idle_seconds" else (int,)
            if type(value) not in kinds or not low <= value <= high:
                raise ConfigError(f"--{flag(name)} must be a number from {low} to {high}, got {value!r}.")
        for name in ("host", "certfile", "keyfile", "token_file"):
            value = getattr(self, name)
            if not isinstance(value, str | None) or value == "":
                raise ConfigError(f"--{flag(name)} needs a value, got {value!r}.")
        if self.keyfile and not self.certfile:
            raise ConfigError("--keyfile needs --certfile, the certificate that it belongs to.")


_RANGES = {"port": (0, 65535), "max_sessions": (1, 100_000), "max_calls": (1, 100_000), "idle_seconds": (1, 86_400)}


def read_options(flags: Mapping[str, Any]) -> ServeOptions:
    """Options from parsed flags.

    Raises:
        UnknownName: there is no such flag.
        ConfigError: a value is out of its range.
    """
    names = {field.name for field in fields(ServeOptions)}
    for name in flags:
        if name == "token":
            raise ConfigError(
                f"every user of this machine can read the command line: give --token-file, or set {TOKEN_VARIABLE}."
            )
        if name not in names:
            raise UnknownName("option of agentrl sandbox serve:", f"--{flag(name)}", [f"--{flag(n)}" for n in names])
    return ServeOptions(**flags)


@contextlib.asynccontextmanager
async def serving(sandbox: Sandbox, token: str, options: ServeOptions) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """Serve ``sandbox`` on the running loop: gives the url, and the task that ends only if the server fails.

    Raises:
        UserError: the address or the certificate cannot be used, the token is too short, or uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("agentrl sandbox serve needs uvicorn: pip install 'agentrl[serve]'") from error

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Any:  # whoever owns the loop decides about signals
            yield

    app = App(
        sandbox,
        check_token(token),
        quota=Quota(options.max_sessions, options.max_calls),
        idle_seconds=options.idle_seconds,
    )
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=_KEEP_SECONDS,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        ssl_certfile=options.certfile,
        ssl_keyfile=options.keyfile,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"--certfile {options.certfile} cannot be used: {error}.") from error
    server = Server(config)
    with _listen(options) as listener:
        task = asyncio.create_task(server.serve(sockets=[listener]), name="sandbox server")
        reaper = asyncio.create_task(app.reap(), name="reaper of idle sandbox clients")
        try:
            yield _url(listener, options), task
        finally:
            reaper.cancel()
            await asyncio.gather(reaper, return_exceptions=True)
            await app.close()
            server.should_exit = True
            await task


async def serve(options: ServeOptions, token: str) -> None:
    """Serve this machine's sandbox until SIGTERM or SIGINT; no process is left then."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with LocalSandbox() as sandbox:
        await (await sandbox.open()).close()  # say now what this machine lacks, not to the first client
        async with serving(sandbox, token, options) as (url, server):
            print(f"sandbox server: {url}", flush=True)
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({stopped, server}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()


def run(options: ServeOptions) -> None:
    """The command: find the token, warn of what is open, serve.

    Raises:
        UserError: the token or an option cannot be used.
        IsolationUnavailable: this machine cannot isolate a session.
    """
    token = find_token(TOKEN_VARIABLE, options.token_file)
    if not options.certfile and not is_loopback(options.host):
        print(
            f"agentrl: warning: {options.host} can be reached from other machines and there is no TLS: whoever listens "
            "on the way sees the token and can run code here. Give --certfile, or tunnel to 127.0.0.1.",
            file=sys.stderr,
        )
    asyncio.run(serve(options, token))


def _listen(options: ServeOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}.") from error
    # Handed down to every connection: without it, the second write of an answer waits 40 ms for the first one's ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(listener: socket.socket, options: ServeOptions) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{'https' if options.certfile else 'http'}://{host}:{listener.getsockname()[1]}"
