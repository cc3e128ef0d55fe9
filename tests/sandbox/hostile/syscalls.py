"""System calls that a program has no business with, and arguments of those that it has."""

from __future__ import annotations

import platform

from .steps import Cell, Program, cell

COLUMN = 0 if platform.machine() == "x86_64" else 1

REFUSED = {
    # name: (x86_64, aarch64); None where the architecture has no such call
    "namespaces and mounts": {
        "chroot": (161, 51),
        "clone3": (435, 435),
        "fsmount": (432, 432),
        "fsopen": (430, 430),
        "fspick": (433, 433),
        "listmount": (458, 458),
        "mount": (165, 40),
        "mount_setattr": (442, 442),
        "move_mount": (429, 429),
        "open_tree": (428, 428),
        "pivot_root": (155, 41),
        "setdomainname": (171, 162),
        "sethostname": (170, 161),
        "setns": (308, 268),
        "statmount": (457, 457),
        "umount2": (166, 39),
        "unshare": (272, 97),
    },
    "the kernel": {
        "acct": (163, 89),
        "adjtimex": (159, 171),
        "bpf": (321, 280),
        "clock_adjtime": (305, 266),
        "clock_settime": (227, 112),
        "delete_module": (176, 106),
        "fanotify_init": (300, 262),
        "fanotify_mark": (301, 263),
        "finit_module": (313, 273),
        "init_module": (175, 105),
        "inotify_add_watch": (254, 27),
        "inotify_init1": (294, 26),
        "io_uring_enter": (426, 426),
        "io_uring_register": (427, 427),
        "io_uring_setup": (425, 425),
        "ioperm": (173, None),
        "iopl": (172, None),
        "kexec_file_load": (320, 294),
        "kexec_load": (246, 104),
        "landlock_create_ruleset": (444, 444),
        "landlock_restrict_self": (446, 446),
        "modify_ldt": (154, None),
        "perf_event_open": (298, 241),
        "personality": (135, 92),
        "quotactl": (179, 60),
        "quotactl_fd": (443, 443),
        "reboot": (169, 142),
        "seccomp": (317, 277),
        "settimeofday": (164, 170),
        "swapoff": (168, 225),
        "swapon": (167, 224),
        "syslog": (103, 116),
        "userfaultfd": (323, 282),
        "uselib": (134, None),
        "vhangup": (153, 58),
    },
    "other processes": {
        "execve": (59, 221),
        "execveat": (322, 281),
        "kcmp": (312, 272),
        "migrate_pages": (256, 238),
        "move_pages": (279, 239),
        "pidfd_getfd": (438, 438),
        "pidfd_open": (434, 434),
        "pidfd_send_signal": (424, 424),
        "process_madvise": (440, 440),
        "process_mrelease": (448, 448),
        "process_vm_readv": (310, 270),
        "process_vm_writev": (311, 271),
        "ptrace": (101, 117),
        "ioprio_set": (251, 30),
        "sched_setaffinity": (203, 122),
        "sched_setattr": (314, 274),
        "sched_setparam": (142, 118),
        "sched_setscheduler": (144, 119),
        "setpriority": (141, 140),
    },
    "keys and queues": {
        "add_key": (248, 217),
        "keyctl": (250, 219),
        "request_key": (249, 218),
        "memfd_create": (319, 279),
        "memfd_secret": (447, 447),
        "mlock": (149, 228),
        "mlock2": (325, 284),
        "mlockall": (151, 230),
        "mq_open": (240, 180),
        "mq_timedsend": (242, 182),
        "msgget": (68, 186),
        "msgsnd": (69, 189),
        "semget": (64, 190),
        "semop": (65, 193),
        "shmat": (30, 196),
        "shmctl": (31, 195),
        "shmget": (29, 194),
        "splice": (275, 76),
        "tee": (276, 77),
        "vmsplice": (278, 75),
    },
    "sockets": {
        "accept": (43, 202),
        "accept4": (288, 242),
        "bind": (49, 200),
        "connect": (42, 203),
        "listen": (50, 201),
        "setsockopt": (54, 208),
        "socket": (41, 198),
    },
    "users and owners": {
        "chown": (92, None),
        "fchown": (93, 55),
        "fchownat": (260, 54),
        "lchown": (94, None),
        "mknod": (133, None),
        "mknodat": (259, 33),
        "name_to_handle_at": (303, 264),
        "open_by_handle_at": (304, 265),
        "setfsgid": (123, 152),
        "setfsuid": (122, 151),
        "setgid": (106, 144),
        "setgroups": (116, 159),
        "setregid": (114, 143),
        "setresgid": (119, 149),
        "setresuid": (117, 147),
        "setreuid": (113, 145),
        "setuid": (105, 146),
        "setxattr": (188, 5),
    },
}
_NUMBERS = {name: numbers[COLUMN] for group in REFUSED.values() for name, numbers in group.items()}
CALL = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def refused(number, *arguments):
    result = libc.syscall(*map(ctypes.c_long, (number, *arguments)))
    if result == 0 and number == CLONE:
        libc._exit(0)
    return result == -1 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS)
