"""The walls: the small root that every session sees, and what a process gives up to become a session.

The expensive part is done once, by the zygote (``build``): new namespaces, a read-only root with nothing in it but
the Python library, the shared libraries and three devices. A session (``confine``) starts from there: its own mount,
IPC, network, PID and user namespaces, its own tmpfs on /work and /tmp, rlimits, no capabilities, no_new_privs, Landlock
where the kernel has it, seccomp.

Runs inside the zygote, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import sysconfig
from collections.abc import Iterable, Iterator, Mapping

from agentrl.sandbox import kernel, seccomp

UNPRIVILEGED = 65534
"""Who a session runs as when the manager is root: nobody."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_STAGES = ("/sys", "/mnt", "/run", "/srv", "/tmp")
_SIGNALS_QUEUED = 256
PACKAGES = "/packages"
"""Where a session finds the packages that are not in the standard library."""


class Missing(Exception):
    """A mechanism that this machine does not give; the message names it and says how it failed."""


@contextlib.contextmanager
def needs(mechanism: str) -> Iterator[None]:
    """Turn a failed system call into ``Missing``."""
    try:
        yield
    except OSError as error:
        raise Missing(f"{mechanism} ({error.strerror or error})") from error


def build(packages: Iterable[str]) -> int:
    """Leave the host: new namespaces, an unprivileged user, the small root. Called by the zygote's parent, once.

    The next child is the first process of a new PID namespace.

    Args:
        packages: files and folders, besides the standard library, that sessions may import from ``PACKAGES``.

    Returns:
        A descriptor of the host's /proc, which is out of sight now; the caller closes it.

    Raises:
        Missing: a mechanism is not there.
    """
    if not seccomp.supported():
        raise Missing(f"a seccomp table for {os.uname().machine}")
    host_proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    if os.geteuid() == 0 and _is_real_root():
        with needs("mount namespace"):
            kernel.unshare(kernel.CLONE_NEWNS)
        _enter_small_root(packages)
        _become_nobody()
        _own_user_namespace(host_proc)
    else:
        _own_user_namespace(host_proc)
        _enter_small_root(packages)
    with needs("UTS namespace"):
        kernel.unshare(kernel.CLONE_NEWUTS)
        ctypes.CDLL(None).sethostname(b"sandbox", 7)
    with needs("no_new_privs"):
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    with needs("PID namespace"):
        kernel.unshare(kernel.CLONE_NEWPID)
    return host_proc


def confine(
    limits: Mapping[str, int], program: tuple[ctypes.Array[ctypes.c_char], int], host_proc: int, number: str, rules: int
) -> int:
    """Make the calling process, just forked by the zygote into a new PID namespace, a session.

    What it owns at the end is in namespaces that belong to the zygote's user namespace, in which it has no rights:
    its own user namespace knows one user, and serves to count its processes apart from everybody else's.

    Args:
        limits: of the session.
        program: the seccomp filter.
        host_proc: descriptor of a /proc; closed.
        number: this process in it.
        rules: Landlock's ruleset, or -1; closed.

    Returns:
        The descriptor at which the zygote answers the calls that the filter hands over.

    Raises:
        Missing: a mechanism is not there.
    """
    _write(host_proc, f"{number}/oom_score_adj", "1000")  # out of memory, the kernel shall choose sessions first
    with needs("session id"):
        os.setsid()  # kill(0, ...) reaches a process group, whatever the PID namespace
    with needs("mount, IPC and network namespaces"):
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWNET)
    with needs("tmpfs"):
        mount_scratch(limits)
    os.chdir("/work")
    with needs("user namespace of the session"):
        kernel.unshare(kernel.CLONE_NEWUSER)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else its files in /proc are root's
        map_ids(host_proc, number, *(f"{UNPRIVILEGED} 0 1",) * 2)  # an unmapped user may not fork
        os.close(host_proc)
    with needs("rlimits"):  # after the user namespace: it remembers RLIMIT_NPROC as the bound of all sessions together
        _limit(limits)
    with needs("dropping capabilities"):
        kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # again, after another change of rights; the zygote looks at it in /proc
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if rules >= 0:
        with needs("Landlock, which this kernel says it has"):
            kernel.landlock_restrict(rules)
        os.close(rules)
    with needs("seccomp filter with user notification"):
        return kernel.install_filter(*program)


