"""Hostile programs and what must become of them. Data, run as root and as an ordinary user by ``test_isolation.py``.

Every program prints only what it got away with, so that a wall that holds leaves the expected text.
"""

from __future__ import annotations

import platform
from typing import NamedTuple


class Attack(NamedTuple):
    """A program, and the statuses and the text of its output or error that show that it failed."""

    name: str
    code: str
    statuses: tuple[str, ...] = ("ok",)
    shows: str = "[]"
    deadline: float = 5.0


REFUSED_CALLS = {
    # name: (x86_64, aarch64)
    "acct": (163, 89),
    "add_key": (248, 217),
    "bind": (49, 200),
    "bpf": (321, 280),
    "capset": (126, 91),
    "chroot": (161, 51),
    "clock_settime": (227, 112),
    "clone3": (435, 435),
    "connect": (42, 203),
    "delete_module": (176, 106),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsopen": (430, 430),
    "init_module": (175, 105),
    "inotify_init1": (294, 26),
    "io_uring_enter": (426, 426),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "landlock_create_ruleset": (444, 444),
    "memfd_create": (319, 279),
    "mknodat": (259, 33),
    "mlock": (149, 228),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "sched_setscheduler": (144, 119),
    "seccomp": (317, 277),
    "semget": (64, 190),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setresuid": (117, 147),
    "setuid": (105, 146),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vmsplice": (278, 75),
}
_COLUMN = 0 if platform.machine() == "x86_64" else 1


def _call(number: int, *arguments: int) -> str:
    """A program that makes one system call and prints how it was refused."""
    return f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
