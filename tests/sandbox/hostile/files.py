"""Traps for whoever fetches a session's files, or puts some there."""

from __future__ import annotations

from .steps import Cell, Get, Program, Put

_LOST = ("FileNotFoundError",)
_ANSWER = """
import json, os, posix, struct, time
real = posix.write
def write(fd, data):
    data = bytes(data)
    head = json.loads(data[8:8 + struct.unpack("!I", data[:4])[0]])
    return len(data) if "status" not in head and answer(head) else real(fd, data)
def say(head, body=b""):
    text = json.dumps(head).encode()
    return real(3, struct.pack("!II", len(text), len(body)) + text + body)
os.write = posix.write = write
"""


def _trap(name: str, code: str, step: Get | Put) -> Program:
    """A program that sets a trap; after it went off, the session either goes on or is lost, and says so."""
    return Program(name, (Cell(f"import os\n{code}", shows=""), step, Cell("1", ("ok", "killed"), "")))


def _answers(name: str, body: str, step: Get) -> Program:
    """A program that answers for the runner when a file is asked for."""
    return _trap(name, f"{_ANSWER}\ndef answer(head):\n    return {body}\n", step)


_INFRASTRUCTURE = ("SandboxError", "TimeoutError", "ConnectionError", "InterruptedError", "BlockingIOError")
"""What a caller may take for the sandbox's own failure, and repeat or forgive: never what a program can choose."""

PROGRAMS = [
    _trap(
        "a link to a file of the library", "import json\nos.symlink(json.__file__, 'x')", Get("x", raises=("OSError",))
    ),
    _trap("a link to a device", "os.symlink('/dev/zero', 'x')", Get("x", raises=("OSError",))),
    _trap("a link to itself", "os.symlink('x', 'x')", Get("x", raises=("OSError",))),
    _trap("a link to the control socket", "os.symlink('/proc/self/fd/3', 'x')", Get("x", raises=("OSError",))),
    _trap("a folder that leads to devices", "os.symlink('/dev', 'd')", Get("d/zero", raises=("OSError",))),
    _trap("a folder that leads to the host", "os.symlink('/etc', 'd')", Get("d/passwd", raises=("OSError",))),
    _trap("a folder that leads out", "os.symlink('..', 'd')", Get("d/etc/passwd", raises=("OSError",))),
    _trap("a folder", "os.mkdir('x')", Get("x", raises=("OSError",))),
    _trap(
        "a pipe with a name (FIFO)",
        "try:\n    os.mkfifo('x')\nexcept PermissionError:\n    pass",
        Get("x", raises=("OSError",)),
    ),
    _trap(
        "a pipe with a name, to write to",
        "import time\n"
        "try:\n"
        "    os.mkfifo('x')\n"
        "    if os.fork() == 0:\n"
        "        os.open('x', os.O_RDWR)\n"
        "        time.sleep(60)\n"
        "except PermissionError:\n"
        "    os.mkdir('x')",
        Put("x", bytes(1 << 20), raises=("OSError",)),
    ),
    _trap(
        "a device",
        "import stat\n"
        "try:\n"
        "    os.mknod('x', stat.S_IFCHR | 0o666, os.makedev(1, 5))\n"
        "except PermissionError:\n"
        "    pass",
        Get("x", raises=("OSError",)),
    ),
    _trap("a file above the cap", "open('x', 'wb').truncate(30 << 20)", Get("x", raises=("OSError",))),
    _trap("a file that may not be read", "open('x', 'w')\nos.chmod('x', 0)", Get("x", raises=("OSError",))),
    _trap(
        "a file that changes while it is fetched",
        "f = open('x', 'wb')\nif os.fork() == 0:\n    while True:\n        f.truncate(8 << 20)\n        f.truncate(0)",
        Get("x", never=_INFRASTRUCTURE),
    ),
    _trap("a link in the way", "os.symlink('/work/y', 'x')", Put("x", raises=("OSError",))),
    _trap(
        "a link to the library in the way", "import json\nos.symlink(json.__file__, 'x')", Put("x", raises=("OSError",))
    ),
    _trap("a folder in the way", "os.mkdir('x')", Put("x", raises=("OSError",))),
    _trap(
        "a folder that leads to the library",
        "import json\nos.symlink(os.path.dirname(json.__file__), 'd')",
        Put("d/x.py", raises=("OSError",)),
    ),
    _trap(
        "a full disk",
        "for name in 'yz':\n"
        "    try:\n"
        "        f = open(name, 'wb')\n"
        "        while True:\n"
        "            f.write(bytes(1 << 16))\n"
        "    except OSError:\n"
        "        pass",
        Put("x", bytes(1 << 20), raises=("OSError",)),
    ),
    _answers("another file's content", "say({'id': head['id']}, b'forged')", Get("x", b"forged")),
    _answers(
        "a file of four gigabytes", "real(3, struct.pack('!II', 2, 0xFFFFFFFF) + b'{}' * 100)", Get("x", raises=_LOST)
    ),
    _answers("a file that is a pickle", "real(3, b'\\x80\\x04\\x95' * 100)", Get("x", raises=_LOST)),
    _answers("an end instead of a file", "os._exit(0)", Get("x", raises=_LOST)),
    _answers(
        "an error of its own choice",
        "say({'id': head['id'], 'errno': 110, 'strerror': 'x'})\n    time.sleep(60)",
        Get("x", raises=("OSError",), never=_INFRASTRUCTURE),
    ),
    _answers(
        "another error of its own choice",
        "say({'id': head['id'], 'errno': 104, 'strerror': 'x' * 10**5})\n    time.sleep(60)",
        Get("x", raises=("OSError",), never=_INFRASTRUCTURE),
    ),
    _answers(
        "an error that is none",
        "say({'id': head['id'], 'errno': [], 'strerror': {}})\n    time.sleep(60)",
        Get("x", raises=("OSError",), never=_INFRASTRUCTURE),
    ),
    _answers("no file at all", "time.sleep(60)", Get("x", raises=_LOST)),
    _trap(
        "a slow opening",
        "import posix, time\nos.open = posix.open = lambda *a, **k: time.sleep(60)",
        Put("x", raises=_LOST),
    ),
]
