"""What a program must not use up: memory, disk, descriptors, processes, the kernel's own bookkeeping."""

from __future__ import annotations

from agentrl.sandbox.base import Limits

from .steps import Cell, Fork, Open, Program, cell
from .syscalls import CALL, COLUMN

_MIB = 1024 * 1024
_SMALL = Limits(memory_bytes=256 * _MIB, processes=16)
_CHILDREN = """
import mmap, os, time
children = []
def hold(amount, shared):
    for _ in range(10):
        children.append(os.fork())
        if children[-1] == 0:
            m = mmap.mmap(-1, amount << 20, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
            m.write(b"x" * len(m))
            time.sleep(60)
def held(amount):
    time.sleep(0.8)
    alive = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
    if len(alive) * amount > 400:
        raise SystemError(f"{len(alive)} children hold {amount} MiB each")
"""
"""The kernel may end the children one by one, or the session as a whole: they must not hold it all."""

PROGRAMS = [
    cell("memory in one piece", "x = bytearray(1 << 40)", ("memory",), "MemoryError"),
    cell("memory in small pieces", "x = []\nwhile True:\n    x.append(bytes(1 << 20))", ("memory",), "MemoryError"),
    Program(
        "memory in the smallest pieces",
        (Cell("x = None\nwhile True:\n    x = (x,)", ("memory", "killed"), "", deadline=20.0),),
        Limits(memory_bytes=128 * _MIB),
    ),
    cell("a large number", "x = 1 << (1 << 36)", ("memory", "error"), "Error"),
    cell("a large text", "x = 'x' * (1 << 40)", ("memory",), "MemoryError"),
    cell(
        "arrays",
        "try:\n"
        "    from numpy import ones\n"
        "except ImportError:\n"
        "    def ones(n):\n"
        "        return b'x' * n * 8\n"
        "x = []\n"
        "while True:\n"
        "    x.append(ones(1 << 22))",
        ("memory", "error"),
        "MemoryError",
    ),
    cell(
        "memory from C",
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "n = 0\n"
        "while at := libc.malloc(1 << 20):\n"
        "    ctypes.memset(at, 1, 1 << 20)\n"
        "    n += 1\n"
        "print([n] if n > 600 else [])",
        ("ok", "memory"),
        "",
    ),
    cell(
        "a decompression bomb",
        "import zlib\n"
        "part = zlib.compressobj(9, zlib.DEFLATED, -15)\n"
        "block = part.compress(bytes(1 << 24)) + part.flush(zlib.Z_FULL_FLUSH)\n"
        "bomb = block * (1 << 12)  # 64 GiB in 64 MiB\n"
        "zlib.decompress(bomb, -15)",
        ("memory",),
        "MemoryError",
        20.0,
    ),
    cell(
        "a decompression bomb on disk",
        "import io, zipfile\n"
        "made = io.BytesIO()\n"
        "with zipfile.ZipFile(made, 'w', zipfile.ZIP_DEFLATED) as z:\n"
        "    for i in range(4):\n"
        "        z.writestr(str(i), bytes(1 << 24))\n"
        "zipfile.ZipFile(made).extractall('/work')",
        ("error",),
        "No space left",
        20.0,
    ),
    cell(
        "a disk",
        "f = open('/work/x', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))\n    f.flush()",
        ("error",),
        "OSError",
    ),
    cell("a file without content", "open('/work/x', 'wb').truncate(1 << 40)", ("error",), "File too large"),
    cell("space reserved", "import os\nos.posix_fallocate(os.open('/tmp/x', 65), 0, 1 << 40)", ("error",), "OSError"),
    cell(
        "files without a name",
        "import os\nwhile True:\n    os.write(os.open('/work', os.O_TMPFILE | os.O_RDWR), bytes(1 << 20))",
        ("error",),
        "No space left",
    ),
    cell(
        "many files", "n = 0\nwhile True:\n    n += 1\n    open(f'/work/{n}', 'w').close()", ("error",), "No space left"
    ),
    cell(
        "many links",
        "import os\nopen('/work/x', 'w')\nn = 0\nwhile True:\n    n += 1\n    os.link('/work/x', f'/work/{n}')",
        ("error",),
        "OSError",
    ),
    cell(
        "long links",
        "import os\nn = 0\nwhile True:\n    n += 1\n    os.symlink('x' * 4000, f'/tmp/{n}')",
        ("error",),
        "No space left",
    ),
    cell("deep folders", "import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')", ("error",), "No space left"),
    cell(
        "shared memory", "f = open('/dev/shm/x', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))", ("error",), "OSError"
    ),
    cell(
        "shared memory of System V, message queues, semaphores",
        f"{CALL}\n"
        "made = []\n"
        f"for number, arguments in (({(29, 194)[COLUMN]}, (0, 1 << 26, 0o1600)), "
        f"({(68, 186)[COLUMN]}, (0, 0o1600)), ({(64, 190)[COLUMN]}, (0, 100, 0o1600))):\n"
        "    for _ in range(1000):\n"
        "        if not refused(number, *arguments):\n"
        "            made.append(number)\n"
        "print(made)",
    ),
    cell(
        "message queues of POSIX",
        f"{CALL}\n"
        "name = ctypes.create_string_buffer(b'queue')\n"
        "at = ctypes.addressof(name)\n"
        f"print([n for n in range(1000) if not refused({(240, 180)[COLUMN]}, at, 0o102, 0o600, 0)])",
    ),
    cell(
        "memory behind a descriptor (memfd)",
        "import os\nwhile True:\n    os.write(os.memfd_create('x'), bytes(1 << 20))",
        ("error",),
        "PermissionError",
    ),
    cell(
        "memory that is locked",
        f"{CALL}\nprint('refused' if refused({(151, 230)[COLUMN]}, 3) else 'locked')",
        shows="refused",
    ),
    cell("descriptors", "import os\nx = []\nwhile True:\n    x.append(os.dup(0))", ("error",), "Too many open files"),
    cell("pipes", "import os\nwhile True:\n    os.pipe()", ("error",), "Too many open files"),
    cell(
        "pipes that are full",
        "import os\n"
        "while True:\n"
        "    _, w = os.pipe()\n"
        "    os.set_blocking(w, False)\n"
        "    try:\n"
        "        while True:\n"
        "            os.write(w, bytes(1 << 16))\n"
        "    except BlockingIOError:\n"
        "        pass",
        ("error",),
        "Too many open files",
    ),
    cell(
        "sockets that are full",
        "import socket\n"
        "kept = []\n"
        "while True:\n"
        "    kept.append(socket.socketpair())\n"
        "    kept[-1][0].setblocking(False)\n"
        "    try:\n"
        "        while True:\n"
        "            kept[-1][0].send(bytes(1 << 16))\n"
        "    except BlockingIOError:\n"
        "        pass",
        ("error",),
        "Too many open files",
    ),
    cell(
        "descriptors parked in sockets (SCM_RIGHTS)",
        "import array, os, socket\n"
        "kept, parked = [], 0\n"
        "fds = array.array('i', [0] * 250)\n"
        "try:\n"
        "    while parked < 100_000:\n"
        "        a, b = socket.socketpair()\n"
        "        kept.append((a, b))\n"
        "        a.setblocking(False)\n"
        "        try:\n"
        "            while True:\n"
        "                a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])\n"
        "                parked += len(fds)\n"
        "        except BlockingIOError:\n"
        "            pass\n"
        "except OSError as error:\n"
        "    print([parked] if parked > 10_000 else [])",
    ),
    Program(
        "descriptors parked in sockets, then another session",
        (
            Cell(
                "import array, socket\n"
                "a, b = socket.socketpair()\n"
                "a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0] * 250))])",
                shows="",
            ),
            Open("other"),
            Cell("print([])", on="other"),
        ),
    ),
    cell(
        "sockets in sockets in sockets",
        "import socket\n"
        "inner = socket.socketpair()\n"
        "try:\n"
        "    for _ in range(500):\n"
        "        outer = socket.socketpair()\n"
        "        socket.send_fds(outer[0], [b'x'], [s.fileno() for s in (*inner, *outer)])\n"
        "        inner[0].close()\n"
        "        inner[1].close()\n"
        "        inner = outer\n"
        "except OSError:\n"
        "    pass\n"
        "print([])",
    ),
    cell(
        "watched descriptors",
        "import select\n"
        "kept = []\n"
        "try:\n"
        "    while True:\n"
        "        e = select.epoll()\n"
        "        for other in [0, *kept]:\n"
        "            try:\n"
        "                e.register(other, select.EPOLLIN)\n"
        "            except OSError as error:\n"
        "                if error.errno == 24:\n"
        "                    raise\n"
        "        kept.append(e.fileno())\n"
        "        globals()[f'e{len(kept)}'] = e\n"
        "except OSError:\n"
        "    print([len(kept)] if len(kept) > 64 else [])",
    ),
    cell("processes", "import os\nwhile True:\n    os.fork()", ("error",), "BlockingIOError"),
    cell(
        "processes, counted",
        "import os, time\n"
        "n = 1\n"
        "try:\n"
        "    while n < 200:\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(30)\n"
        "            os._exit(0)\n"
        "        n += 1\n"
        "except BlockingIOError:\n"
        "    print([n] if n > 32 else [])",
    ),
    cell(
        "processes beyond the limit of the limit",
        "import os, resource, time\n"
        "kind = resource.RLIMIT_NPROC\n"
        "soft, hard = resource.getrlimit(kind)\n"
        "for attempt in (\n"
        "    lambda: resource.setrlimit(kind, (hard, hard)),\n"
        "    lambda: resource.prlimit(0, kind, (hard, hard)),\n"
        "    lambda: resource.prlimit(1, kind, (soft + 1, hard)),\n"
        "    lambda: resource.setrlimit(kind, (soft, soft)),\n"
        "):\n"
        "    try:\n"
        "        attempt()\n"
        "    except (ValueError, OSError):\n"
        "        pass\n"
        "n = 1\n"
        "try:\n"
        "    while n < 200:\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(30)\n"
        "            os._exit(0)\n"
        "        n += 1\n"
        "except BlockingIOError:\n"
        "    pass\n"
        "print([n] if n > 32 else [])",
    ),
    cell(
        "threads",
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        ("error",),
        "can't start new thread",
    ),
    cell(
        "timers",
        f"{CALL}\n"
        "event, made = (ctypes.c_int32 * 16)(), 0\n"
        "event[3] = 1  # SIGEV_NONE\n"
        "identity = ctypes.c_int32()\n"
        f"while made < 10_000 and libc.syscall({(222, 107)[COLUMN]}, 1, event, ctypes.byref(identity)) == 0:\n"
        "    made += 1\n"
        "print([made] if made > 256 else [])",
    ),
    cell(
        "signals that wait",
        "import ctypes, os, signal\n"
        "libc = ctypes.CDLL(None)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [40])\n"
        "sent = 0\n"
        "while sent < 10_000 and libc.sigqueue(os.getpid(), 40, None) == 0:\n"
        "    sent += 1\n"
        "print([sent] if sent > 512 else [])",
    ),
    cell(
        "pieces of address space",
        "import mmap\nkept = []\nwhile True:\n    kept.append(mmap.mmap(-1, 4096, prot=1 + len(kept) % 2))",
        ("error", "memory"),
        "",
        20.0,
    ),
    cell("recursion", "def f():\n    f()\nf()", ("error",), "RecursionError"),
    cell(
        "recursion without a limit",
        "import json, sys\nsys.setrecursionlimit(1 << 30)\njson.loads('[' * 10**6)",
        ("killed", "memory", "error"),
        "",
    ),
    cell("output", "while True:\n    print('x' * 1000)", ("timeout",), "more bytes of output cut", 0.4),
    cell("raw output", "import os\nwhile True:\n    os.write(1, bytes(1 << 16))", ("error",), "File too large"),
    cell(
        "a result without end",
        "class R:\n    def __repr__(self):\n        return 'x' * 10**8\nR()",
        ("ok",),
        "bytes of output cut",
    ),
    cell("an error without end", "raise ValueError('x' * 10**8)", ("error",), "characters of traceback cut"),
    Program(
        "memory of many processes",
        (Cell(f"{_CHILDREN}hold(150, False)\nheld(150)", ("ok", "memory"), ""),),
        _SMALL,
    ),
    Program(
        "memory of many processes, after the cell",
        (
            Cell(f"{_CHILDREN}hold(150, False)", ("ok", "memory"), ""),
            Cell("held(150)", ("ok", "memory", "killed"), ""),
        ),
        _SMALL,
    ),
    Program(
        "shared memory of many processes",
        (Cell(f"{_CHILDREN}hold(150, True)\nheld(150)", ("ok", "memory"), ""),),
        _SMALL,
    ),
    Program(
        "memory of many forks",
        (
            Cell("def fill():\n    x.append(bytearray(b'x' * (20 << 20)))\nx = []\nfill()", shows=""),
            Fork("one"),
            Fork("two"),
            Cell("fill()\nprint([])", on="one"),
            Cell("while True:\n    fill()", ("memory",), "", on="two"),
            Cell("print([len(x)])", shows="[2]", on="one"),
        ),
        _SMALL,
    ),
]
