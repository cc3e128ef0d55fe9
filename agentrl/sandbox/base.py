"""What a sandbox is: records and protocols that every backend shares."""

from __future__ import annotations

import math
import posixpath
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal, Protocol, get_args

from agentrl.errors import ConfigError, UserError
from agentrl.types import ForkLevel

OUTPUT_BYTES = 64 * 1024
"""Most bytes of output that one cell may show; the rest is counted and dropped."""
CODE_BYTES = 1024 * 1024
"""Longest cell, in UTF-8 bytes."""
FILE_BYTES = 16 * 1024 * 1024
"""Largest file that goes in or out in one piece."""
SCRATCH = ("/work", "/tmp")
"""The only folders that a session can write to; the first one is its working directory."""


PRELOAD = (
    *("bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools", "heapq"),
    *("itertools", "json", "math", "operator", "pathlib", "random", "re", "statistics", "string", "textwrap", "typing"),
)
"""Modules of the standard library that every session has already loaded."""


class ExecStatus(StrEnum):
    """How a cell ended. Every value is the program's own doing: a failing sandbox raises ``SandboxError``."""

    OK = "ok"
    """It ran to its end."""
    ERROR = "error"
    """It raised, or could not be compiled."""
    TIMEOUT = "timeout"
    """It ran past its deadline; ``state_kept`` says whether it could be interrupted."""
    MEMORY = "memory"
    """It asked for more memory than its limit; ``state_kept`` is False where it was killed for it."""
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
    """What one session may use. ``agentrl doctor`` says which limits the kernel enforces here.

    Args:
        memory_bytes: address space of each process (``RLIMIT_AS``), and resident memory of all of them together (a
            cgroup where one can be had, else a watchdog that looks every fifth of a second); default 512 MiB.
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


Rng = Literal["inherit", "derive"]
"""What a fork does about random numbers.

``inherit``: every generator goes on where the parent's stood, so equal code gives equal numbers in every branch.
``derive``: the module-level generators of ``random`` and ``numpy.random`` start anew from (seed, branch); generators
that the program made itself are inherited all the same.
"""


class Session(Protocol):
    """A live Python interpreter in a jail. Calls on one session run one after another.

    A session that has been forked is *frozen*: it is a node of a tree, and nodes are immutable. To go on from it, fork
    it again. It can still be forked and closed.

    Attributes:
        seed: what the module-level random numbers last started from.
        rng: ``"seeded"`` for a session from ``open``, else the mode of the fork that made it.
    """

    seed: int
    rng: Literal["seeded"] | Rng

    async def exec(self, code: str, deadline: float = 5.0) -> ExecResult:
        """Run ``code`` like a notebook cell: names stay, and the repr of a last expression is part of the output.

        Args:
            code: Python source, at most ``CODE_BYTES``.
            deadline: seconds of wall time; then the program is interrupted, and killed if it does not yield.

        Returns:
            The result. A session that its program lost earlier gives the status ``killed`` again and again.

        Raises:
            SandboxError: the sandbox failed.
            SessionClosed: the session was closed.
            SessionFrozen: it has been forked.
            ConfigError: the deadline is not a positive number of seconds.
        """
        ...

    async def fork(self, rng: Rng = "inherit", *, branch: int | None = None) -> Session:
        """A session in exactly this state, independent from now on; this one is frozen.

        Variables, open files at their offsets and a private copy of the scratch folders go with it. A fork lives until
        it is closed, whatever becomes of this session's own ``close``.

        Args:
            rng: what happens to random numbers.
            branch: number of this branch, which ``derive`` mixes into the seed; default the number of earlier forks.

        Raises:
            ForkRefused: the program holds what cannot be forked: threads, child processes, shared writable memory,
                pipes and sockets, sqlite connections to files, ...; ``reasons`` lists them. The session goes on.
            SessionClosed: the session was closed, or its program has ended it.
            SandboxError: the sandbox failed.
            ConfigError: an unknown ``rng``, or a branch that is no natural number.
        """
        ...

    async def put_file(self, path: str, data: bytes) -> None:
        """Write ``data`` to ``path`` (relative to /work, or under /work or /tmp), making its folders.

        Raises:
            UserError: the path leaves the scratch folders or ``data`` is above ``FILE_BYTES``.
            OSError: the session's file system refused, e.g. because it is full.
            SandboxError: the sandbox failed.
            SessionClosed: the session was closed.
            SessionFrozen: it has been forked.
        """
        ...

    async def get_file(self, path: str) -> bytes:
        """The content of the regular file ``path`` (relative to /work, or under /work or /tmp).

        Raises:
            UserError: the path leaves the scratch folders.
            FileNotFoundError: there is no such file, or the session was lost with its files.
            OSError: it is no regular file (links are not followed), is above ``FILE_BYTES``, or cannot be read.
            SandboxError: the sandbox failed.
            SessionClosed: the session was closed.
            SessionFrozen: it has been forked.
        """
        ...

    async def close(self) -> None:
        """End the session and everything it started. Safe to call twice, and after any failure."""
        ...


@dataclass(frozen=True, slots=True)
class Profile:
    """What sessions are made of. Named ones are in ``sandboxes/NAME/profile.toml``; see ``agentrl.sandbox.profile``.

    Args:
        name: its name.
        packages: installed packages, by import name, that sessions may import besides the standard library.
        preload: modules imported ahead, so that importing them costs a session nothing.
        limits: what a session may use unless ``open`` says otherwise.
        image: container image for the docker backend; None where there is none.
    """

    name: str
    packages: tuple[str, ...] = ()
    preload: tuple[str, ...] = PRELOAD
    limits: Limits = Limits()
    image: str | None = None


class Sandbox(Protocol):
    """Something that opens sessions; an async context manager that closes itself.

    Attributes:
        fork_level: what ``Session.fork`` guarantees.
    """

    fork_level: ForkLevel

    async def open(
        self, profile: str | Profile | None = None, *, seed: int = 0, limits: Limits | None = None
    ) -> Session:
        """A new session whose module-level random numbers start from ``seed``.

        Args:
            profile: a name, or a record where the backend runs in this process; default the sandbox's own.
            seed: any integer.
            limits: default the profile's.

        Raises:
            UnknownName: no such profile.
            ConfigError: a package of the profile is not installed, or the seed is not an integer.
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
    try:
        absolute.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path!r} cannot be the name of a file: it is not Unicode text.") from error
    return absolute


def check_fork(rng: str, branch: int | None) -> None:
    """Raises ``ConfigError`` unless these are arguments of ``Session.fork``."""
    if rng not in get_args(Rng):
        raise ConfigError(f"rng is one of {', '.join(get_args(Rng))}, got {rng!r}.")
    if branch is not None and (type(branch) is not int or branch < 0):
        raise ConfigError(f"branch is a natural number or None, got {branch!r}.")


def check_seed(seed: int) -> None:
    """Raises ``ConfigError`` unless ``seed`` is an integer."""
    if type(seed) is not int:
        raise ConfigError(f"a sandbox seed is an integer, got {seed!r}.")


def check_deadline(deadline: float) -> None:
    """Raises ``ConfigError`` unless ``deadline`` is a positive, finite number of seconds."""
    if not (isinstance(deadline, (int, float)) and 0 < deadline < math.inf):
        raise ConfigError(f"a deadline is a positive number of seconds, got {deadline!r}.")
