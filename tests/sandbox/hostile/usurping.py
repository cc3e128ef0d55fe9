"""Programs that take the runner's place, in part or in whole, when their session is asked to fork.

``_RUNNER`` gives a program everything that the runner has: from then on whatever it calls or says while it is forked is
the program's to choose, as it is for anybody who patches ``posix.read``. Nothing may depend on the runner's honesty.
"""

from __future__ import annotations

from .steps import Cell, Fork, Get, Open, Program, Step
from .syscalls import COLUMN, FORK_FLAGS

_CLONE, _UNSHARE, _CAPSET = ((56, 220)[COLUMN], (272, 97)[COLUMN], (126, 91)[COLUMN])
_ANY = ("ok", "error", "killed", "memory", "timeout")
_OWN_DOING = ("ForkRefused", "SessionClosed")
"""How a fork fails by the program's doing. A bare SandboxError would be a way out of a bad reward."""

_RUNNER = f"""
import array, ctypes, json, os, posix, signal, socket, struct, threading, time
libc = ctypes.PyDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
def call(number, *arguments):
    return libc.syscall(*map(ctypes.c_long, (number, *arguments)))
def meet():
    return call({_UNSHARE}, 0)
def clone():
    return call({_CLONE}, {FORK_FLAGS}, 0, 0, 0, 0)
def give_up():
    return call({_CAPSET}, ctypes.addressof(header), ctypes.addressof(sets))
def own_output():
    printed = os.open("/tmp", os.O_TMPFILE | os.O_RDWR | os.O_APPEND)
    os.dup2(printed, 1), os.dup2(printed, 2), os.close(printed)
def say(head, times=1):
    text = json.dumps(head).encode()
    frame = struct.pack("!II", len(text), 0) + text
    for _ in range(times):
        os.write(3, frame)
def tell(*reasons):
    say({{"id": asked["id"], "reasons": reasons}})
def bomb():
    n = 1
    try:
        while n < 300:
            if os.fork() == 0:
                time.sleep(60)
            n += 1
    except OSError:
        pass
    return "got away with " + str(n) if n > 200 else "bounded"
real, asked = posix.read, None
def read(fd, size):
    global asked
    data = real(fd, size)
    if fd != 3 or b'"op": "fork"' not in data:
        return data
    asked = json.loads(data[8 : 8 + struct.unpack("!I", data[:4])[0]])
    return data if on_fork() == "go on" else real(fd, size)
posix.read = read
"""


def _lies(name: str, body: str, *steps: Step, ends: tuple[str, ...] = _OWN_DOING, first: str = "") -> Program:
    """A program whose runner does ``body`` when it is asked to fork; by then another session must not have noticed."""
    code = f"{_RUNNER}\n{first}\ndef on_fork():\n" + "".join(f"    {line}\n" for line in body.splitlines())
    return Program(name, (Cell(code, shows=""), Fork(ends=ends), *steps, Open("other"), Cell("print([])", on="other")))


def _child(name: str, body: str, *, first: str) -> Program:
    """A program whose fork does ``body`` where an honest one makes its files its own."""
    code = f"if clone():\n    return\n{body}"
    return _lies(name, code, *_CHECKED, first=first)


_EVIL_WHEREVER = (
    "import os\n"
    "for old in (None, *range(4, 64)):\n"
    "    try:\n"
    "        n = os.open('x', os.O_WRONLY | os.O_CREAT | os.O_TRUNC, dir_fd=old)\n"
    "        os.write(n, b'evil')\n"
    "    except (OSError, TypeError):\n"
    "        pass\n"
    "print([])"
)
_UNTOUCHED = {"content": b"parent", "raises": ("FileNotFoundError", "SessionFrozen")}
_CHECKED = (
    Cell(_EVIL_WHEREVER, _ANY, "", on="fork"),
    Get("x", **_UNTOUCHED),
    Fork("another", ("forked", *_OWN_DOING)),
    Get("x", **_UNTOUCHED, on="another"),
)


def _poisoned(name: str, poison: str, before: str = "") -> Program:
    """A program that replaces functions which a careless runner would call while it makes a fork's files its own."""
    opening = (
        f"import os, posix\nopen('x', 'w').write('parent')\nfolder = os.open('/work', os.O_RDONLY)\n{before}\n{poison}"
    )
    return Program(name, (Cell(opening, _ANY, ""), Fork(ends=("forked", *_OWN_DOING)), *_CHECKED))