def mount_scratch(limits: Mapping[str, int]) -> None:
    """Empty folders at /work and /tmp of the mount namespace that the caller is in."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    size = f"size={limits['scratch_bytes']},nr_inodes=8192,mode=0755"
    kernel.mount("work", "/work", "tmpfs", flags, size)
    kernel.mount("tmp", "/tmp", "tmpfs", flags, size.replace("0755", "1777"))


def diagnose() -> list[str]:
    """The namespaces that a process of this user cannot have, each tried in a child of its own."""
    kinds = {
        "user": 0,
        "mount": kernel.CLONE_NEWNS,
        "PID": kernel.CLONE_NEWPID,
        "IPC": kernel.CLONE_NEWIPC,
        "network": kernel.CLONE_NEWNET,
        "UTS": kernel.CLONE_NEWUTS,
    }
    missing = []
    for name, flag in kinds.items():
        child = os.fork()
        if child == 0:
            try:
                kernel.unshare(kernel.CLONE_NEWUSER | flag)
            except OSError as error:
                os._exit(error.errno or 255)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            missing.append(f"{name} namespace ({os.strerror(code)})")
    return missing


def _is_real_root() -> bool:
    with open("/proc/self/uid_map") as table:
        return table.readline().split() == ["0", "0", str(2**32 - 1)]


def _become_nobody() -> None:
    with needs("an unprivileged user to run as"):
        os.setgroups([])
        os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root and the id maps cannot be written
    library = sysconfig.get_path("stdlib")
    if not os.access(library, os.R_OK | os.X_OK):
        raise Missing(f"a Python library that uid {UNPRIVILEGED} may read ({library}: make it world-readable)")


def _own_user_namespace(host_proc: int) -> None:
    """Become root of a new user namespace that knows one user: the one who runs this."""
    user, group = os.geteuid(), os.getegid()
    with needs("user and mount namespaces"):
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
    with needs("user namespace id maps"):
        _write(host_proc, "self/setgroups", "deny")
        map_ids(host_proc, "self", f"0 {user} 1", f"0 {group} 1")


def map_ids(proc: int, process: str, users: str, groups: str) -> None:
    """Say which user and group of the outer namespace a process's user namespace knows."""
    _write(proc, f"{process}/uid_map", users)
    _write(proc, f"{process}/gid_map", groups)


def _write(folder: int, name: str, text: str) -> None:
    descriptor = os.open(name, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _enter_small_root(packages: Iterable[str]) -> None:
    """Build the tree on a tmpfs, bind into it what Python needs, and make it the read-only root."""
    shown = _without_nested(_library_folders())
    views = {folder: folder for folder in shown}
    views |= {package: f"{PACKAGES}/{os.path.basename(package)}" for package in packages}
    devices = {device: device for device in _DEVICES}
    free = [s for s in _STAGES if os.path.isdir(s) and not any(_inside(source, s) for source in views)]
    if not free:
        raise Missing(f"a folder to mount the sessions' root on, one of {', '.join(_STAGES)}")
    stage = free[0]
    with needs("mount namespace"):
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    with needs("tmpfs"):
        kernel.mount("root", stage, "tmpfs", kernel.MS_NOSUID, "size=1m,mode=0755")
    with needs("bind mounts"):
        for source, target in (views | devices).items():
            _show(source, stage + target)
        for folder in _third_party(shown):
            kernel.mount("hidden", stage + folder, "tmpfs", kernel.MS_NOSUID, "size=64k,mode=0755")
    for folder in ("/work", "/tmp"):
        os.mkdir(stage + folder)
    os.symlink("/tmp", f"{stage}/dev/shm")
    for name in os.listdir("/"):  # /lib -> usr/lib and its like: where the dynamic linker looks
        if name.startswith("lib") and os.path.islink(f"/{name}") and not os.path.exists(f"{stage}/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{stage}/{name}")
    with needs("read-only root"):
        kernel.protect(stage, kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID)
    with needs("pivot_root"):
        kernel.enter_root(stage)


def _show(source: str, target: str) -> None:
    """Bind ``source``, a file or a folder, to ``target``."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    kernel.bind(source, target)


def _library_folders() -> set[str]:
    """The standard library, and every folder from which this process has a shared library loaded."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    folders |= {os.path.realpath(folder) for folder in folders}
    with open("/proc/self/maps") as maps:
        folders |= {match[1] for line in maps if (match := re.search(r"(/.+)/[^/]+\.so[.\d]*$", line))}
    for folder in folders:
        if any(_inside(folder, scratch) for scratch in ("/work", "/tmp")):
            raise Missing(f"a Python outside /work and /tmp, which belong to the sessions ({folder} is shown to them)")
    return folders


def _third_party(shown: Iterable[str]) -> list[str]:
    """The folders of installed packages within those shown: not the session's business."""
    found = []
    for folder in shown:
        for version in (folder, *(entry.path for entry in os.scandir(folder) if entry.name.startswith("python"))):
            for name in ("site-packages", "dist-packages"):
                if os.path.isdir(os.path.join(version, name)):
                    found.append(os.path.join(version, name))
    return found


def _without_nested(folders: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for folder in sorted(folders):
        if not any(_inside(folder, other) for other in kept):
            kept.append(folder)
    return kept


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def at_most(value: int, most: int) -> int:
    """``value``, or the hard limit ``most`` where that is lower."""
    return value if most == resource.RLIM_INFINITY else min(value, most)


def _limit(limits: Mapping[str, int]) -> None:
    values = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_CORE: 1,  # the one value that keeps a core dump from the host's handler too; see core(5)
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: _SIGNALS_QUEUED,
    }
    for kind, value in values.items():
        allowed = at_most(value, resource.getrlimit(kind)[1])
        resource.setrlimit(kind, (allowed, allowed))
    _, most = resource.getrlimit(resource.RLIMIT_NPROC)  # the hard limit stays, for forks; the filter guards it
    resource.setrlimit(resource.RLIMIT_NPROC, (at_most(limits["processes"], most), most))
