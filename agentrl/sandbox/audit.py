"""What a session must not be able to do, tried. Sent as text into a session by ``probe``; never imported.

Prints a JSON list of the mechanisms that did not hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
Action = Callable[[], Any]


def refused(action: Action, *codes: int) -> bool:
    """Whether ``action`` fails with one of the error numbers."""
    try:
        action()
    except OSError as error:
        return error.errno in codes
    return False


def call(function: Callable[..., int], *arguments: Any) -> Action:
    """A C library call that raises OSError when it fails."""

    def action() -> None:
        if function(*arguments) < 0:
            raise OSError(ctypes.get_errno(), "")

    return action


def fill_file() -> None:
    """Write one file until the kernel refuses."""
    with open("/tmp/large", "wb", buffering=0) as file:
        while True:
            file.write(bytes(64 * 1024))


def fill_folder() -> None:
    """Write files below the limit of one file, together twice what a scratch folder holds."""
    for number in range(8):
        Path(f"/work/{number}").write_bytes(bytes(256 * 1024))


def fork_all() -> int:
    """Fork until the kernel refuses; how many children that made."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        while len(children) < 64:
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
            children.append(child)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return len(children)


def capabilities() -> int:
    """Effective, permitted and inheritable sets, or-ed together."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call(libc.capget, header, sets)()
    return sum(sets)


signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checks = {
    "PID namespace": os.getpid() == 1 and os.getppid() == 0,
    "unprivileged user": os.getuid() != 0 and capabilities() == 0,
    "no_new_privs": libc.prctl(39, 0, 0, 0, 0) == 1,
    "seccomp filter": libc.prctl(21, 0, 0, 0, 0) == 2
    and refused(call(libc.unshare, 0x10000000), errno.EPERM)
    and refused(call(libc.ptrace, 0, 0, 0, 0), errno.EPERM)
    and refused(lambda: os.execv("/dev/null", ["x"]), errno.EPERM),
    "mount namespace": refused(call(libc.mount, b"x", b"/work", b"tmpfs", 0, None), errno.EPERM),
    "network namespace": refused(lambda: socket.socket(socket.AF_INET), errno.EPERM),
    "read-only root": refused(lambda: Path("/x").touch(), errno.EROFS)
    and not any(os.path.exists(path) for path in ("/proc/self", "/etc", "/bin/sh", "/var", "/sys/kernel")),
    "scratch size": refused(fill_folder, errno.ENOSPC),
    "rlimits": resource.getrlimit(resource.RLIMIT_AS)[1] > 0
    and resource.getrlimit(resource.RLIMIT_NOFILE)[1] <= 64
    and refused(fill_file, errno.EFBIG),
    "process limit of a session (Linux 5.14)": 1 <= fork_all() < 8,
    "cleared environment": not os.environ,
}
print(json.dumps([name for name, holds in checks.items() if not holds]))
