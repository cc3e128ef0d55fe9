"""A Docker engine, as much of it as the docker backend needs. Everything here blocks: call it in a thread."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from agentrl.errors import IsolationUnavailable, SandboxError, UserError
from agentrl.sandbox import image

OWNER_LABEL = "agentrl.manager"
"""Label of every container: the process id of whoever opened it."""
_SECONDS = 30.0
_LATE_SECONDS = 1.0
_UNSTARTED_SECONDS = 60.0
_KILLED = "137"
_MINIMUM_API = (1, 41)


@dataclass(frozen=True, slots=True)
class Specification:
    """A container to start.

    Args:
        image: id or tag.
        command: what the image's entry point gets as its arguments.
        seccomp: JSON of its seccomp profile.
        memory_bytes: of everything in it together; there is no swap on top.
        processes: processes and threads of everything in it together.
    """

    image: str
    command: tuple[str, ...]
    seccomp: str
    memory_bytes: int
    processes: int


@dataclass(frozen=True, slots=True)
class Started:
    """A running container and the socket that is attached to its three standard streams, non-blocking."""

    name: str
    socket: socket.socket


@dataclass(frozen=True, slots=True)
class Death:
    """How a container ended.

    Attributes:
        how: for an error message, e.g. ``"ended with exit status 1"``.
        out_of_memory: its first process was killed because the container was at its memory limit.
    """

    how: str
    out_of_memory: bool = False


class Engine:
    """A connection to an engine that answers.

    Args:
        url: like ``unix:///var/run/docker.sock``; default DOCKER_HOST, or that socket.

    Raises:
        UserError: the ``docker`` package is not installed.
        IsolationUnavailable: no engine answers, or it is too old.
    """

    def __init__(self, url: str | None = None) -> None:
        try:
            self._docker = importlib.import_module("docker")
        except ImportError as error:
            raise UserError("the docker backend needs the docker package: pip install 'agentrl[docker]'.") from error
        self._place = url or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        try:
            _knock(self._place)
            settings = self._docker.utils.kwargs_from_env() if url is None else {"base_url": url}
            self._api = self._docker.APIClient(**settings, timeout=_SECONDS, version="auto")
            self._security = self._api.info().get("SecurityOptions") or []
        except (self._docker.errors.DockerException, OSError) as error:
            what = f"a Docker engine at {self._place} ({error})"
            advice = "Start one, or set DOCKER_HOST to one that answers;"
            raise IsolationUnavailable([what], advice) from error
        if tuple(map(int, self._api.api_version.split("."))) < _MINIMUM_API:
            self._api.close()
            what = f"Docker 20.10 or newer at {self._place} (its API is {self._api.api_version})"
            raise IsolationUnavailable([what], "Update it;")

    def find_image(self, name: str, fingerprint: str, command: str) -> str:
        """The id of an image that is up to date.

        Args:
            name: its tag.
            fingerprint: what it has to be labelled with.
            command: what builds it; for the error.

        Raises:
            UserError: it is not there, or was built from something else.
            SandboxError: the engine failed.
        """
        with self._asking("inspecting an image"):
            try:
                found = self._api.inspect_image(name)
            except self._docker.errors.NotFound as error:
                raise UserError(f"the engine has no sandbox image {name!r}; build it with: {command}") from error
        built_from = (found["Config"].get("Labels") or {}).get(image.LABEL)
        if built_from != fingerprint:
            raise UserError(
                f"the sandbox image {name!r} was built from another version of agentrl, or for other packages "
                f"({image.LABEL}={built_from}, expected {fingerprint}); build it again with: {command}"
            )
        return str(found["Id"])

    def start(self, specification: Specification) -> Started:
        """Start a hardened container and attach to it. It ends, and is removed, when the socket is closed.

        Raises:
            IsolationUnavailable: the engine cannot enforce a limit here.
            SandboxError: it failed; no container is left.
        """
        name = f"agentrl-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            with self._asking("starting a container"):
                created = self._api.create_container_from_config(self._configuration(specification), name)
                if warnings := created.get("Warnings"):
                    raise IsolationUnavailable(warnings, "The engine said so when it made the container;")
                attached = self._attach(name)
                try:
                    self._api.start(name)
                except BaseException:
                    attached.close()
                    raise
        except BaseException:
            with contextlib.suppress(SandboxError):  # the first error says more
                self.remove(name)
            raise
        return Started(name, attached)

    def remove(self, name: str) -> None:
        """Kill a container and remove it; returns when it is gone. Says nothing of one that is gone already.

        Raises:
            SandboxError: the engine failed.
        """
        errors = self._docker.errors
        with self._asking(f"removing container {name}"):
            try:
                self._api.remove_container(name, force=True, v=True)
            except errors.NotFound:
                return
            except errors.APIError as error:
                if error.status_code != 409:  # 409: it has ended, and the engine itself is removing it
                    raise
            end = time.monotonic() + _SECONDS
            with contextlib.suppress(errors.NotFound):
                while time.monotonic() < end:
                    self._api.inspect_container(name)
                    time.sleep(0.01)

    def remove_unstarted(self) -> None:
        """Remove containers whose manager was killed between creating and starting them: all others end by themselves.

        Raises:
            SandboxError: the engine failed.
        """
        with self._asking("listing containers"):
            found = self._api.containers(all=True, filters={"label": OWNER_LABEL, "status": "created"})
        for container in found:
            if container["Created"] < time.time() - _UNSTARTED_SECONDS:
                self.remove(container["Id"])

    def death(self, name: str) -> Death:
        """How a container ended that was started by ``start`` and has hung up. Raises nothing."""
        events: dict[str, dict[str, str]] = {}
        try:
            for _ in self._patiently():
                events = self._events(name, since=1)
                if "die" in events and (events["die"]["exitCode"] != _KILLED or "oom" in events):
                    break
        except SandboxError as error:
            return Death(f"is lost: {error}")
        if "die" not in events:
            return Death("has hung up, but did not end")
        code = events["die"]["exitCode"]
        if code == _KILLED and "oom" in events:
            return Death("was killed: it had reached its memory limit", out_of_memory=True)
        return Death("was killed" if code == _KILLED else f"ended with exit status {code}")

    def killed_for_memory(self, name: str, since: float) -> bool:
        """Whether the kernel has killed a process for the container's memory limit.

        Args:
            name: of the container.
            since: not before this time (``time.time()``).
        """
        with contextlib.suppress(SandboxError):
            return any("oom" in self._events(name, since) for _ in self._patiently())
        return False

    @staticmethod
    def _patiently() -> Iterator[None]:
        """Now and again, until what has just happened must be known: of a lack of memory the engine hears late."""
        end = time.monotonic() + _LATE_SECONDS
        while time.monotonic() < end:
            yield
            time.sleep(0.05)

    def _events(self, name: str, since: float) -> dict[str, dict[str, str]]:
        """What happened to a container: attributes of its "oom" and "die", as far as these have come."""
        filters = {"container": name, "event": ["oom", "die"]}
        with self._asking("reading its events"):
            events = self._api.events(since=since, until=time.time(), filters=filters, decode=True)
            return {event["Action"]: event["Actor"]["Attributes"] for event in events}

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turn the engine's failures into ``SandboxError``."""
        try:
            _knock(self._place)
            yield
        except (self._docker.errors.DockerException, OSError) as error:
            explanation = str(getattr(error, "explanation", None) or error)[:2000]
            raise SandboxError(f"the Docker engine failed ({what}): {explanation}") from error

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def _attach(self, name: str) -> socket.socket:
        wrapped = self._api.attach_socket(name, {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        try:
            copy = socket.socket(fileno=os.dup(wrapped.fileno()))  # not through the HTTP client: it buffers and blocks
        except (AttributeError, OSError) as error:
            raise SandboxError("the Docker engine has to be reached over a unix or TCP socket without TLS.") from error
        finally:
            wrapped._response.close()  # not ``wrapped``: the connection would stay open, and the container with it
        copy.setblocking(False)
        return copy

    def _configuration(self, specification: Specification) -> dict[str, Any]:
        security = ["no-new-privileges", f"seccomp={specification.seccomp}"]
        if any("name=apparmor" in option for option in self._security):
            security.append("apparmor=unconfined")  # docker-default forbids every mount, those of a session too
        return {
            "Image": specification.image,
            "Cmd": list(specification.command),
            "User": "65534:65534",
            "Env": ["LANG=C.UTF-8"],
            "WorkingDir": "/",
            "Hostname": "sandbox",
            "Labels": {OWNER_LABEL: str(os.getpid())},
            "NetworkDisabled": True,
            "Tty": False,
            "StopSignal": "SIGKILL",  # it has nothing to say goodbye to
            "OpenStdin": True,
            "StdinOnce": True,  # its input ends with whoever is attached, and it ends with its input
            "AttachStdin": True,
            "AttachStdout": True,
            "AttachStderr": True,
            "HostConfig": {
                "AutoRemove": True,
                "CapDrop": ["ALL"],
                "SecurityOpt": security,
                "ReadonlyRootfs": True,
                "Tmpfs": {"/tmp": "rw,noexec,nosuid,nodev,size=1m"},
                "NetworkMode": "none",
                "IpcMode": "none",
                "Memory": specification.memory_bytes,
                "MemorySwap": specification.memory_bytes,
                "PidsLimit": specification.processes,
                "LogConfig": {"Type": "none"},  # the default writes every answer to the disk
            },
        }


def seccomp_profile(text: str) -> str:
    """``text`` as the engine wants it: one line, without the comments.

    Raises:
        ValueError: it is not JSON.
    """
    return json.dumps(json.loads(text), separators=(",", ":"))


def _knock(url: str) -> None:
    """Raise ``OSError`` if nobody listens on a unix socket; the docker package would leave its own end open."""
    if url.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as knocking:
            knocking.settimeout(_SECONDS)
            knocking.connect(f"/{url.removeprefix('unix://').lstrip('/')}")