""".replace("CLONE", str((56, 220)[COLUMN]))
"""Gives a program ``refused(number, *arguments)``, which makes a system call."""

FORK_FLAGS = 0x3002_0000
"""CLONE_NEWUSER, CLONE_NEWPID and CLONE_NEWNS: what a session's runner forks with, when it is asked to."""


def numbers(*names: str) -> dict[str, int]:
    """Those of the refused calls that this architecture has."""
    return {name: number for name in names if (number := _NUMBERS[name]) is not None}


def one(name: str, number: int, *arguments: int) -> Program:
    """A program that makes one system call."""
    return cell(
        name, f"{CALL}\nprint('refused' if refused{(number, *arguments)} else 'got away with it')", shows="refused"
    )


def every(group: str) -> Program:
    """A program that makes all calls of a group and prints those that were not refused."""
    return cell(
        f"calls: {group}",
        f"{CALL}\n"
        f"print([name for name, number in {numbers(*REFUSED[group])}.items() if not refused(number, 0, 0, 0, 0, 0)])",
    )


_CLONE, _PRCTL, _PRLIMIT = ((56, 220)[COLUMN], (157, 167)[COLUMN], (302, 261)[COLUMN])

PROGRAMS = [
    *map(every, REFUSED),
    one("clone into a user namespace", _CLONE, 0x1000_0011, 0, 0, 0, 0),
    one("clone into a PID namespace", _CLONE, 0x2000_0011, 0, 0, 0, 0),
    one("clone as a fork does, unasked", _CLONE, FORK_FLAGS, 0, 0, 0, 0),
    one("clone as a fork does, with a signal", _CLONE, FORK_FLAGS | 17, 0, 0, 0, 0),
    one("clone as a fork does, and more", _CLONE, FORK_FLAGS | 0x4000_0000, 0, 0, 0, 0),
    one("clone as a fork does, with high bits", _CLONE, FORK_FLAGS | 1 << 32, 0, 0, 0, 0),
    one("clone as a fork does, as a sibling", _CLONE, FORK_FLAGS | 0x8000, 0, 0, 0, 0),
    one("unshare: mounts", (272, 97)[COLUMN], 0x2_0000),
    one("umount of the scratch folder", (166, 39)[COLUMN], 0, 2),
    one("prctl: do not die with the zygote", _PRCTL, 1, 0, 0, 0, 0),
    one("prctl: dumpable again", _PRCTL, 4, 1, 0, 0, 0),
    one("prctl: another seccomp filter", _PRCTL, 22, 2, 0, 0, 0),
    one("prctl: capabilities for later", _PRCTL, 47, 2, 0, 0, 0),
    one("prctl: adopt orphans", _PRCTL, 36, 1, 0, 0, 0),
    cell(
        "fcntl: large pipes",
        "import fcntl, os\nfcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
        ("error",),
        "PermissionError",
    ),
    cell(
        "ioctl: type into the terminal (TIOCSTI)", "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')", ("error",), "OSError"
    ),
    cell(
        "ioctl: whatever there is",
        "import fcntl, os\n"
        "made = []\n"
        "for number in (0x5412, 0x540E, 0x541C, 0x5423, 0x8912, 0x5201, 0xB701, 0xB702, 0xB703,"
        "0xC0045878, 0x40049409, 0x5204, 0x40086602):\n"
        "    for fd in (0, 1, 3, os.open('/work', os.O_RDONLY)):\n"
        "        try:\n"
        "            fcntl.ioctl(fd, number, bytes(8))\n"
        "            made.append((fd, hex(number)))\n"
        "        except OSError:\n"
        "            pass\n"
        "print(made)",
    ),
    cell(
        "socketpair of a network family",
        "import socket\nsocket.socketpair(socket.AF_INET)",
        ("error",),
        "PermissionError",
    ),
    cell(
        "set-user-id bits",
        "import os\nopen('x', 'w')\nos.chmod('x', 0o6777)\nos.execv('/work/x', ['x'])",
        ("error",),
        "PermissionError",
    ),
]

if platform.machine() == "x86_64":
    PROGRAMS += [
        cell("x32 call", f"{CALL}\nrefused({0x4000_0000 | 39})", ("killed",), "SIGSYS"),
        cell("x32 call, one that is numbered twice", f"{CALL}\nrefused({0x4000_0000 | 520})", ("killed",), "SIGSYS"),
        Program(
            "32-bit call",
            (
                Cell(
                    "import ctypes, mmap\n"
                    "m = mmap.mmap(-1, 4096, prot=7)\n"
                    "m.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')  # mov eax, getpid; int 0x80; ret\n"
                    "at = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
                    "ctypes.CFUNCTYPE(ctypes.c_int)(at)()",
                    ("killed",),
                    "was ended by SIG",
                ),
            ),
        ),
    ]
