"""What a program must not change, and code that it must not run."""

from __future__ import annotations

from .steps import Cell, Program, Put, cell

PROGRAMS = [
    cell(
        "writing outside the scratch folders",
        "import os\n"
        "made = []\n"
        "for folder, _, _ in os.walk('/'):\n"
        "    if folder.startswith(('/work', '/tmp')):\n"
        "        continue\n"
        "    try:\n"
        "        os.close(os.open(folder + '/x', os.O_CREAT | os.O_WRONLY))\n"
        "        made.append(folder)\n"
        "    except OSError:\n"
        "        pass\n"
        "print(made)",
    ),
    cell(
        "levers of the kernel",
        "import os\n"
        "moved = []\n"
        "paths = '/proc/sys/kernel/core_pattern /proc/sysrq-trigger /proc/sys/kernel/modprobe /proc/self/uid_map'\n"
        "paths += ' /proc/self/oom_score_adj /sys/kernel/uevent_helper /sys/fs/cgroup/cgroup.procs /dev/mem'\n"
        "paths += ' /dev/port /sys/fs/cgroup/release_agent /sys/kernel/debug/tracing/trace'\n"
        "for path in paths.split():\n"
        "    try:\n"
        "        os.open(path, os.O_WRONLY)\n"
        "        moved.append(path)\n"
        "    except OSError:\n"
        "        pass\n"
        "print(moved)",
    ),
    cell("changing the library", "import json\nopen(json.__file__, 'a')", ("error",), "Error"),
    cell("deleting the library", "import json, os\nos.unlink(json.__file__)", ("error",), "Error"),
    cell("making it writable", "import json, os\nos.chmod(json.__file__, 0o777)", ("error",), "Error"),
    cell("cutting it", "import json, os\nos.truncate(json.__file__, 0)", ("error",), "Error"),
    cell("linking it", "import json, os\nos.link(json.__file__, '/work/x')", ("error",), "Error"),
    cell("moving it", "import json, os\nos.rename(json.__file__, '/work/x')", ("error",), "Error"),
    cell("its dates", "import json, os\nos.utime(json.__file__, (0, 0))", ("error",), "Error"),
    cell(
        "its pages",
        "import ctypes, json, mmap\n"
        "f = open(json.__file__, 'rb')\n"
        "mmap.mmap(f.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_WRITE)",
        ("error",),
        "PermissionError",
    ),
    cell(
        "its pages, later",
        "import ctypes, json, mmap\n"
        "f = open(json.__file__, 'rb')\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int\n"
        "at = libc.mmap(None, 4096, 1, 1, f.fileno(), 0)\n"
        "print('refused' if libc.mprotect(at, 4096, 3) == -1 else 'writable')",
        shows="refused",
    ),
    Program(
        "the scratch folders themselves",
        (
            Cell(
                "import os\n"
                "done = []\n"
                "for action in (os.rmdir, lambda p: os.rename(p, '/work/y'), lambda p: os.rename(p, '/x')):\n"
                "    for path in ('/work', '/tmp'):\n"
                "        try:\n"
                "            action(path)\n"
                "            done.append(path)\n"
                "        except OSError:\n"
                "            pass\n"
                "print(done)"
            ),
            Put("x"),
        ),
    ),
    cell("device node", "import os\nos.mknod('/work/sda', 0o60666, os.makedev(8, 0))", ("error",), "PermissionError"),
    cell("program file", "import os\nos.execv('/work/x', ['x'])", ("error",), "PermissionError"),
    cell("shell", "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'id'])", ("error",), "Error"),
    cell("shell through libc", "import os\nprint('none' if os.system('id') else 'ran')", shows="none"),
    cell(
        "code from a library of one's own",
        "import _ctypes, ctypes, shutil\nshutil.copy(_ctypes.__file__, '/work/x.so')\nctypes.CDLL('/work/x.so')",
        ("error",),
        "OSError",
    ),
]
