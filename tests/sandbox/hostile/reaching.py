"""Whom a program must not reach: the network, the host's processes, the manager, other sessions."""

from __future__ import annotations

from .steps import Cell, Open, Program, cell
from .syscalls import CALL, COLUMN

_PEER = "import array, os, socket, struct\ncontrol = socket.socket(fileno=os.dup(3))\n"

PROGRAMS = [
    cell(
        "sockets of every family",
        "import socket\n"
        "made = []\n"
        "for family in range(46):\n"
        "    for kind in (1, 2, 3):\n"
        "        try:\n"
        "            made.append(socket.socket(family, kind))\n"
        "        except OSError:\n"
        "            pass\n"
        "print(made)",
    ),
    cell(
        "a web page",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1', timeout=1)",
        ("error",),
        "Error",
    ),
    cell("a name", "import socket\nsocket.getaddrinfo('example.com', 80)", ("error",), "gaierror"),
    cell("an abstract socket", "import socket\nsocket.socketpair()[0].bind('\\0x')", ("error",), "PermissionError"),
    cell("a socket file", "import socket\nsocket.socketpair()[0].bind('/work/x')", ("error",), "PermissionError"),
    cell(
        "an address given with the data",
        "import socket\n"
        "a, _ = socket.socketpair(type=socket.SOCK_DGRAM)\n"
        "sent = []\n"
        "for name in ('\\0x', '/run/docker.sock', '/run/systemd/notify', '/dev/log'):\n"
        "    try:\n"
        "        a.sendto(b'x', name)\n"
        "        sent.append(name)\n"
        "    except OSError:\n"
        "        pass\n"
        "print(sent)",
    ),
    cell(
        "processes of the host",
        "import os\n"
        "found = []\n"
        "for pid in range(2, 40000):\n"
        "    try:\n"
        "        os.kill(pid, 0)\n"
        "        found.append(pid)\n"
        "    except ProcessLookupError:\n"
        "        pass\n"
        "print(found)",
    ),
    cell("everybody's end", "import os, signal\nos.kill(-1, signal.SIGKILL)", ("ok", "error"), ""),
    cell("the process group's end", "import os, signal\nos.kill(0, signal.SIGTERM)\nprint([])"),
    cell("the parent's end", "import os\nprint([os.getppid()])", shows="[0]"),
    cell(
        "limits of others",
        "import resource\n"
        "found = []\n"
        "for pid in range(2, 5000):\n"
        "    try:\n"
        "        resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1))\n"
        "        found.append(pid)\n"
        "    except (ProcessLookupError, PermissionError):\n"
        "        pass\n"
        "print(found)",
    ),
    cell(
        "the manager behind the control socket",
        _PEER + "pid, uid, gid = struct.unpack('3i', control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))\n"
        "try:\n"
        "    os.kill(pid, 9) if pid > 1 else None\n"
        "except OSError:\n"
        "    pass\n"
        "print([pid])",
        ("ok", "error"),
        "",
    ),
    cell(
        "a handle on the manager (SO_PEERPIDFD)",
        f"{CALL}\n"
        f"{_PEER}got = []\n"
        "try:\n"
        "    pidfd = control.getsockopt(socket.SOL_SOCKET, 77)\n"
        f"    got = [n for n in (424, 438, {(308, 268)[COLUMN]}) if not refused(n, pidfd, 0, 0, 0)]\n"
        "except OSError:\n"
        "    pass\n"
        "print(got)",
    ),
    cell(
        "a child's memory",
        f"{CALL}\n"
        "import os, time\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    time.sleep(30)\n"
        "    os._exit(0)\n"
        "iov = (ctypes.c_uint64 * 2)(id(None), 8)\n"
        "at = ctypes.addressof(iov)\n"
        f"read, attach = ({(310, 270)[COLUMN]}, child, at, 1, at, 1, 0), ({(101, 117)[COLUMN]}, 16, child, 0, 0)\n"
        "print([call for call in (read, attach) if not refused(*call)])\n"
        "os.kill(child, 9)",
    ),
    cell("becoming root", "import os\nos.setuid(0)", ("error",), "PermissionError"),
    cell("another group", "import os\nos.setgroups([0])", ("error",), "PermissionError"),
    cell(
        "higher limits",
        "import resource\n"
        "raised = []\n"
        "for kind in range(16):\n"
        "    soft, hard = resource.getrlimit(kind)\n"
        "    if hard == resource.RLIM_INFINITY:\n"
        "        continue\n"
        "    try:\n"
        "        resource.setrlimit(kind, (hard + 1, hard + 1))\n"
        "        raised.append(kind)\n"
        "    except (ValueError, OSError):\n"
        "        pass\n"
        "print(raised)",
    ),
    Program(
        "shared memory of another session",
        (
            Cell(
                "import _posixshmem, os\nx = _posixshmem.shm_open('/known', os.O_CREAT | os.O_RDWR, mode=0o600)",
                shows="",
            ),
            Open("other"),
            Cell(
                "import _posixshmem, os\n_posixshmem.shm_open('/known', os.O_RDWR, mode=0o600)",
                ("error",),
                "FileNotFoundError",
                on="other",
            ),
        ),
    ),
    Program(
        "processes of another session",
        (
            Cell("import os, time\nif not os.fork():\n    time.sleep(60)", shows=""),
            Open("other"),
            Cell(
                "import os, signal\ntry:\n    os.kill(-1, signal.SIGKILL)\nexcept ProcessLookupError:\n    pass",
                shows="",
                on="other",
            ),
            Cell("import os\nprint(os.waitpid(-1, os.WNOHANG))", shows="(0, 0)"),
        ),
    ),
]
