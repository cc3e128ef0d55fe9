"""Memory cgroups for sessions, where this process may make them: both generations of the interface.

A session's group bounds what all its processes hold together, its scratch folders included; the kernel enforces it at
once. Found out by doing: a group is made, a limit written and read back. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "agentrl-"
_TRIAL_BYTES = 64 * 1024 * 1024
_NO_SWAP = {"memory.max": "memory.swap.max", "memory.limit_in_bytes": "memory.swappiness"}


@dataclass(frozen=True)
class Group:
    """The group of one session.

    Attributes:
        folder: its place in the cgroup file system.
    """

    folder: Path

    def place(self, pid: str) -> None:
        """Move a process, named as this process's /proc does, into the group.

        Raises:
            OSError: it is gone, or may not be moved.
        """
        (self.folder / "cgroup.procs").write_text(pid)

    def exceeded(self) -> bool:
        """Whether the kernel has killed a process for the group's limit."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                count = re.search(r"^oom_kill (\d+)", (self.folder / name).read_text(), re.MULTILINE)
                return count is not None and int(count[1]) > 0
        return False

    def remove(self) -> bool:
        """Remove the group; False while a process is left in it."""
        try:
            self.folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


class MemoryGroups:
    """Makes groups below one of its own.

    Args:
        folder: this manager's group, which exists.
        limit: name of the file that holds the bound.
    """

    def __init__(self, folder: Path, limit: str) -> None:
        self.folder, self._limit = folder, limit
        self._made = 0

    @classmethod
    def find(cls) -> MemoryGroups:
        """The groups that this process may make.

        Raises:
            OSError: there are none, with the reason.
        """
        failures: list[str] = []
        for parent, limit in _candidates():
            try:
                return cls._try(parent, limit)
            except OSError as error:
                failures.append(f"{parent}: {error.strerror or error}")
        raise OSError("; ".join(failures) or "no cgroup file system with the memory controller")

    @classmethod
    def _try(cls, parent: Path, limit: str) -> MemoryGroups:
        _sweep(parent)
        own = parent / f"{_PREFIX}{os.getpid()}-{os.urandom(3).hex()}"
        own.mkdir()
        groups = cls(own, limit)
        try:
            if limit == "memory.max":
                (parent / "cgroup.subtree_control").write_text("+memory")
                (own / "cgroup.subtree_control").write_text("+memory")
            groups.make(_TRIAL_BYTES).remove()
        except OSError:
            groups.close()
            raise
        return groups

    def make(self, limit_bytes: int) -> Group:
        """A new group.

        Raises:
            OSError: it cannot be made, or does not keep its limit.
        """
        self._made += 1
        group = Group(self.folder / str(self._made))
        group.folder.mkdir()
        try:
            (group.folder / self._limit).write_text(str(limit_bytes))
            with contextlib.suppress(OSError):  # a kernel without swap has no such file
                (group.folder / _NO_SWAP[self._limit]).write_text("0")
            kept = int((group.folder / self._limit).read_text())
            if not limit_bytes - os.sysconf("SC_PAGESIZE") <= kept <= limit_bytes:
                raise OSError(f"{group.folder}: wrote a limit of {limit_bytes} bytes, read back {kept}")
        except BaseException:
            group.remove()
            raise
        return group

    def close(self) -> None:
        """Remove what is left."""
        _remove(self.folder)


def _candidates() -> list[tuple[Path, str]]:
    """(group, name of its limit) of the groups that this process is in, outwards."""
    mounts = re.findall(r"^\S+ \S+ \S+ (\S+) (\S+) .*? - (cgroup2?) \S+ (\S+)$", _read("/proc/self/mountinfo"), re.M)
    paths = {
        controllers: path
        for _, controllers, path in re.findall(r"^(\d+):(.*?):(.*)$", _read("/proc/self/cgroup"), re.M)
    }
    found: list[tuple[Path, str]] = []
    for root, place, kind, options in mounts:
        if kind == "cgroup2" and "memory" in _read(f"{place}/cgroup.controllers").split():
            found += [(folder, "memory.max") for folder in _outwards(place, root, paths.get("", "/"))]
        elif kind == "cgroup" and "memory" in options.split(","):
            path = next((p for controllers, p in paths.items() if "memory" in controllers.split(",")), "/")
            found += [(folder, "memory.limit_in_bytes") for folder in _outwards(place, root, path)]
    return found


def _outwards(place: str, root: str, path: str) -> list[Path]:
    """The group ``path`` and those around it, as far as the mount of ``root`` at ``place`` shows them."""
    inner = Path(place, os.path.relpath(path, root)) if path.startswith(root) else Path(place)
    around = [inner, *inner.parents]
    return [folder for folder in around if folder.is_relative_to(place) and folder.is_dir()]


def _sweep(parent: Path) -> None:
    """Remove the groups of managers that were killed."""
    for folder in parent.glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            _remove(folder)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for inner in folder.iterdir():
            if inner.is_dir():
                inner.rmdir()
        folder.rmdir()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