POISONED = [
    _poisoned("a fork that stays in the old folder", "for m in (os, posix):\n    m.chdir = m.fchdir = lambda *_: None"),
    _poisoned("a fork that keeps its descriptors", "for m in (os, posix):\n    m.dup2 = lambda *_, **__: 0"),
    _poisoned("a fork that opens nothing anew", "for m in (os, posix):\n    m.fstat = lambda *_: 1 / 0"),
    _poisoned(
        "a fork that sees no descriptors",
        "import resource\n"
        "resource.getrlimit = lambda *_: (0, 0)\n"
        "for m in (os, posix):\n"
        "    m.open, real = (lambda *a, **k: real(*a, **k)), m.open",
    ),
    _poisoned("a fork that copies nothing", "for m in (os, posix):\n    m.listdir = lambda *_: []"),
    _poisoned("a fork that dies on the way", "for m in (os, posix):\n    m.listdir = lambda *_: os._exit(1)"),
    _poisoned(
        "a fork that sleeps on the way", "import time\nfor m in (os, posix):\n    m.listdir = lambda *_: time.sleep(60)"
    ),
    _poisoned(
        "a fork that forks on the way",
        "for m in (os, posix):\n    m.listdir = lambda *_: [os.fork() for _ in range(3)] and []",
    ),
    _poisoned(
        "a fork with threads on the way",
        "import threading, time\n"
        "for m in (os, posix):\n"
        "    m.listdir = lambda *_: threading.Thread(target=time.sleep, args=(60,), daemon=True).start() or []",
    ),
    _poisoned(
        "handlers at the fork",
        "import time\n"
        "end = lambda: os._exit(1)\n"
        "os.register_at_fork(before=end, after_in_child=end, after_in_parent=lambda: time.sleep(60))",
    ),
    _poisoned("an audit hook at the fork", "import sys\nsys.addaudithook(lambda *_: 1 / 0)"),
    _poisoned(
        "a trace function at the fork",
        "import sys\n"
        "def trace(*_):\n"
        "    raise RuntimeError\n"
        "frame = sys._getframe()\n"
        "while frame:\n"
        "    frame.f_trace = trace\n"
        "    frame = frame.f_back\n"
        "sys.settrace(trace)",
    ),
    _poisoned(
        "an object that lies about its class",
        "import sqlite3\nclass Liar:\n    @property\n    def __class__(self):\n        os._exit(1)\nliar = Liar()",
    ),
    _poisoned(
        "a timer of its own in the frozen parent",
        "import signal, ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os.kill(-1, 9))\n"
        "event, spec = (ctypes.c_int32 * 16)(0, 0, signal.SIGUSR1), (ctypes.c_int64 * 4)(0, 10**7, 0, 2 * 10**8)\n"
        "timer = ctypes.c_int32()\n"
        f"libc.syscall({(222, 107)[COLUMN]}, 1, event, ctypes.byref(timer))\n"
        f"libc.syscall({(223, 110)[COLUMN]}, timer, 0, spec, None)",
    ),
    _poisoned("thousands of files", "for i in range(8000):\n    open(f'/tmp/{i}', 'w').close()"),
    _poisoned(
        "folders deeper than a path", "for _ in range(2200):\n    os.mkdir('d')\n    os.chdir('d')\nos.chdir('/work')"
    ),
    _poisoned(
        "names that are no text",
        "for i in range(1, 256):\n"
        "    if i != 47 and i != 46:\n"
        "        open(bytes([i]) * 3, 'w')\n"
        "os.symlink('x' * 4000, 'long')\n"
        "os.symlink('loop', 'loop')",
    ),
    _poisoned("a folder without rights", "os.mkdir('d')\nopen('d/y', 'w')\nos.chmod('d', 0)\nos.chmod('/work', 0o500)"),
    _poisoned(
        "a file as large as the folder",
        "f = open('/tmp/y', 'wb')\ntry:\n    while True:\n        f.write(bytes(1 << 16))\nexcept OSError:\n    pass",
    ),
]

_HONEST = "give_up()\nmeet()\nown_output()\n"
_LAST = "os.chdir('/work')\nmeet()"
_FILE = "open('/work/x', 'w').write('parent')"
_KEEPS = f"{_FILE}\nfolder = os.open('/work', os.O_RDONLY)"
_ONE_WAITS = "if clone() == 0:\n    time.sleep(60)\n"
_OTHERS = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"

