"""What a program must not get to see."""

from __future__ import annotations

from .steps import Cell, Open, Program, cell

SECRET = "AGENTRL_TEST_SECRET"
"""In the environment of the manager and of the tests; programs look for it by its halves, not to find themselves."""
_HALVES = repr((SECRET[:12], SECRET[12:]))

PROGRAMS = [
    cell("environment", "import os\nprint(list(os.environ.items()))"),
    cell(
        "environment of the C library",
        "import ctypes\n"
        "getenv = ctypes.CDLL(None).getenv\n"
        "getenv.restype = ctypes.c_char_p\n"
        f"names = ('PATH', 'HOME', 'PYTHONHASHSEED', ''.join({_HALVES}))\n"
        "print([n for n in names if getenv(n.encode())])",
    ),
    cell(
        "environment on the stack",
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.write.argtypes = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t\n"
        "at = ctypes.c_void_p.in_dll(libc, 'program_invocation_name').value & -4096\n"
        "r, w = os.pipe()\n"
        "stack = b''\n"
        "while libc.write(w, at, 4096) == 4096:  # says EFAULT where reading would crash\n"
        "    stack += os.read(r, 4096)\n"
        "    at += 4096\n"
        f"names = 'PATH=', 'HOME=', ''.join({_HALVES})\n"
        "print([len(stack)] if len(stack) < 4096 else [n for n in names if n.encode() in stack])",
    ),
    cell(
        "files of the host",
        "import os\n"
        "paths = '/etc /etc/shadow /etc/passwd /root/.bashrc /home/user /var /proc/1/environ /proc/1/root/etc'\n"
        "paths += ' /proc/kcore /sys/kernel /bin/sh /usr/bin /run /dev/sda /dev/mem /dev/tty /dev/kmsg /boot /srv'\n"
        "paths += ' /proc/self /opt/secret /var/run/docker.sock /run/docker.sock /.dockerenv'\n"
        "print([p for p in paths.split() if os.path.lexists(p)])",
    ),
    cell("devices", "import os\nprint(sorted(set(os.listdir('/dev')) - {'null', 'zero', 'urandom', 'shm'}))"),
    cell(
        "names in the root",
        "import os\n"
        "known = {'dev', 'work', 'tmp', 'packages', 'lib', 'lib64', 'lib32', 'libx32'}\n"
        "print([n for n in os.listdir('/') if n not in known and os.path.isfile('/' + n)])",
    ),
    cell(
        "installed packages that were not asked for",
        "import os\n"
        "print([os.path.join(f, n) for f, d, _ in os.walk('/') for n in d if n in "
        "('site-packages', 'dist-packages') and os.listdir(os.path.join(f, n))])",
    ),
    cell("packages by name", "import pip", ("error",), "ModuleNotFoundError"),
    cell(
        "walking out of the root",
        "import os\n"
        "fd = os.open('/', os.O_RDONLY)\n"
        "for _ in range(40):\n"
        "    fd = os.open('..', os.O_RDONLY, dir_fd=fd)\n"
        "print([n for n in ('etc', 'home', 'proc', 'var') if n in os.listdir(fd)])",
    ),
    cell(
        "the old working folder",
        "import os\n"
        "os.chdir('/')\n"
        "os.chdir('../../../..')\n"
        "print([n for n in ('etc', 'proc', 'var') if n in os.listdir('.')])",
    ),
    cell(
        "inherited descriptors",
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
    cell(
        "every object that there is",
        "import _socket, gc, io, os, sys\n"
        "todo, seen, found = [sys._getframe(), sys.modules, *gc.get_objects()], set(), []\n"
        "while todo:\n"
        "    thing = todo.pop()\n"
        "    if id(thing) in seen:\n"
        "        continue\n"
        "    seen.add(id(thing))\n"
        "    if isinstance(thing, (_socket.socket, io.FileIO)):\n"
        "        try:\n"
        "            if thing.fileno() > 3 and os.fstat(thing.fileno()):\n"
        "                found.append(thing)\n"
        "        except (OSError, ValueError):\n"
        "            pass\n"
        "    todo += gc.get_referents(thing)\n"
        "print(found)",
        deadline=20.0,
    ),
    cell("name of the host", "import os\nprint(os.uname().nodename)", shows="sandbox"),
    cell(
        "memory of processes",
        "print([pid for pid in ['self', *range(1, 200)] for name in ('mem', 'maps', 'environ') "
        "if __import__('os').path.exists(f'/proc/{pid}/{name}')])",
    ),
    cell(
        "devices without end",
        "print(len(open('/dev/zero', 'rb').read()))",
        ("memory",),
        "MemoryError",
    ),
    Program(
        "files of another session",
        (
            Cell("for f in ('/work', '/tmp', '/dev/shm'):\n    open(f + '/secret', 'w').write('x')", shows=""),
            Open("other"),
            Cell("import os\nprint([n for f in ('/work', '/tmp', '/dev/shm') for n in os.listdir(f)])", on="other"),
        ),
    ),
]
