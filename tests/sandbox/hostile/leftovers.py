"""What a manager and the sessions it opened leave on this machine, seen from outside of all walls."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agentrl.sandbox.launcher import PROCESS_NAME

from .breaking import PWNED

_SETTLE_SECONDS = 3.0
_MORE_BYTES = 64 * 1024 * 1024
_NAMES_INSIDE = ("x", "y", "d", "secret", "known", "sda")
"""Files that programs make in their own folders, and that must not appear in ours."""

Footprint = Mapping[str, Any]


def footprint(more: Callable[[], list[str]] = list) -> Footprint:
    """Everything that must be the same before and after, by kind.

    Args:
        more: what else a backend leaves: containers.
    """
    processes = descendants()
    return {
        "processes": processes,
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "descriptors of helpers": {pid: _descriptors(pid) for pid in processes},
        "mounts": _mounts(),
        "cgroups": _cgroups(),
        "files": _files(),
        "more": more(),
    }


async def difference(before: Footprint, more: Callable[[], list[str]] = list) -> list[str]:
    """What is different from ``before``, and stays so for a while."""
    end = time.monotonic() + _SETTLE_SECONDS
    while (now := footprint(more)) != before and time.monotonic() < end:  # noqa: ASYNC110 -- nobody tells
        await asyncio.sleep(0.02)
    return [f"left over: {kind}: {_change(was, now[kind])}" for kind, was in before.items() if now[kind] != was]


def _change(was: Any, now: Any) -> str:
    if isinstance(was, dict):
        was, now = list(was.items()), list(now.items())
    more, fewer = [x for x in now if x not in was], [x for x in was if x not in now]
    return f"{more} more, {fewer} fewer"


def descendants() -> dict[int, str]:
    """Command names of all processes below this one, by number, those of its zygotes that lost their parent too.

    A program can write over its own command line, so that is not enough to know it by.
    """
    parents, found = {}, set()
    mark, mine = PROCESS_NAME.encode(), f'"manager": {os.getpid()},'.encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(entry.name)] = int(fields[1])
        if mark in line and mine in line:
            found.add(int(entry.name))
    todo = {os.getpid()}
    while todo:
        todo = {pid for pid, parent in parents.items() if parent in todo}
        found |= todo
    return {pid: _name(pid) for pid in sorted(found)}


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def grown(before: int) -> list[str]:
    """Whether this process holds much more memory than ``before``."""
    more = resident() - before
    return [f"the manager grew by {more >> 20} MiB"] if more > _MORE_BYTES else []


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "gone"


def _descriptors(pid: int) -> int | None:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None


def _mounts() -> list[str]:
    """Ours: engines of other people on this machine come and go."""
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if "docker" not in line]


def _cgroups() -> list[str]:
    mine = f"/agentrl-{os.getpid()}-"
    return sorted(folder for folder, _, _ in os.walk("/sys/fs/cgroup") if mine in folder)


def _files() -> list[str]:
    folders = ("/", "/tmp", "/work", "/dev/shm", "/var/tmp")
    places = [PWNED, *(f"{folder}/{name}" for folder in folders for name in _NAMES_INSIDE)]
    return sorted([*os.listdir(tempfile.gettempdir()), *(path for path in places if os.path.lexists(path))])
