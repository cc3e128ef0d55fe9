"""The system calls that confinement needs and Python does not offer, through ctypes. Linux, x86_64 and aarch64.

Runs inside the zygote, so it imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x4_0000
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
CLOCK_MONOTONIC = 1

_NUMBERS = {
    "x86_64": {
        "pivot_root": 155,
        "capset": 126,
        "timer_create": 222,
        "timer_settime": 223,
        "seccomp": 317,
        "clone": 56,
        "unshare": 272,
    },
    "aarch64": {
        "pivot_root": 41,
        "capset": 91,
        "timer_create": 107,
        "timer_settime": 110,
        "seccomp": 277,
        "clone": 220,
        "unshare": 97,
    },
}
_SAME_EVERYWHERE = {
    "pidfd_getfd": 438,
    "close_range": 436,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}
_NR = {name: ctypes.c_long(nr) for name, nr in (_SAME_EVERYWHERE | _NUMBERS.get(platform.machine(), {})).items()}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_direct = ctypes.PyDLL(None, use_errno=True).syscall  # keeps the interpreter lock, takes plain numbers: twice as fast
_direct.restype = ctypes.c_long
_direct.argtypes = [ctypes.c_long] * 6
_LAST_DESCRIPTOR = ctypes.c_uint(0xFFFF_FFFF)
_NO_CAPABILITIES_HEADER = (ctypes.c_uint32 * 2)(0x2008_0522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
_NO_CAPABILITIES = (ctypes.c_uint32 * 6)()


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _syscall(name: str, *arguments: Any) -> int:
    return _checked(_libc.syscall(_NR[name], *arguments), name)


def number_of(name: str) -> int:
    """The number of a system call on this machine."""
    return int(_NR[name].value)


def unshare(flags: int) -> None:
    """Leave the namespaces named by ``flags`` for new ones."""
    _checked(_libc.unshare(flags), "unshare")


def set_pid_namespace(descriptor: int) -> None:
    """Let the next children be born into the PID namespace behind ``descriptor``."""
    _checked(_libc.setns(descriptor, CLONE_NEWPID), "setns")


def enter_mounts(descriptor: int) -> None:
    """Go to the mount namespace behind ``descriptor``, a namespace file or the pidfd of a process in it."""
    _checked(_libc.setns(descriptor, CLONE_NEWNS), "setns")


def enter_users(pidfd: int) -> None:
    """Go to the user namespace of the process behind ``pidfd``, for good."""
    _checked(_libc.setns(pidfd, CLONE_NEWUSER), "setns")


FORK_FLAGS = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID
"""Of the clone(2) that forks a session. The low byte, the signal at the child's end, is 0: no handler of the program
runs in a frozen parent, and the program's own ``wait`` does not see the fork."""


def clone_session() -> int:
    """Fork this process with ``FORK_FLAGS``; 0 in the child.

    A bare system call, on purpose: ``os.fork`` would run the program's at-fork handlers and reseed ``random``. What
    it repairs in the child needs no repair here, as parent and child are both thread 1 of their PID namespace.
    """
    return _checked(_direct(_NR["clone"], FORK_FLAGS, 0, 0, 0, 0), "clone")


def rendezvous() -> None:
    """Wait for the zygote: ``unshare(0)`` changes nothing, but the session's filter stops it until it is answered."""
    _checked(_direct(_NR["unshare"], 0, 0, 0, 0, 0), "rendezvous")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount a file system of this ``kind`` at ``target``."""
    result = _libc.mount(
        source.encode(),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _checked(result, f"mount {target}")


def bind(source: str, target: str) -> None:
    """Show ``source``, with what is mounted below it, at ``target``."""
    _checked(_libc.mount(os.fsencode(source), os.fsencode(target), None, MS_BIND | MS_REC, None), f"bind {source}")


def protect(path: str, attributes: int, *, recursive: bool = True) -> None:
    """Add ``MOUNT_ATTR_*`` to the mount at ``path`` and to those below it (mount_setattr(2), Linux 5.12)."""
    what = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    _syscall(
        "mount_setattr",
        ctypes.c_int(AT_FDCWD),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(flags),
        what,
        ctypes.c_size_t(ctypes.sizeof(what)),
    )


def enter_root(path: str) -> None:
    """Make ``path``, a mount point, the root of the mount namespace and let go of the old one."""
    os.chdir(path)
    _syscall("pivot_root", ctypes.c_char_p(b"."), ctypes.c_char_p(b"."))
    _checked(_libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


def take_descriptor(pidfd: int, number: int) -> int:
    """A copy of another process's descriptor (pidfd_getfd(2), Linux 5.6)."""
    return _syscall("pidfd_getfd", ctypes.c_int(pidfd), ctypes.c_int(number), ctypes.c_uint(0))


