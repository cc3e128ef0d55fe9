"""What a sandbox is: records and protocols that every backend shares."""

from __future__ import annotations

import math
import posixpath
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Protocol

from agentrl.errors import ConfigError, UserError

OUTPUT_BYTES = 64 * 1024
"""Most bytes of output that one cell may show; the rest is counted and dropped."""
CODE_BYTES = 1024 * 1024
"""Longest cell, in UTF-8 bytes."""
FILE_BYTES = 16 * 1024 * 1024
"""Largest file that goes in or out in one piece."""
SCRATCH = ("/work", "/tmp")
"""The only folders that a session can write to; the first one is its working directory."""


class ExecStatus(StrEnum):
    """How a cell ended. Every value is the program's own doing: a failing sandbox raises ``SandboxError``."""

    OK = "ok"
    """It ran to its end."""
    ERROR = "error"
    """It raised, or could not be compiled."""
    TIMEOUT = "timeout"
    """It ran past its deadline; ``state_kept`` says whether it could be interrupted."""
    MEMORY = "memory"
    """It asked for more memory than its limit."""
    KILLED = "killed"
    """It ended its process: ``os._exit``, a crash, or a limit that kills. The session is lost."""


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a cell did; ``str`` gives what a model should read: the output, then the error.

    Attributes:
        status: how it ended.
        output: what it printed (stdout and stderr together) and the repr of its last expression, at most
            ``OUTPUT_BYTES`` bytes and a note of how much was cut. Always encodable as UTF-8.
        error: the traceback, of the program's own frames only, or what else went wrong; None when the status is ok.
        state_kept: whether variables and files are still there for the next cell.
        seconds: wall time.
    """

    status: ExecStatus
    output: str
    error: str | None
    state_kept: bool
    seconds: float

    def __str__(self) -> str:
        return "\n".join(text.rstrip("\n") for text in (self.output, self.error) if text)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one session may use. Every limit is enforced by the kernel.

    Args:
        memory_bytes: address space of each process (``RLIMIT_AS``); default 512 MiB.
        cpu_seconds: CPU time of each process over the whole session; past it the session is killed; default 60.
        processes: processes and threads together; default 32.
        open_files: file descriptors of each process; default 64.
        file_bytes: size of one file; default 32 MiB.
        scratch_bytes: size of /work, and of /tmp; default 32 MiB each.

    Raises:
        ConfigError: a limit is out of its range.
    """

    memory_bytes: int = 512 * 1024 * 1024
    cpu_seconds: int = 60
    processes: int = 32
    open_files: int = 64
    file_bytes: int = 32 * 1024 * 1024
    scratch_bytes: int = 32 * 1024 * 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), _RANGES[field.name]
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"sandbox limit {field.name} must be an integer from {low} to {high}, got {value!r}.")


_RANGES = {
    "memory_bytes": (96 * 1024 * 1024, 1 << 40),
    "cpu_seconds": (1, 86_400),
    "processes": (1, 4096),
    "open_files": (16, 4096),
    "file_bytes": (64 * 1024, 1 << 40),
    "scratch_bytes": (64 * 1024, 1 << 40),
}


class Session(Protocol):
    """A live Python interpreter in a jail. Calls on one session run one after another."""

    async def exec(self, code: str, deadline: float = 5.0) -> ExecResult:
        """Run ``code`` like a notebook cell: names stay, and the repr of a last expression is part of the output.

        Args:
            code: Python source, at most ``CODE_BYTES``.
            deadline: seconds of wall time; then the program is interrupted, and killed if it does not yield.

        Returns:
            The result. A session that its program lost earlier gives the status ``killed`` again and again.

        Raises:
            SandboxError: the sandbox failed, or the session was closed.
            ConfigError: the deadline is not a positive number of seconds.
        """
        ...

    async def put_file(self, path: str, data: bytes) -> None:
        """Write ``data`` to ``path`` (relative to /work, or under /work or /tmp), making its folders.

        Raises:
            UserError: the path leaves the scratch folders or ``data`` is above ``FILE_BYTES``.
            OSError: the session's file system refused, e.g. because it is full.
            SandboxError: the sandbox failed, or the session was closed.
        """
        ...

    async def get_file(self, path: str) -> bytes:
        """The content of the regular file ``path`` (relative to /work, or under /work or /tmp).

        Raises:
            UserError: the path leaves the scratch folders.
            FileNotFoundError: there is no such file, or the session was lost with its files.
            OSError: it is no regular file (links are not followed), is above ``FILE_BYTES``, or cannot be read.
            SandboxError: the sandbox failed, or the session was closed.
        """
        ...

    async def close(self) -> None:
        """End the session and everything it started. Safe to call twice, and after any failure."""
        ...


class Sandbox(Protocol):
    """Something that opens sessions."""

    async def open(self, *, seed: int = 0, limits: Limits = ...) -> Session:
        """A new session whose module-level random numbers start from ``seed``.

        Raises:
            IsolationUnavailable: this machine cannot isolate a session.
            SandboxError: the session could not be started.
        """
        ...

    async def close(self) -> None:
        """Close every session and whatever serves them. Safe to call twice."""
        ...


def scratch_path(path: str) -> str:
    """``path`` as an absolute, normal path inside the scratch folders.

    Raises:
        UserError: it leaves them.
    """
    absolute = posixpath.normpath(posixpath.join(SCRATCH[0], path))
    if "\0" in path or not any(absolute.startswith(folder + "/") for folder in SCRATCH):
        raise UserError(f"a session's files are under {' and '.join(SCRATCH)}; {path!r} is not. Use a relative path.")
    return absolute


def check_deadline(deadline: float) -> None:
    """Raises ``ConfigError`` unless ``deadline`` is a positive, finite number of seconds."""
    if not (isinstance(deadline, int | float) and math.isfinite(deadline) and deadline > 0):
        raise ConfigError(f"a deadline is a positive number of seconds, got {deadline!r}.")
