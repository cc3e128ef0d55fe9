"""Forks: what cannot be copied, what a fork must not reach, and the calls of a fork that nobody asked for."""

from __future__ import annotations

from .steps import ROOT, Cell, Fork, Get, Open, Program, Put, Step
from .syscalls import CALL, COLUMN, FORK_FLAGS, REFUSED, numbers

_CLONE, _UNSHARE, _UMOUNT = (56, 220)[COLUMN], (272, 97)[COLUMN], (166, 39)[COLUMN]
_ANY = ("ok", "error", "killed", "memory", "timeout")


def _refused(name: str, code: str, reason: str = "") -> Program:
    """A program with something that no fork can have a copy of; it goes on after the refusal."""
    return Program(name, (Cell(code, shows=""), Fork(ends=("ForkRefused",), shows=reason), Cell("print([])")))


def _forked(
    name: str,
    before: str,
    inside: str,
    *steps: Step,
    statuses: tuple[str, ...] = ("ok",),
    shows: str = "[]",
    deadline: float = 5.0,
) -> Program:
    """A program that is honest until it is forked and then attacks where it came from.

    ``x`` must be untouched in the parent and in another fork of it.
    """
    opening = f"open('/work/x', 'w').write('parent')\nopen('/tmp/x', 'w').write('parent')\n{before}"
    return Program(
        name,
        (
            Cell(opening, shows=""),
            Fork(),
            Cell(inside, statuses, shows, deadline, on="fork"),
            *steps,
            Fork("second"),
            Cell("print(open('/work/x').read(), open('/tmp/x').read())", shows="parent parent", on="second"),
        ),
    )


def _many(name: str, count: int, chain: bool, inside: str) -> Program:
    names = [ROOT, *(f"fork{i}" for i in range(count))]
    forks = [Fork(to, ("forked", "ForkRefused"), on=names[i] if chain else ROOT) for i, to in enumerate(names[1:])]
    cells = [Cell(inside, on=to) for to in names[1:]]
    steps = [step for pair in zip(forks, cells, strict=True) for step in pair] if chain else [*forks, *cells]
    return Program(name, (Cell("x = 1", shows=""), *steps))


_EVERY_CALL = numbers(*(name for group in REFUSED.values() for name in group))
_TRAPPED = (_CLONE, FORK_FLAGS), (_UNSHARE, 0)
_FLOOD = (
    f"{CALL}\n"
    "import os, threading, time\n"
    "def flood():\n"
    "    while True:\n"
    f"        refused({_CLONE}, {FORK_FLAGS}, 0, 0, 0, 0)\n"
)

UNASKED = [
    Program(
        "the calls of a fork, when none was asked for",
        (Cell(f"{CALL}\nprint([call for call in {_TRAPPED} * 20 if not refused(*call, 0, 0, 0, 0)])"),),
    ),
    Program(
        "the calls of a fork, in a fork",
        (
            Cell("x = 1", shows=""),
            Fork(),
            Cell(f"{CALL}\nprint([c for c in {_TRAPPED} * 5 if not refused(*c, 0, 0, 0, 0)])", on="fork"),
        ),
    ),
    Program(
        "a flood of calls",
        (
            Open("other"),
            Cell(f"{_FLOOD}flood()", ("timeout", "killed"), "", deadline=0.5),
            Cell("print([])", on="other", deadline=1.0),
        ),
    ),
    Program(
        "a flood of calls from many processes",
        (
            Open("other"),
            Cell(f"{_FLOOD}for _ in range(12):\n    if os.fork() == 0:\n        flood()", _ANY, ""),
            Cell("print([])", on="other", deadline=2.0),
            Fork("fork", on="other"),
            Open("third"),
            Cell("print([])", on="third", deadline=2.0),
        ),
    ),
    Program(
        "a flood of calls from many threads",
        (
            Open("other"),
            Cell(
                f"{_FLOOD}for _ in range(12):\n"
                "    threading.Thread(target=flood, daemon=True).start()\n"
                "time.sleep(0.5)",
                _ANY,
                "",
            ),
            Cell("print([])", on="other", deadline=2.0),
            Open("third"),
            Cell("print([])", on="third", deadline=2.0),
        ),
    ),
]