def prctl(option: int, value: int = 0) -> None:
    """Set one attribute of this process."""
    _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")


def drop_capabilities() -> None:
    """Give up every capability. The bounding set may stay full: no_new_privs and no execve leave it without effect."""
    _syscall("capset", _NO_CAPABILITIES_HEADER, _NO_CAPABILITIES)


def close_from(first: int) -> None:
    """Close every descriptor from ``first`` on (close_range(2), which ``os.closerange`` of an older build lacks)."""
    _syscall("close_range", ctypes.c_uint(first), _LAST_DESCRIPTOR, 0)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def install_filter(program: ctypes.Array[ctypes.c_char], length: int) -> int:
    """Put a seccomp program of ``length`` instructions over the calling thread. There is no way back.

    Returns:
        The descriptor at which the calls that the program refers to user space are answered.
    """
    structure = _Program(length, ctypes.addressof(program))
    return _syscall("seccomp", SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, ctypes.byref(structure))


def landlock_version() -> int:
    """The version of the kernel's Landlock interface."""
    return _syscall("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint(1))


def landlock_create(attributes: bytes) -> int:
    """A new ruleset from a ``struct landlock_ruleset_attr``."""
    return _syscall("landlock_create_ruleset", attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))


def landlock_add(ruleset: int, rule: bytes) -> None:
    """Add a ``struct landlock_path_beneath_attr``."""
    _syscall("landlock_add_rule", ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))


def landlock_restrict(ruleset: int) -> None:
    """Put the calling thread under the rules. There is no way back."""
    _syscall("landlock_restrict_self", ctypes.c_int(ruleset), ctypes.c_uint(0))


class Alarm:
    """A POSIX timer that sends ``number`` to this process, and again every ``again`` seconds until it is stopped.

    Apart from ``signal.setitimer`` and ``signal.alarm``, which belong to the program in the session. A fork does not
    inherit the timer: it calls ``create`` itself.
    """

    def __init__(self, number: int, again: float) -> None:
        self._event = (ctypes.c_int32 * 16)()  # struct sigevent: value[2], signo, notify = SIGEV_SIGNAL
        self._event[2] = number
        self._identity = ctypes.c_int32()
        self._spec = (ctypes.c_int64 * 4)()  # struct itimerspec: interval, value; seconds and nanoseconds each
        self._off = (ctypes.c_int64 * 4)()
        self._spec[0], self._spec[1] = _split(again)
        self._armed, self._disarmed = ctypes.addressof(self._spec), ctypes.addressof(self._off)
        self._settime = number_of("timer_settime")
        self._id = 0

    def create(self) -> None:
        """Make the timer, for the calling process."""
        _syscall("timer_create", CLOCK_MONOTONIC, self._event, ctypes.byref(self._identity))
        self._id = self._identity.value

    def start(self, seconds: float) -> None:
        """Ring after ``seconds``. Does nothing in a process that has no such timer, a fork of the one that had it."""
        self._spec[2], self._spec[3] = _split(seconds)
        _direct(self._settime, self._id, 0, self._armed, 0, 0)

    def stop(self) -> None:
        """Do not ring any more."""
        _direct(self._settime, self._id, 0, self._disarmed, 0, 0)


def _split(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * 1e9) or (1 if not whole else 0)
