"""The manager's side of the zygote: start it, hand it sockets, stop it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from agentrl.errors import ConfigError, IsolationUnavailable, SandboxError
from agentrl.sandbox.base import OUTPUT_BYTES

_START_SECONDS = 30.0
_STOP_SECONDS = 5.0
_PACKET_BYTES = 64 * 1024

# The zygote must not import agentrl/__init__.py and all that hangs on it: it gets the package's bare names instead.
_BOOTSTRAP = """
import json, sys, types
for name, path in (("agentrl", sys.argv[1]), ("agentrl.sandbox", sys.argv[1] + "/sandbox")):
    module = types.ModuleType(name)
    module.__path__ = [path]
    sys.modules[name] = module
from agentrl.sandbox import zygote
zygote.main(json.loads(sys.argv[2]))
"""
Hearer = Callable[[dict[str, Any]], None]
PROCESS_NAME = "agentrl-sandbox"
"""Last argument on the command line of the zygote, and so of every session."""


class ZygoteHandle:
    """A running zygote."""

    def __init__(self, control: socket.socket, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self._control, self._process, self._log = control, process, log
        self._hearers: dict[int, Hearer] = {}
        self._words = ""

    @classmethod
    async def start(cls, packages: Sequence[str], preload: Iterable[str], *, watching: bool) -> ZygoteHandle:
        """Start a zygote and wait until it can fork sessions.

        Args:
            packages: what its sessions may import besides the standard library; imported ahead.
            preload: other modules to import ahead.
            watching: whether it looks after its sessions' memory itself.

        Raises:
            IsolationUnavailable: it found a mechanism missing.
            SandboxError: it did not start.
            ConfigError: a package is not installed.
        """
        if sys.platform != "linux":
            raise IsolationUnavailable([f"Linux (this is {sys.platform})"])
        handle = cls(*_spawn(locate(packages), [*preload, *packages], watching))
        try:
            async with asyncio.timeout(_START_SECONDS):
                greeting = await asyncio.get_running_loop().sock_recv(handle._control, _PACKET_BYTES)
            handle._check(json.loads(greeting or b"{}"))
        except TimeoutError as error:
            await handle.stop()
            raise SandboxError(f"the sandbox's zygote did not start within {_START_SECONDS:g} s.") from error
        except BaseException:
            await handle.stop()
            raise
        asyncio.get_running_loop().add_reader(handle._control.fileno(), handle._hear)
        return handle

    def _check(self, greeting: Mapping[str, Any]) -> None:
        if missing := greeting.get("missing"):
            raise IsolationUnavailable(missing)
        if "ready" not in greeting:
            raise SandboxError(f"the sandbox's zygote did not start: {greeting.get('failed') or self.last_words()}")

    @property
    def alive(self) -> bool:
        """Whether it can still be asked for sessions."""
        if self._process.poll() is not None:
            return False
        try:
            return bool(self._control.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def ask(self, theirs: socket.socket, request: Mapping[str, Any], hearer: Hearer) -> None:
        """Ask for a session or a fork that is spoken to over the other end of ``theirs``.

        Args:
            theirs: the session's end of a socket pair.
            request: with the session's ``name``.
            hearer: gets the zygote's news of the session, the last of them with "exit" or "failed".

        Raises:
            SandboxError: the zygote is gone or does not keep up.
        """
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], [theirs.fileno()])
        except OSError as error:
            raise SandboxError(f"the sandbox's zygote cannot be reached ({error}). {self.last_words()}") from error
        self._hearers[request["name"]] = hearer

    def _hear(self) -> None:
        """Pass news on; when the zygote is gone, that is the last news of every session."""
        with contextlib.suppress(BlockingIOError):
            while packet := self._receive():
                news = json.loads(packet)
                name = news.pop("name")
                last = "exit" in news or "failed" in news
                hearer = self._hearers.pop(name, None) if last else self._hearers.get(name)
                if hearer is not None:
                    hearer(news)
            self._deafen()

    def _receive(self) -> bytes:
        try:
            return self._control.recv(_PACKET_BYTES)
        except ConnectionError:
            return b""

    def _deafen(self) -> None:
        if self._control.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
        hearers, self._hearers = self._hearers, {}
        for hearer in hearers.values():
            hearer({"exit": None, "gone": True})

    def last_words(self) -> str:
        """What it wrote to its standard error, cut to the end."""
        if not self._log.closed:
            self._log.seek(0)
            self._words = self._log.read().decode("utf-8", "replace")[-4000:].strip()
        return self._words or "It said nothing."

    async def stop(self) -> None:
        """End it and every session; returns when no process is left."""
        self._deafen()
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        try:
            if self._process.poll() is None:
                async with asyncio.timeout(_STOP_SECONDS):
                    await _exited(self._process.pid)
        finally:
            self._process.kill()
            self._process.wait()
            self.last_words()  # a session that still holds this handle may ask for them
            self._log.close()


def _spawn(
    packages: list[str], preload: list[str], watching: bool
) -> tuple[socket.socket, subprocess.Popen[bytes], IO[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    config = {
        "control": theirs.fileno(),
        "manager": os.getpid(),
        "packages": packages,
        "preload": preload,
        "watching": watching,
        "output_bytes": OUTPUT_BYTES,
    }
    library = str(Path(__file__).resolve().parent.parent)
    clean = [sys.executable, "-S", "-s", "-P", "-B", "-X", "utf8", "-c", _BOOTSTRAP]
    environment = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]  # some interpreters do not start without
    log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by stop()
    try:
        process = subprocess.Popen(
            [*clean, library, json.dumps(config), PROCESS_NAME],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd="/",
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    except OSError as error:
        ours.close()
        log.close()
        raise SandboxError(f"cannot start the interpreter {sys.executable!r} for the sandbox: {error}.") from error
    finally:
        theirs.close()
    return ours, process, log


def locate(packages: Sequence[str]) -> list[str]:
    """Files and folders of installed packages, with the shared libraries that wheels put beside them."""
    found: list[str] = []
    for name in packages:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.origin:
            raise ConfigError(f"sandbox package {name!r} is not installed; install it or take it out of the list.")
        path = Path(spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin)
        found.append(str(path))
        found += [str(libraries) for libraries in path.parent.glob(f"{name}.libs")]
    return found


async def _exited(pid: int) -> None:
    loop = asyncio.get_running_loop()
    descriptor = os.pidfd_open(pid)
    gone = asyncio.Event()
    loop.add_reader(descriptor, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
