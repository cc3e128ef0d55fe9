"""The seccomp filter of a session, assembled by hand so that nothing but the kernel is needed.

The filter (classic BPF over ``struct seccomp_data``, see seccomp(2)) allows what a Python program needs for files,
memory, threads, children, waiting and time. Whatever is not listed fails with EPERM, or with ENOSYS where a C library
is meant to fall back to an older call. There is no ``execve``, ``socket``, ``ptrace``, ``mount``, ``setns``,
``bpf``, ``io_uring_setup``, ``memfd_create``, SysV IPC or key ring. A call of another ABI (x32, i386) kills.

Two calls stop and wait for the zygote's verdict (``forks.py``), which is EPERM unless a fork was asked for: the very
clone(2) that forks a session, and unshare(0), with which runner and zygote meet. capset(2) is open because a fork drops
what its user namespace brought; it never adds anything to a process that has nothing.

Runs inside the zygote, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from itertools import pairwise

from agentrl.sandbox.kernel import FORK_FLAGS

ALLOWED = {
    "files": """read:0:63 write:1:64 open:2: close:3:57 stat:4: fstat:5:80 lstat:6: lseek:8:62 pread64:17:67
        pwrite64:18:68 readv:19:65 writev:20:66 preadv:295:69 pwritev:296:70 preadv2:327:286 pwritev2:328:287
        access:21: openat:257:56 newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44 faccessat:269:48
        faccessat2:439:439 readlink:89: readlinkat:267:78 getdents:78: getdents64:217:61 getcwd:79:17 chdir:80:49
        fchdir:81:50 mkdir:83: mkdirat:258:34 rmdir:84: unlink:87: unlinkat:263:35 rename:82: renameat:264:38
        renameat2:316:276 link:86: linkat:265:37 symlink:88: symlinkat:266:36 chmod:90: fchmod:91:52 fchmodat:268:53
        fchmodat2:452:452 umask:95:166 truncate:76:45 ftruncate:77:46 fallocate:285:47 fsync:74:82 fdatasync:75:83
        sync_file_range:277:84 flock:73:32 utime:132: utimes:235: futimesat:261: utimensat:280:88 dup:32:23 dup2:33:
        dup3:292:24 pipe:22: pipe2:293:59 sendfile:40:71 copy_file_range:326:285 fadvise64:221:223 readahead:187:213
        close_range:436:436 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12
        flistxattr:196:13 creat:85:""",
    "memory": """brk:12:214 mmap:9:222 munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233 msync:26:227
        mincore:27:232 membarrier:324:283""",
    "waiting": """poll:7: ppoll:271:73 select:23: pselect6:270:72 epoll_create:213: epoll_create1:291:20
        epoll_ctl:233:21 epoll_wait:232: epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284: eventfd2:290:19
        timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87 signalfd:282: signalfd4:289:74 pause:34:
        nanosleep:35:101 clock_nanosleep:230:115 restart_syscall:219:128""",
    "socket pairs": """sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 sendmmsg:307:269 recvmmsg:299:243
        shutdown:48:210 getsockname:51:204 getpeername:52:205""",
    "processes": """fork:57: vfork:58: exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 kill:62:129 tkill:200:130
        tgkill:234:131 set_tid_address:218:96 set_robust_list:273:99 get_robust_list:274:100 futex:202:98
        futex_waitv:449:449 rseq:334:293 arch_prctl:158: gettid:186:178 getpid:39:172 getppid:110:173 getpgrp:111:
        getpgid:121:155 setpgid:109:154 getsid:124:156 setsid:112:157 getuid:102:174 geteuid:107:175 getgid:104:176
        getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 capget:125:90 capset:126:91
        getrlimit:97:163 getrusage:98:165 getpriority:140:141 sched_yield:24:124
        sched_getaffinity:204:123 sched_getscheduler:145:120 sched_getparam:143:121 sched_get_priority_max:146:125
        sched_get_priority_min:147:126 getcpu:309:168""",
    "signals": """rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136
        rt_sigtimedwait:128:137 rt_sigsuspend:130:133 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240
        sigaltstack:131:132 alarm:37: getitimer:36:102 setitimer:38:103 timer_create:222:107 timer_settime:223:110
        timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111""",
    "facts": """time:201: gettimeofday:96:169 clock_gettime:228:113 clock_getres:229:114 times:100:153 uname:63:160
        sysinfo:99:179 getrandom:318:278""",
}
"""``name:x86_64:aarch64``; a number is left out where the architecture has no such call."""

CHECKED = {
    "clone": (56, 220),
    "ioctl": (16, 29),
    "prctl": (157, 167),
    "fcntl": (72, 25),
    "socketpair": (53, 199),
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
    "unshare": (272, 97),
    "getsockopt": (55, 209),
}
"""Calls whose arguments decide."""

_ARCHITECTURES = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}
_X32_BIT = 0x4000_0000
_FIRST_WITH_FALLBACK = 424
"""From pidfd_send_signal (Linux 5.1) on, numbers are the same everywhere and C libraries expect ENOSYS."""

_NEW_NAMESPACES = 0x7E02_0000
_TERMINAL_QUERIES = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIO(N)CLEX
_PRCTL_HARMLESS = (
    15,
    16,
    21,
    23,
    39,
    0x5356_4D41,
)  # SET_NAME GET_NAME GET_SECCOMP CAPBSET_READ GET_NO_NEW_PRIVS SET_VMA
_FIXED_LIMITS = (4, 6)
"""RLIMIT_CORE: lowered from 1 to 0 it would let a core dump reach the host's handler. RLIMIT_NPROC: only the soft limit
is the session's own, because its forks' count in it."""
_F_SETPIPE_SZ = 1031
_AF_UNIX = 1
_SOCKET_FACTS = (3, 4, 7, 8, 30, 38, 39)
"""SO_TYPE, ERROR, SNDBUF, RCVBUF, ACCEPTCONN, PROTOCOL, DOMAIN; SO_PEERPIDFD would reach the manager."""

_LOAD, _RETURN = 0x20, 0x06
_JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET = 0x15, 0x35, 0x45
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _ASK = 0x7FFF_0000, 0x8000_0000, 0x7FC0_0000
_DENY = 0x0005_0000 | errno.EPERM
_ABSENT = 0x0005_0000 | errno.ENOSYS
_NOT_A_TERMINAL = 0x0005_0000 | errno.ENOTTY

Instruction = tuple[int, int, int, int]
"""code, jump if true, jump if false, constant"""


def supported() -> bool:
    """Whether this machine's system calls are in the table."""
    return platform.machine() in _ARCHITECTURES and ctypes.sizeof(ctypes.c_void_p) == 8