result = libc.syscall(*map(ctypes.c_long, {(number, *arguments)}))
print("refused" if result == -1 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS) else "got away with it")
"""


CALLS = [
    Attack(f"call {name}", _call(numbers[_COLUMN], 0, 0, 0, 0, 0), shows="refused")
    for name, numbers in REFUSED_CALLS.items()
]

ARGUMENTS = [
    Attack("clone into a user namespace", _call((56, 220)[_COLUMN], 0x1000_0011, 0, 0, 0, 0), shows="refused"),
    Attack("clone into a PID namespace", _call((56, 220)[_COLUMN], 0x2000_0011, 0, 0, 0, 0), shows="refused"),
    Attack("prctl: do not die with the zygote", _call((157, 167)[_COLUMN], 1, 0, 0, 0, 0), shows="refused"),
    Attack("prctl: dumpable again", _call((157, 167)[_COLUMN], 4, 1, 0, 0, 0), shows="refused"),
    Attack(
        "fcntl: large pipes",
        "import fcntl, os\nfcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
        ("error",),
        "PermissionError",
    ),
    Attack("ioctl: type into the terminal", "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')", ("error",), "OSError"),
    Attack(
        "socketpair of a network family",
        "import socket\nsocket.socketpair(socket.AF_INET)",
        ("error",),
        "PermissionError",
    ),
]
if platform.machine() == "x86_64":
    ARGUMENTS.append(Attack("x32 call", _call(0x4000_0000 | 39), ("killed",), "SIGSYS"))

READING = [
    Attack("environment", "import os\nprint(list(os.environ.items()))"),
    Attack(
        "environment of the C library",
        "import ctypes\ngetenv = ctypes.CDLL(None).getenv\ngetenv.restype = ctypes.c_char_p\n"
        "print([n for n in (b'PATH', b'HOME', b'PYTHONHASHSEED', b'HF_TOKEN') if getenv(n)])",
    ),
    Attack(
        "files of the host",
        "import os\nprint([p for p in ('/etc', '/etc/shadow', '/etc/passwd', '/root/.bashrc', '/home/user', '/var',"
        "'/proc/1/environ', '/proc/self', '/proc/kcore', '/sys/kernel', '/bin/sh', '/usr/bin', '/run', '/dev/sda',"
        "'/dev/mem', '/dev/tty', '/dev/kmsg', '/boot', '/srv', '/opt/secret') if os.path.lexists(p)])",
    ),
    Attack(
        "names in the root",
        "import os\nknown = {'dev', 'work', 'tmp', 'packages', 'lib', 'lib64', 'lib32', 'libx32'}\n"
        "print([n for n in os.listdir('/') if n not in known and os.path.isfile('/' + n)])",
    ),
    Attack(
        "installed packages that were not asked for",
        "import os\nprint([os.path.join(f, n) for f, d, _ in os.walk('/') for n in d if n in "
        "('site-packages', 'dist-packages') and os.listdir(os.path.join(f, n))])",
    ),
    Attack("packages by name", "import pip", ("error",), "ModuleNotFoundError"),
    Attack(
        "walking out of the root",
        "import os\nfd = os.open('/', os.O_RDONLY)\nfor _ in range(40):\n"
        "    fd = os.open('..', os.O_RDONLY, dir_fd=fd)\n"
        "print([n for n in ('etc', 'home', 'proc', 'var') if n in os.listdir(fd)])",
    ),
    Attack(
        "the old working folder",
        "import os\nos.chdir('/')\nos.chdir('../../../..')\n"
        "print([n for n in ('etc', 'proc', 'var') if n in os.listdir('.')])",
    ),
    Attack(
        "inherited descriptors",
        "import os\nfound = []\nfor fd in range(4, 64):\n"
        "    try:\n        os.fstat(fd)\n        found.append(fd)\n    except OSError:\n        pass\nprint(found)",
    ),
    Attack("name of the host", "import os\nprint(os.uname().nodename)", shows="sandbox"),
]

WRITING = [
    Attack(
        "writing outside the scratch folders",
        "import os\nmade = []\nfor folder, _, _ in os.walk('/'):\n"
        "    if folder.startswith(('/work', '/tmp')):\n        continue\n"
        "    try:\n        os.close(os.open(folder + '/x', os.O_CREAT | os.O_WRONLY))\n        made.append(folder)\n"
        "    except OSError:\n        pass\nprint(made)",
    ),
    Attack("changing the library", "import json\nopen(json.__file__, 'a')", ("error",), "Error"),
    Attack("deleting the library", "import json, os\nos.unlink(json.__file__)", ("error",), "Error"),
    Attack("making it writable", "import json, os\nos.chmod(json.__file__, 0o777)", ("error",), "Error"),
    Attack("device node", "import os\nos.mknod('/work/sda', 0o60666, os.makedev(8, 0))", ("error",), "PermissionError"),
    Attack("program file", "import os\nos.execv('/work/x', ['x'])", ("error",), "PermissionError"),
    Attack("shell", "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'id'])", ("error",), "Error"),
    Attack("shell through libc", "import os\nprint('none' if os.system('id') else 'ran')", shows="none"),
    Attack(
        "code from a library of one's own",
        "import _ctypes, ctypes, shutil\nshutil.copy(_ctypes.__file__, '/work/x.so')\nctypes.CDLL('/work/x.so')",
        ("error",),
        "OSError",
    ),
]

REACHING = [
    Attack(
        "sockets of every family",
        "import socket\nmade = []\nfor family in range(46):\n    for kind in (1, 2, 3):\n        try:\n"
        "            made.append(socket.socket(family, kind))\n        except OSError:\n            pass\nprint(made)",
    ),
    Attack(
        "a web page",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1', timeout=1)",
        ("error",),
        "Error",
    ),
    Attack("a name", "import socket\nsocket.getaddrinfo('example.com', 80)", ("error",), "gaierror"),
    Attack("an abstract socket", "import socket\nsocket.socketpair()[0].bind('\\0x')", ("error",), "PermissionError"),
    Attack(
        "processes of the host",
        "import os\nfound = []\nfor pid in range(2, 40000):\n"
        "    try:\n        os.kill(pid, 0)\n        found.append(pid)\n"
        "    except ProcessLookupError:\n        pass\nprint(found)",
    ),
    Attack("everybody's end", "import os, signal\nos.kill(-1, signal.SIGKILL)", ("ok", "error"), ""),
    Attack("the process group's end", "import os, signal\nos.kill(0, signal.SIGTERM)\nprint([])"),
    Attack("the parent's end", "import os\nprint([os.getppid()])", shows="[0]"),
    Attack("becoming root", "import os\nos.setuid(0)", ("error",), "PermissionError"),
    Attack("another group", "import os\nos.setgroups([0])", ("error",), "PermissionError"),
    Attack(
        "higher limits",
        "import resource\nraised = []\nfor kind in range(16):\n    soft, hard = resource.getrlimit(kind)\n"
        "    if hard == resource.RLIM_INFINITY:\n        continue\n"
        "    try:\n        resource.setrlimit(kind, (hard + 1, hard + 1))\n"
        "        raised.append(kind)\n    except (ValueError, OSError):\n        pass\nprint(raised)",
    ),
]

FILLING = [
    Attack("memory in one piece", "x = bytearray(1 << 40)", ("memory",), "MemoryError"),
    Attack("memory in small pieces", "x = []\nwhile True:\n    x.append(bytes(1 << 20))", ("memory",), "MemoryError"),
    Attack("a large number", "x = 1 << (1 << 36)", ("memory", "error"), "Error"),
    Attack(
        "unpacking",
        "import zlib\nx = zlib.compress(bytes(1 << 24))\ny = zlib.decompress(x) * 100",
        ("memory",),
        "MemoryError",
    ),
    Attack(
        "a disk",
        "f = open('/work/x', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))\n    f.flush()",
        ("error",),
        "OSError",
    ),
    Attack(
        "many files", "n = 0\nwhile True:\n    n += 1\n    open(f'/work/{n}', 'w').close()", ("error",), "No space left"
    ),
    Attack(
        "shared memory", "f = open('/dev/shm/x', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))", ("error",), "OSError"
    ),
    Attack("descriptors", "import os\nx = []\nwhile True:\n    x.append(os.dup(0))", ("error",), "Too many open files"),
    Attack("pipes", "import os\nwhile True:\n    os.pipe()", ("error",), "Too many open files"),
    Attack("processes", "import os\nwhile True:\n    os.fork()", ("error",), "BlockingIOError"),
    Attack(
        "threads",
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        ("error",),
        "can't start new thread",
    ),
    Attack("recursion", "def f():\n    f()\nf()", ("error",), "RecursionError"),
    Attack(
        "recursion without a limit",
        "import json, sys\nsys.setrecursionlimit(1 << 30)\njson.loads('[' * 10**6)",
        ("killed", "memory", "error"),
        "",
    ),
    Attack("output", "while True:\n    print('x' * 1000)", ("timeout",), "more bytes of output cut", 0.4),
    Attack("raw output", "import os\nwhile True:\n    os.write(1, bytes(1 << 16))", ("error",), "File too large"),
]

STAYING = [
    Attack("a loop", "while True:\n    pass", ("timeout",), "variables and files are kept", 0.2),
    Attack("a sleep", "import time\ntime.sleep(60)", ("timeout",), "variables and files are kept", 0.2),
    Attack(
        "a pattern", "import re\nre.match('(a+)+$', 'a' * 40 + 'b')", ("timeout",), "variables and files are kept", 0.2
    ),
    Attack(
        "catching everything",
        "while True:\n    try:\n        sum(range(100))\n    except BaseException:\n        pass",
        ("timeout",),
        "variables and files are kept",
        0.2,
    ),
    Attack("C code", "sum(range(10**12))", ("timeout",), "variables and files are lost", 0.2),
    Attack(
        "ignoring signals",
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    pass",
        ("timeout",),
        "variables and files are lost",
        0.2,
    ),
    Attack(
        "blocking signals",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True:\n    pass",
        ("timeout",),
        "variables and files are lost",
        0.2,
    ),
    Attack("standard input", "input()", ("error",), "EOFError"),
]

BREAKING = [
    Attack("exit", "import sys\nsys.exit(3)", ("error",), "SystemExit: 3"),
    Attack("exit at once", "import os\nos._exit(3)", ("killed",), "exit status 3"),
    Attack("abort", "import os\nos.abort()", ("killed",), "was ended by SIG"),
    Attack("segfault", "import ctypes\nctypes.string_at(0)", ("killed",), "SIGSEGV"),
    Attack("closing the control socket", "import os\nos.close(3)", ("killed",), "lost"),
    Attack("closing everything", "import os\nos.closerange(0, 64)", ("killed",), "lost"),
    Attack("no builtins", "import builtins\nvars(builtins).clear()", ("error", "killed"), ""),
    Attack("no modules", "import sys\nsys.modules.clear()", ("ok", "error", "killed"), ""),
    Attack("poisoned modules", "import json, os\njson.dumps = os.write = os.getpid = None", ("error", "killed"), ""),
    Attack(
        "a string that cannot be shown",
        "class E(Exception):\n    def __str__(self):\n        return 1 / 0\nraise E",
        ("error",),
        "E",
    ),
    Attack(
        "a repr that does not end",
        "class R:\n    def __repr__(self):\n        while True:\n            pass\nR()",
        ("timeout",),
        "kept",
        0.2,
    ),
    Attack("not UTF-8", "x = '\ud800'", ("error",), "UnicodeEncodeError"),
    Attack("a null byte", "x = '\0'", ("error",), "null bytes"),
    Attack("deep nesting", "(" * 5000 + ")" * 5000, ("error", "memory"), ""),
]

ATTACKS = [*CALLS, *ARGUMENTS, *READING, *WRITING, *REACHING, *FILLING, *STAYING, *BREAKING]
