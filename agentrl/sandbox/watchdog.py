"""Kills a session whose processes together hold more memory than its limit.

Where the manager could put the sessions into memory cgroups the kernel does this exactly and at once; this is what is
left elsewhere, and weaker: it looks every fifth of a second, so a fast program gets further for a moment. Address space
stays bounded for each process all the time (RLIMIT_AS), and so does the size of the scratch folders.

Runs inside the zygote, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from agentrl.sandbox import wire
from agentrl.sandbox.forks import Process
from agentrl.sandbox.inspection import Proc

EVERY = 0.2
"""Seconds from look to look."""


class Watchdog:
    """Looks at all sessions from time to time.

    Args:
        watching: whether there is anything to look at; False where the kernel does it.
    """

    def __init__(self, watching: bool) -> None:
        self._watching = watching
        self._next = 0.0

    def wait(self, processes: Mapping[int, Process]) -> float:
        """Seconds until the next look; -1 (for ever) while there is no session."""
        return max(0.0, self._next - time.monotonic()) if processes and self._watching else -1

    def look(self, processes: Mapping[int, Process]) -> None:
        """Kill what holds too much, if it is time to look."""
        now = time.monotonic()
        if now < self._next or not self._watching:
            return
        self._next = now + EVERY
        for process in list(processes.values()):
            if _held(process) > process.limits["memory_bytes"]:
                process.killed_for = wire.MEMORY
                process.kill()


def _held(process: Process) -> int:
    """Resident bytes of a session's processes, forks left out; exact where the quick estimate is above the limit."""
    try:
        everything = [process.proc, *_below(process.proc, process.forks)]
        held = sum(proc.resident() for proc in everything)
        if held <= process.limits["memory_bytes"]:
            return held
        # Pages that its own processes share were counted once for each of them.
        return sum(proc.proportional() for proc in everything)
    except OSError:  # one of them has just ended
        return 0


def _below(proc: Proc, forks: Iterable[str]) -> list[Proc]:
    found: list[Proc] = []
    todo = [proc]
    while todo:
        new = [proc.sibling(number) for number in todo.pop().children() if number not in forks]
        found += new
        todo += new
    return found
