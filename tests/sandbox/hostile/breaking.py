"""Programs that break their own interpreter, and those that speak to the manager in its place."""

from __future__ import annotations

import json
import struct

from .steps import Cell, Open, Program, cell

_ANY = ("ok", "error", "killed")


def frame(head: bytes, body: bytes = b"") -> bytes:
    """A frame as the control socket carries it."""
    return struct.pack("!II", len(head), len(body)) + head + body


def _sends(name: str, sent: bytes, shows: str = "control protocol") -> Program:
    """A program that writes to the control socket, then waits; a later session must not notice."""
    return Program(
        name,
        (
            Cell(f"import os, time\nos.write(3, {sent!r})\ntime.sleep(5)", ("killed",), shows, kept=False),
            Cell("1", ("killed",), "lost"),
            Open("other"),
            Cell("print([])", on="other"),
        ),
    )


PWNED = "/tmp/agentrl-pwned"
"""A file that appears on the host where a manager unpickles."""
_PICKLE = f"cposix\nsystem\n(S'touch {PWNED}'\ntR.".encode()
_FORGED = {"id": 1, "status": "ok", "error": None, "cut": 0}

PROGRAMS = [
    cell("exit", "import sys\nsys.exit(3)", ("error",), "SystemExit: 3"),
    cell("exit at once", "import os\nos._exit(3)", ("killed",), "exit status 3"),
    cell("abort", "import os\nos.abort()", ("killed",), "was ended by SIG"),
    cell("segfault", "import ctypes\nctypes.string_at(0)", ("killed",), "SIGSEGV"),
    cell("overwriting None", "import ctypes\nctypes.memset(id(None), 0, 16)\nNone", ("killed", "error"), ""),
    cell("closing the control socket", "import os\nos.close(3)", ("killed",), "lost"),
    cell("closing everything", "import os\nos.closerange(0, 64)", ("killed",), "lost"),
    cell("something else in its place", "import os\nos.dup2(0, 3)", ("killed",), "lost"),
    Program(
        "hanging up on the manager",
        (Cell("import socket\nsocket.socket(fileno=3).shutdown(socket.SHUT_RDWR)", ("killed",), "", kept=False),),
    ),
    Program(
        "hanging up on the manager, and staying",
        (
            Cell(
                "import signal, socket, time\nsocket.socket(fileno=3).shutdown(socket.SHUT_WR)\ntime.sleep(60)",
                ("killed",),
                "",
                kept=False,
            ),
        ),
    ),
    Program(
        "a control socket that does not wait",
        (Cell("import os\nos.set_blocking(3, False)", ("ok", "killed"), ""), Cell("1", ("ok", "killed"), "")),
    ),
    Program(
        "a child that reads the manager's requests",
        (
            Cell("import os\nif os.fork() == 0:\n    while os.read(3, 1 << 16):\n        pass", ("ok", "killed"), ""),
            *(Cell("1", ("ok", "killed", "timeout"), "", deadline=0.2) for _ in range(3)),
        ),
    ),
    Program(
        "descriptors for the manager",
        (
            Cell(
                "import array, socket, time\n"
                "c = socket.socket(fileno=3)\n"
                "c.sendmsg([b'x' * 100], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0, 1, 2] * 80))])\n"
                "time.sleep(5)",
                ("killed",),
                "control protocol",
                kept=False,
            ),
        ),
    ),
    Program(
        "an end in the middle of the answer",
        (
            Cell(
                "import os, posix\n"
                "real = posix.write\n"
                "def write(fd, data):\n"
                "    real(fd, bytes(data)[:10])\n"
                "    os._exit(0)\n"
                "posix.write = write",
                ("killed",),
                "",
                kept=False,
            ),
        ),
    ),
    Program(
        "half an answer, and silence",
        (
            Cell(
                "import os, time\nos.write(3, b'\\0\\0')\ntime.sleep(60)",
                ("killed", "timeout"),
                "",
                deadline=0.2,
                kept=False,
            ),
        ),
    ),
    Program(
        "a flood of answers",
        (
            Cell(
                f"import os\nwhile True:\n    os.write(3, {frame(json.dumps(_FORGED | {'id': 7}).encode()) * 100!r})",
                ("killed",),
                "",
                kept=False,
            ),
        ),
    ),
    Program(
        "a flood of answers between the cells",
        (
            Cell(
                "import os\n"
                "if os.fork() == 0:\n"
                "    while True:\n"
                f"        os.write(3, {frame(json.dumps(_FORGED).encode()) * 1000!r})",
                ("ok", "killed"),
                "",
            ),
            Cell("import time\ntime.sleep(0.5)", ("ok", "killed"), ""),
        ),
    ),
    _sends("a pickle for the manager", frame(_PICKLE)),
    cell(
        "a pickle as the body of an answer",
        f"import os, time\nos.write(3, {frame(json.dumps(_FORGED).encode(), _PICKLE)!r})\ntime.sleep(0.1)",
        ("ok",),
        "posix",
    ),
    _sends("a pickle without a frame", _PICKLE * 10),
    _sends("four gigabytes announced", b"\xff" * 8),
    _sends("four gigabytes of body announced", struct.pack("!II", 2, 0xFFFF_FFFF) + b"{}"),
    _sends("nesting without end", frame(b"[" * 200_000)),
    _sends("a number without end", frame(b'{"id": 1, "cut": ' + b"9" * 100_000 + b"}")),
    _sends("an answer that is no number", frame(b'{"id": 1, "status": "ok", "error": null, "cut": NaN}')),
    _sends("an answer to another question", frame(json.dumps(_FORGED | {"id": 2}).encode())),
    _sends("news of its own end", frame(json.dumps({"exit": 0, "cpu": 1e9}).encode()), ""),
    Program(
        "a forged answer",
        (
            Cell(
                f"import os, time\nos.write(3, {frame(json.dumps(_FORGED).encode(), b'forged')!r})\ntime.sleep(0.1)",
                ("ok",),
                "forged",
            ),
            Cell("1", ("killed",), ""),
        ),
    ),
    cell("no builtins", "import builtins\nvars(builtins).clear()", ("error", "killed"), ""),
    Program(
        "poisoned builtins",
        (
            Cell(
                "import builtins\n"
                "for name in ('len', 'isinstance', 'print', 'repr', 'open', 'compile', 'exec', 'memoryview', 'min'):\n"
                "    setattr(builtins, name, lambda *a, **k: 1 / 0)",
                _ANY,
                "",
            ),
            Cell("1", _ANY, ""),
        ),
    ),
    cell("no modules", "import sys\nsys.modules.clear()", _ANY, ""),
    cell("poisoned modules", "import json, os\njson.dumps = os.write = os.getpid = None", _ANY, ""),
    Program(
        "the runner's own names",
        (
            Cell(
                "import sys\n"
                "frame = sys._getframe()\n"
                "while frame.f_back:\n"
                "    frame = frame.f_back\n"
                "    for name in list(frame.f_globals):\n"
                "        if not name.startswith('__'):\n"
                "            frame.f_globals[name] = None",
                ("error", "killed"),
                "",
            ),
            Cell("1", ("error", "killed"), ""),
        ),
    ),
    cell(
        "a string that cannot be shown",
        "class E(Exception):\n    def __str__(self):\n        return 1 / 0\nraise E",
        ("error",),
        "E",
    ),
    cell(
        "a repr that does not end",
        "class R:\n    def __repr__(self):\n        while True:\n            pass\nR()",
        ("timeout",),
        "kept",
        0.2,
    ),
    cell("not UTF-8", "x = '\ud800'", ("error",), "UnicodeEncodeError"),
    cell("a null byte", "x = '\0'", ("error",), "null bytes"),
    cell("deep nesting", "(" * 5000 + ")" * 5000, ("error", "memory"), ""),
]