UNCOPYABLE = [
    _refused("memory shared with the fork", "import mmap\nm = mmap.mmap(-1, 4096)", "shared memory"),
    _refused(
        "a file's memory shared with the fork",
        "import mmap\nf = open('x', 'w+b')\nf.truncate(4096)\nm = mmap.mmap(f.fileno(), 0)\nf.close()",
        "shared memory",
    ),
    _refused(
        "a file's memory, shared and read-only until later",
        "import mmap\n"
        "f = open('x', 'w+b')\n"
        "f.truncate(4096)\n"
        "m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
        "f.close()",
        "shared memory",
    ),
    _refused(
        "a thread that survives the fork",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "thread",
    ),
    _refused("a child that survives the fork", "import os, time\nif os.fork() == 0:\n    time.sleep(60)", "child"),
    _refused(
        "a daemon that survives the fork",
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.wait()",
        "child",
    ),
    _refused("a dead child that nobody has waited for", "import os\nif os.fork() == 0:\n    os._exit(0)", "child"),
    _refused("a pipe to the fork", "import os\nr, w = os.pipe()", "pipe"),
    _refused(
        "descriptors hidden in a socket",
        "import os, socket\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [os.open('/work', os.O_RDONLY)])",
        "socket",
    ),
    _refused("an event that both see", "import os\ne = os.eventfd(0)"),
    _refused("a lock that both hold", "import fcntl\nf = open('x', 'w')\nfcntl.flock(f, fcntl.LOCK_EX)", "lock"),
    _refused(
        "a database", "import sqlite3\nc = sqlite3.connect('/work/db')\nc.execute('create table t (x)')", "sqlite"
    ),
    _refused(
        "an alarm in the frozen parent",
        "import os, signal\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(-1, 9))\n"
        "signal.setitimer(signal.ITIMER_REAL, 60)",
        "timer",
    ),
    _refused("a folder that is gone", "import os\nos.mkdir('d')\nos.chdir('d')\nos.rmdir('/work/d')"),
    _refused(
        "a socket in the place of the control socket",
        "import os, socket, threading\n"
        "a, b = socket.socketpair()\n"
        "socket.send_fds(a, [b'x'], [os.open('/work', os.O_RDONLY)])\n"
        "a.detach(), b.detach()",
    ),
]