def allowed_numbers(machine: str) -> dict[str, int]:
    """The calls that are allowed whatever their arguments, by name."""
    column = _ARCHITECTURES[machine][0] + 1
    entries = (entry.split(":") for group in ALLOWED.values() for entry in group.split())
    return {entry[0]: int(entry[column]) for entry in entries if entry[column]}


def assemble(machine: str | None = None) -> tuple[ctypes.Array[ctypes.c_char], int]:
    """The filter for ``machine`` (default: this one) as bytes for the kernel, and its number of instructions."""
    program = instructions(machine or platform.machine())
    return ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program)), len(program)


def instructions(machine: str) -> list[Instruction]:
    """The filter, readable."""
    column, architecture = _ARCHITECTURES[machine]
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        program += [(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL)]
    checks = {
        "clone": [
            *(_argument(0), (_JUMP_EQUAL, 0, 1, FORK_FLAGS), _give(_ASK)),
            *((_JUMP_SET, 0, 1, _NEW_NAMESPACES), _give(_DENY), _give(_ALLOW)),
        ],
        "unshare": [_argument(0), (_JUMP_EQUAL, 0, 1, 0), _give(_ASK), _give(_DENY)],
        "setrlimit": [*_unless_in(0, _FIXED_LIMITS), _give(_DENY)],
        "prlimit64": [
            *_unless_in(1, _FIXED_LIMITS),
            *(_argument(2), (_JUMP_EQUAL, 1, 0, 0), _give(_DENY)),
            *(_argument(2, high=True), (_JUMP_EQUAL, 1, 0, 0), _give(_DENY), _give(_ALLOW)),
        ],
        "ioctl": _one_of(1, _TERMINAL_QUERIES, _NOT_A_TERMINAL),
        "prctl": _one_of(0, _PRCTL_HARMLESS, _DENY),
        "fcntl": [_argument(1), (_JUMP_EQUAL, 0, 1, _F_SETPIPE_SZ), _give(_DENY), _give(_ALLOW)],
        "getsockopt": _one_of(2, _SOCKET_FACTS, _DENY),
        "socketpair": _one_of(0, (_AF_UNIX,), _DENY),
    }
    for name, check in checks.items():
        program += [(_JUMP_EQUAL, 0, len(check), CHECKED[name][column]), *check]
    return program + _search(_segments(set(allowed_numbers(machine).values())))


def _give(verdict: int) -> Instruction:
    return (_RETURN, 0, 0, verdict)


def _argument(index: int, *, high: bool = False) -> Instruction:
    """Load one half of an argument; the low one is all that the kernel looks at where it takes a 32-bit value."""
    return (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * index + 4 * high)


def _unless_in(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow unless the argument is one of ``values``; then go on after these instructions."""
    tests = [(_JUMP_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [_argument(index), *tests, _give(_ALLOW)]


def _one_of(index: int, values: tuple[int, ...], otherwise: int) -> list[Instruction]:
    tests = [(_JUMP_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [_argument(index), *tests, _give(otherwise), _give(_ALLOW)]


def _segments(allowed: set[int]) -> list[tuple[int, int]]:
    """(first number, verdict) of every run of system call numbers that share a verdict, ascending."""

    def verdict(number: int) -> int:
        if number in allowed:
            return _ALLOW
        return _ABSENT if number >= _FIRST_WITH_FALLBACK else _DENY

    last = max(allowed) + 1
    verdicts = [(number, verdict(number)) for number in range(last + 1)]
    return [verdicts[0]] + [after for before, after in pairwise(verdicts) if before[1] != after[1]]


def _search(segments: list[tuple[int, int]]) -> list[Instruction]:
    """Binary search for the segment that holds the number: about seven comparisons for any call.

    The kernel checks and translates the filter once per session, so its length is paid for every time.
    """
    if len(segments) == 1:
        return [_give(segments[0][1])]
    middle = len(segments) // 2
    low, high = _search(segments[:middle]), _search(segments[middle:])
    if len(low) > 255:
        raise ValueError(f"a jump over {len(low)} instructions does not fit into 8 bits")
    return [(_JUMP_GREATER_EQUAL, len(low), 0, segments[middle][0]), *low, *high]