RUNNERS = [
    _lies("garbage for an answer", "os.write(3, b'\\xff' * 100)"),
    _lies("no answer", "time.sleep(60)"),
    _lies("an answer of the wrong kind", "say({'id': asked['id'], 'status': 'ok', 'error': None, 'cut': 0})"),
    _lies(
        "an answer that it is done",
        "say({'id': asked['id'], 'forked': True, 'ready': True, 'born': 1})\ntime.sleep(60)",
    ),
    _lies("reasons that are none", "say({'id': asked['id'], 'reasons': [{}, 1, 'x' * 10**5]})"),
    _lies("an error for an answer", "say({'id': asked['id'], 'errno': 110, 'strerror': 'x'})"),
    _lies("an end instead of an answer", "os._exit(1)"),
    _lies("an end after the clone", f"{_ONE_WAITS}os._exit(1)"),
    _lies("an end of the fork", "if clone() == 0:\n    os._exit(1)"),
    _lies("a fork that never comes", _ONE_WAITS),
    _lies(
        "two clones",
        f"{_ONE_WAITS}tell('got away' if any(clone() >= 0 for _ in range(20)) else 'refused')",
    ),
    _lies(
        "a clone by a child",
        "if os.fork() == 0:\n    os._exit(clone() >= 0)\ntell('got away' if os.wait()[1] else 'refused')",
    ),
    _lies(
        "a clone by a thread",
        "results = []\n"
        "thread = threading.Thread(target=lambda: results.append(clone()))\n"
        "thread.start()\n"
        "thread.join()\n"
        "tell('got away' if results[0] >= 0 else 'refused')",
    ),
    _lies(
        "a refusal that is not heeded",
        "tell('got away' if any(clone() >= 0 for _ in range(20)) else 'refused')",
        first="child = os.fork() or time.sleep(60)",
    ),
    _lies("threads at the last moment", f"{_OTHERS}return 'go on'"),
    _lies("a child at the last moment", "if os.fork() == 0:\n    time.sleep(60)\nreturn 'go on'"),
    *(
        _lies(
            f"{count} children right after the clone, who kill the fork",
            f"if clone():\n    return [os.fork() == 0 and (time.sleep(0.1), os.kill(-1, 9)) for _ in range({count})]\n"
            f"{_HONEST}{_LAST}",
            Cell("import time\ntime.sleep(0.5)\nprint([])", on="fork"),
            ends=("forked", *_OWN_DOING),
        )
        for count in (1, 9)
    ),
    _lies(
        "a fork bomb during the fork",
        f"{_ONE_WAITS}tell(bomb())",
    ),
    _lies(
        "a fork bomb in the unfinished fork",
        "if clone():\n    return\ntell(bomb())\ntime.sleep(60)",
    ),
    _lies("answers without end", "while True:\n    say({'id': 0, 'reasons': ['x' * 4000] * 50})"),
    _lies(
        "answers without end from the fork",
        "if clone() == 0:\n    while True:\n        say({'id': 0, 'reasons': ['x' * 4000] * 50})\ntime.sleep(60)",
    ),
    _child(
        "a fork that speaks before it was looked at",
        "give_up()\nmeet()\nsay({'ready': True, 'born': '1'})\ntime.sleep(60)",
        first=_KEEPS,
    ),
    _child("a fork that is never looked at", "give_up()\nmeet()", first=_KEEPS),
    _child("a fork that keeps the old folder", f"{_HONEST}os.close(folder)\nmeet()", first=_KEEPS),
    _child("a fork that keeps a descriptor", f"{_HONEST}{_LAST}", first=_KEEPS),
    _child("a fork that keeps the parent's output", f"give_up()\nmeet()\n{_LAST}", first=_FILE),
    _child("a fork that keeps the parent's control socket", f"kept = os.dup(3)\n{_HONEST}{_LAST}", first=_FILE),
    _child(
        "a fork that hides descriptors in a socket",
        f"{_HONEST}a, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [folder])\nos.close(folder)\n{_LAST}",
        first=_KEEPS,
    ),
    _child(
        "a fork that hides descriptors in the place of its control socket",
        f"{_HONEST}a, b = socket.socketpair()\n"
        "socket.send_fds(a, [b'x'], [folder])\n"
        "os.close(folder)\n"
        "a.close()\n"
        "os.dup2(b.fileno(), 3)\n"
        "b.close()\n"
        f"{_LAST}",
        first=_KEEPS,
    ),
    _child("a fork that keeps its rights", f"meet()\nown_output()\n{_LAST}", first=_FILE),
    _child("a fork whose thread keeps its rights", f"{_OTHERS}{_HONEST}{_LAST}", first=_FILE),
    _child(
        "a fork whose child keeps its rights", f"if os.fork() == 0:\n    time.sleep(60)\n{_HONEST}{_LAST}", first=_FILE
    ),
    _child("a fork that is furnished twice", "give_up()\nmeet()\nmeet()\nmeet()\n", first=_FILE),
    _lies(
        "a parent that kills its fork",
        f"child = clone()\nif child:\n    time.sleep(0.3)\n    return os.kill(child, 9)\n{_HONEST}{_LAST}",
        Cell("import time\ntime.sleep(1)\nprint([])", ("ok", "killed"), "", on="fork"),
        ends=("forked", *_OWN_DOING),
    ),
    _lies(
        "a parent that kills its fork when another one is asked for",
        "if os.path.exists('y'):\n"
        "    return os.kill(-1, 9)\n"
        "open('y', 'w')\n"
        "if clone():\n"
        "    return\n"
        f"{_HONEST}{_LAST}",
        Cell("1", ("ok", "killed"), "", on="fork"),
        Fork("another", ("forked", *_OWN_DOING)),
        Cell("1", ("ok", "killed"), "", on="fork"),
        ends=("forked", *_OWN_DOING),
    ),
    _lies(
        "a parent that speaks for its fork",
        "if clone():\n"
        f"    say({{'id': asked['id'], 'reasons': ['none']}}, 100)\n"
        "    return time.sleep(1)\n"
        f"{_HONEST}{_LAST}",
        Cell("print([])", _ANY, "", on="fork"),
        ends=("forked", *_OWN_DOING),
    ),
]

PROGRAMS = [*POISONED, *RUNNERS]
