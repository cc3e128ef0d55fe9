"""What a process holds, seen from outside through /proc: whether it can be forked exactly, and what it uses.

Runs inside the zygote, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Collection

from agentrl.sandbox.runner import CONTROL

SCRATCH = ("work", "tmp")
_SCRATCH = tuple(f"/{name}" for name in SCRATCH)
_PAUSES = (*[0.0002] * 50, *[0.005] * 100)
"""Seconds between looks for a process that was told to stop; on a crowded machine it takes a while to hear of it."""
_PAGE = os.sysconf("SC_PAGESIZE")
_SHARED_MAP = re.compile(rb"(\w+)-(\w+) (...)s \w+ (\w+:\w+) \d+ *(.*)")
_LOCK = re.compile(r"^lock:.*$", re.MULTILINE)


class Proc:
    """A process in a /proc that may belong to an outer PID namespace, kept open by descriptor."""

    def __init__(self, root: int, number: str) -> None:
        self._root, self.number = root, number

    @classmethod
    def behind(cls, root: int, pidfd: int) -> Proc:
        """The process of a pidfd."""
        return cls(root, _field(_read(root, f"self/fdinfo/{pidfd}").decode(), "Pid"))

    def sibling(self, number: str) -> Proc:
        """Another process of the same /proc."""
        return Proc(self._root, number)

    def status(self) -> dict[str, str]:
        """/proc/PID/status."""
        lines = self._text("status").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def children(self) -> list[str]:
        """Its children, dead ones that nobody has waited for too."""
        return self._text(f"task/{self.number}/children").split()

    def socket(self) -> int:
        """Inode of what is at the control descriptor."""
        return os.stat(f"{self.number}/fd/{CONTROL}", dir_fd=self._root).st_ino

    def scratch_devices(self) -> set[int]:
        """Device numbers of its /work and /tmp."""
        return {os.stat(f"{self.number}/root/{name}", dir_fd=self._root).st_dev for name in SCRATCH}

    def ended(self) -> tuple[int | None, float]:
        """Exit code (negative: signal) and CPU seconds of a process that is dead but not yet waited for."""
        try:
            fields = self._text("stat").rpartition(")")[2].split()
        except OSError:
            return None, 0.0
        if fields[0] not in "ZX":
            return None, 0.0
        return os.waitstatus_to_exitcode(int(fields[49])), sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def stopped(self) -> bool:
        """Whether it stands still; waits a moment for the signal to get there."""
        for pause in _PAUSES:
            if self._text("stat").rpartition(")")[2].split()[0] == "T":
                return True
            time.sleep(pause)
        return False

    def resident(self) -> int:
        """Resident bytes; pages shared with other processes count in full."""
        return int(self._text("statm").split()[1]) * _PAGE

    def proportional(self) -> int:
        """Resident bytes; a page shared by n processes counts as 1/n."""
        return int(_field(self._text("smaps_rollup"), "Pss").split()[0]) * 1024

    def obstacles(self, known: Collection[str] = ()) -> list[str]:
        """What it holds that a fork could not give an exact, private copy of.

        Args:
            known: children that are forks themselves.
        """
        found = []
        status = self.status()
        if (threads := int(status["Threads"])) > 1:
            found.append(f"{threads - 1} running thread{'s' * (threads > 2)} besides the main one")
        if children := [child for child in self.children() if child not in known]:
            found.append(f"{len(children)} child process{'es' * (len(children) > 1)}")
        devices = self.scratch_devices()
        here, root = (os.stat(f"{self.number}/{name}", dir_fd=self._root).st_dev for name in ("cwd", "root"))
        if here not in (*devices, root) and os.readlink(f"{self.number}/cwd", dir_fd=self._root).startswith(_SCRATCH):
            found.append("a working directory in other scratch folders than its own")
        return found + self._shared_maps(devices) + self._descriptors(devices)

    def _shared_maps(self, scratch: set[int]) -> list[str]:
        numbers = {f"{os.major(device):02x}:{os.minor(device):02x}".encode() for device in scratch}
        found = []
        for line in _read(self._root, f"{self.number}/maps").splitlines():
            shared = _SHARED_MAP.match(line) if b"s " in line else None
            if shared is None:
                continue
            start, end, rights, device, name = shared.groups()
            if b"w" in rights or device in numbers:
                what = "anonymous" if name.startswith(b"/dev/zero") else name.decode(errors="replace")
                found.append(f"shared memory ({what}, {int(end, 16) - int(start, 16)} bytes)")
        return found

    def _descriptors(self, scratch: set[int]) -> list[str]:
        found = []
        for number in self._numbers():
            where = f"{self.number}/fd/{number}"
            try:
                name, status = os.readlink(where, dir_fd=self._root), os.stat(where, dir_fd=self._root)
            except FileNotFoundError:  # closed meanwhile
                continue
            kind = stat.S_IFMT(status.st_mode)
            if number == CONTROL and kind == stat.S_IFSOCK:
                continue
            if kind in (stat.S_IFREG, stat.S_IFDIR):
                if status.st_dev not in scratch:
                    found.append(f"descriptor {number}: {name}, outside /work and /tmp")
                elif _LOCK.search(_read(self._root, f"{self.number}/fdinfo/{number}").decode()):
                    found.append(f"descriptor {number}: a lock on {name}")
            elif kind != stat.S_IFCHR:
                found.append(f"descriptor {number}: {_KINDS.get(kind) or name}")
        return found

    def _numbers(self) -> list[int]:
        folder = os.open(f"{self.number}/fd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._root)
        try:
            return sorted(map(int, os.listdir(folder)))
        finally:
            os.close(folder)

    def _text(self, name: str) -> str:
        return _read(self._root, f"{self.number}/{name}").decode()


_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{name}:\s*(.*)$", text, re.MULTILINE)
    if match is None:
        raise OSError(f"no {name} in {text[:80]!r}")
    return match[1]


def _read(root: int, name: str) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)