_BEFORE = (
    "import fcntl, os\n"
    "fd = os.open('/work/x', os.O_RDWR)\n"
    "folder = os.open('/work', os.O_RDONLY | os.O_DIRECTORY)\n"
    "path = os.open('/tmp', os.O_PATH | os.O_DIRECTORY)\n"
    "f = open('/tmp/x', 'r+')\n"
    "f.read(2)"
)
FROM_INSIDE = [
    _forked(
        "old descriptors of files",
        _BEFORE,
        "os.pwrite(fd, b'evil!!', 0)\nf.write('evil')\nf.flush()\nf.truncate(1)\nprint([])",
    ),
    _forked(
        "old descriptors of folders",
        _BEFORE,
        "for old in (folder, path):\n"
        "    n = os.open('x', os.O_WRONLY | os.O_TRUNC, dir_fd=old)\n"
        "    os.write(n, b'evil')\n"
        "    os.unlink('x', dir_fd=old)\n"
        "    os.close(os.open('y', os.O_CREAT, dir_fd=old))\n"
        "print([])",
    ),
    _forked(
        "old descriptors by number",
        _BEFORE,
        "for old in range(64):\n"
        "    for action in (lambda: os.pwrite(old, b'evil!!', 0), lambda: os.ftruncate(old, 0) if old > 3 else 0,\n"
        "        lambda: os.unlink('x', dir_fd=old), lambda: os.chdir(old) or os.unlink('x')):\n"
        "        try:\n"
        "            action() if old != 3 else None\n"
        "        except OSError:\n"
        "            pass\n"
        "print([])",
    ),
    _forked(
        "a folder above the old one",
        _BEFORE,
        "found = []\n"
        "for old in (folder, path):\n"
        "    at = os.open('..', os.O_RDONLY, dir_fd=old)\n"
        "    for name in ('work', 'tmp'):\n"
        "        if os.stat(name, dir_fd=at).st_dev != os.stat('/' + name).st_dev:\n"
        "            found.append(name)\n"
        "print(found)",
    ),
    _forked(
        "the working folder",
        "import os\nos.mkdir('d')\nos.chdir('d')",
        "os.unlink('../x')\nopen('../x', 'w').write('evil')\nprint([])",
    ),
    _forked(
        "the mounts below the new ones",
        "",
        f"{CALL}\n"
        "import os\n"
        "names = [ctypes.create_string_buffer(n) for n in (b'/work', b'/tmp', b'.')]\n"
        f"calls = [({_UMOUNT}, ctypes.addressof(name), flags) for name in names for flags in (0, 1, 2, 8)]\n"
        "print([call for call in calls if not refused(*call)])\n"
        "import shutil\n"
        "shutil.rmtree('/work', ignore_errors=True)\n"
        "shutil.rmtree('/tmp', ignore_errors=True)",
    ),
    _forked(
        "the parent's processes",
        "",
        "import os, signal\n"
        "for pid in (-1, 0, os.getppid(), 2, 3):\n"
        "    try:\n"
        "        os.kill(pid, signal.SIGKILL) if pid else None\n"
        "    except OSError:\n"
        "        pass\n"
        "print([os.getpid(), os.getppid()] if os.getppid() else [])",
    ),
    _forked(
        "the parent's limits",
        "",
        "import resource\n"
        "found = []\n"
        "for pid in range(2, 2000):\n"
        "    try:\n"
        "        resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1))\n"
        "        found.append(pid)\n"
        "    except (ProcessLookupError, PermissionError):\n"
        "        pass\n"
        "print(found)",
    ),
    _forked(
        "the parent's locks",
        "import fcntl, os\nfd = os.open('/work/x', os.O_RDWR)",
        "fcntl.flock(fd, fcntl.LOCK_EX)\nprint([])",
        Fork("third"),
        Cell("fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\nprint([])", on="third"),
    ),
    _forked(
        "the parent's offsets",
        "f = open('/work/x')\nf.read(2)",
        "f.read()\nprint([])",
        Fork("third"),
        Cell("print(f.read())", shows="rent", on="third"),
    ),
    _forked(
        "the parent's memory",
        "secret = ['parent']",
        "import ctypes\nsecret[0] = 'evil'\nctypes.memset(id(secret), 0, 16)\nprint([])",
        Fork("third"),
        Cell("print(secret)", shows="['parent']", on="third"),
    ),
    _forked(
        "every forbidden call, in a fork",
        "",
        f"{CALL}\nprint([n for n, number in {_EVERY_CALL}.items() if not refused(number, 0, 0, 0, 0, 0)])",
    ),
    _forked(
        "the rights of a new user namespace",
        "",
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
        "libc.capget(header, sets)\n"
        "ambient = [c for c in range(41) if libc.prctl(47, 1, c, 0, 0) == 1]\n"
        "print([*filter(None, sets), *ambient])",
    ),
    _forked(
        "higher limits, in a fork",
        "",
        "import resource\n"
        "raised = []\n"
        "for kind in range(16):\n"
        "    soft, hard = resource.getrlimit(kind)\n"
        "    for wanted in ((hard + 1, hard + 1), (hard, hard)):\n"
        "        if hard == -1 and kind != resource.RLIMIT_NPROC or wanted == (soft, hard):\n"
        "            continue\n"
        "        try:\n"
        "            resource.setrlimit(kind, wanted)\n"
        "            raised.append(kind)\n"
        "        except (ValueError, OSError, OverflowError):\n"
        "            pass\n"
        "print(raised)",
    ),
    _forked(
        "processes, counted in a fork",
        "",
        "import os, time\n"
        "n = 1\n"
        "try:\n"
        "    while n < 200:\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(60)\n"
        "        n += 1\n"
        "except BlockingIOError:\n"
        "    pass\n"
        "print([n] if n > 32 else [])",
        Fork("third"),
        Cell("import os\npid = os.fork()\nif pid:\n    print(os.waitpid(pid, 0)[1])", shows="0", on="third"),
    ),
    _forked(
        "inherited descriptors, in a fork",
        "",
        "import os\n"
        "found = []\n"
        "for fd in range(4, 64):\n"
        "    try:\n"
        "        os.fstat(fd)\n"
        "        found.append(fd)\n"
        "    except OSError:\n"
        "        pass\n"
        "print(found)",
    ),
    _forked(
        "memory, in a fork",
        "",
        "x = []\nwhile True:\n    x.append(bytes(1 << 20))",
        Fork("third"),
        Cell("print([])", on="third"),
        statuses=("memory", "killed"),
        shows="",
    ),
    _forked(
        "a disk, in a fork",
        "",
        "f = open('/work/y', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))\n    f.flush()",
        Fork("third"),
        Cell("open('/work/y', 'wb').write(bytes(1 << 20))\nprint([])", on="third"),
        statuses=("error",),
        shows="OSError",
    ),
    _forked(
        "forged answers, in a fork",
        "",
        "import os, time\nos.write(3, b'\\xff' * 100)\ntime.sleep(5)",
        statuses=("killed",),
        shows="control protocol",
    ),
    _forked(
        "dying, in a fork",
        "",
        "import os\nos._exit(3)",
        Fork("third"),
        Cell("print([])", on="third"),
        statuses=("killed",),
        shows="exit status 3",
    ),
    _forked(
        "a deaf fork",
        "",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True:\n    pass",
        statuses=("timeout",),
        shows="lost",
        deadline=0.2,
    ),
    Program(
        "a sibling",
        (
            Cell("open('x', 'w').write('parent')\nsecret = 1", shows=""),
            Fork("one"),
            Fork("other"),
            Cell(
                "secret = 2\nopen('/work/x', 'w').write('other')\nopen('/tmp/y', 'w').write('other')",
                shows="",
                on="other",
            ),
            Cell(
                "import os, signal\n"
                "found = [os.path.exists(f'/proc/{pid}/mem') for pid in range(1, 50)]\n"
                "for pid in range(2, 2000):\n"
                "    try:\n"
                "        os.kill(pid, signal.SIGKILL)\n"
                "        found.append(pid)\n"
                "    except OSError:\n"
                "        pass\n"
                "try:\n"
                "    os.kill(-1, signal.SIGKILL)\n"
                "except OSError:\n"
                "    pass\n"
                "print([f for f in found if f], secret, open('/work/x').read(), os.path.exists('/tmp/y'))",
                shows="[] 1 parent False",
                on="one",
            ),
            Cell("print(secret, open('/work/x').read())", shows="2 other", on="other"),
        ),
    ),
    Program(
        "the frozen parent, used after all",
        (
            Cell("open('x', 'w').write('parent')", shows=""),
            Fork(),
            Cell("open('x', 'w').write('evil')", raises=("SessionFrozen",)),
            Put("x", raises=("SessionFrozen",)),
            Get("x", raises=("SessionFrozen",)),
            Cell("print([])", on="fork"),
        ),
    ),
    _many("forks of forks of forks", 36, True, "print([x - 1] if x - 1 else [])"),
    _many(
        "more forks than a session may have processes",
        40,
        False,
        "import os\npid = os.fork()\nprint([] if pid and not os.waitpid(pid, 0)[1] else [])",
    ),
]

PROGRAMS = [*UNASKED, *UNCOPYABLE, *FROM_INSIDE]
