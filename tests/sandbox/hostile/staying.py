"""Programs that do not end: neither at their deadline, nor when their cell or their session does."""

from __future__ import annotations

from .steps import Cell, Close, Program, cell

_KEPT, _LOST = "variables and files are kept", "variables and files are lost"
_DEAF = (
    "import os, signal, time\n"
    "for number in range(1, 65):\n"
    "    try:\n"
    "        signal.signal(number, signal.SIG_IGN)\n"
    "    except (OSError, ValueError):\n"
    "        pass\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
)
_ANY = ("ok", "error", "timeout", "killed", "memory")

PROGRAMS = [
    cell("a loop", "while True:\n    pass", ("timeout",), _KEPT, 0.2),
    cell("a sleep", "import time\ntime.sleep(60)", ("timeout",), _KEPT, 0.2),
    cell("a pattern", "import re\nre.match('(a+)+$', 'a' * 40 + 'b')", ("timeout",), _KEPT, 0.2),
    cell("arithmetic", "10**10**8", ("timeout",), "", 0.2),
    cell(
        "catching everything",
        "while True:\n    try:\n        sum(range(100))\n    except BaseException:\n        pass",
        ("timeout",),
        _KEPT,
        0.2,
    ),
    cell("C code", "sum(range(10**12))", ("timeout",), _LOST, 0.2),
    cell(
        "a finaliser",
        "class D:\n    def __del__(self):\n        while True:\n            pass\nD()\n1",
        ("ok", "timeout"),
        "",
        0.2,
    ),
    cell(
        "ignoring signals",
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    pass",
        ("timeout",),
        _LOST,
        0.2,
    ),
    cell(
        "blocking signals",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True:\n    pass",
        ("timeout",),
        _LOST,
        0.2,
    ),
    cell(
        "stopping itself",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nos.kill(0, signal.SIGSTOP)\nprint([])",
    ),
    cell(
        "waiting for ever",
        "import threading\nthreading.Lock().acquire() and threading.Event().wait()",
        ("timeout",),
        _KEPT,
        0.2,
    ),
    cell("standard input", "input()", ("error",), "EOFError"),
    Program(
        "a daemon",
        (
            Cell(
                f"{_DEAF}if os.fork() == 0:\n"
                "    os.setsid()\n"
                "    if os.fork() == 0:\n"
                "        time.sleep(60)\n"
                "    os._exit(0)",
                shows="",
            ),
            Close(),
        ),
    ),
    Program(
        "many daemons, some of them stopped",
        (
            Cell(
                "import os, signal, time\n"
                "for i in range(20):\n"
                "    if os.fork() == 0:\n"
                "        os.setsid()\n"
                "        os.kill(os.getpid(), signal.SIGSTOP if i % 2 else signal.SIGCONT)\n"
                "        time.sleep(60)",
                shows="",
            ),
            Close(),
        ),
    ),
    Program("deaf, and asleep when closed", (Close(f"{_DEAF}while True:\n    time.sleep(60)"),)),
    Program("deaf, and busy when closed", (Close(f"{_DEAF}while True:\n    sum(range(10**9))"),)),
    Program(
        "all its processes deaf and busy when closed",
        (Close(f"{_DEAF}for _ in range(5):\n    os.fork()\nwhile True:\n    sum(range(10**9))"),),
    ),
    Program(
        "a thread that goes on",
        (
            Cell(
                "import threading\n"
                "def f():\n"
                "    while True:\n"
                "        pass\n"
                "threading.Thread(target=f, daemon=True).start()",
                shows="",
            ),
            Cell("print([])"),
            Close(),
        ),
    ),
    Program(
        "an alarm between the cells",
        (
            Cell(
                "import signal\n"
                "def ring(*_):\n"
                "    raise RuntimeError\n"
                "signal.signal(signal.SIGALRM, ring)\n"
                "signal.setitimer(signal.ITIMER_REAL, 0.01, 0.001)",
                _ANY,
                "",
            ),
            Cell("1", _ANY, "", deadline=1.0),
            Cell("1", _ANY, "", deadline=1.0),
        ),
    ),
    Program(
        "a trace function around the cells",
        (
            Cell(
                "import sys, time\n"
                "def trace(*_):\n"
                "    time.sleep(60)\n"
                "frame = sys._getframe()\n"
                "while frame:\n"
                "    frame.f_trace = trace\n"
                "    frame = frame.f_back\n"
                "sys.settrace(trace)",
                _ANY,
                "",
                0.2,
            ),
            Cell("1", _ANY, "", deadline=0.2),
        ),
    ),
    Program(
        "an audit hook that never goes away",
        (
            Cell("import sys\ndef hook(*_):\n    raise RuntimeError\nsys.addaudithook(hook)", _ANY, ""),
            Cell("1", _ANY, "", deadline=1.0),
        ),
    ),
    Program(
        "a new cell that never starts",
        (
            Cell("import os, posix, time\nos.read = posix.read = lambda *_: time.sleep(60)", shows=""),
            Cell("1", ("timeout",), "", deadline=0.2, kept=False),
        ),
    ),
]
