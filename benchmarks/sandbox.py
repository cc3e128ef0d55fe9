"""Sandboxed sessions: what a cell, a new session, a fork and a live session cost, beside what the kernel alone costs.

Floors, in the same run: a byte there and back through two pipes between two processes, which no cell can be faster
than; and os.fork, os._exit and os.wait of a Python process with numpy that holds 0, 50 or 500 MB of touched memory,
which no fork of a session can be faster than.

1. ``exec of 1+1``: one session, one cell after another, until the result is there as a record.
2. ``new session``: ``open`` until the session can run cells; its ``close`` is not in it.
3. ``fork``: ``fork`` until the fork can run cells, with numpy arrays of that size and with ten files of 100 kB in /work
   or none. The parent is forked again and again; the forks are closed outside of the clock. ``fork of a fork`` goes on
   from the last one each time, to a depth of ten.
4. ``new + exec + kill``: whole lives of sessions a second, four at a time.
5. ``memory per session``: with many live ones that have run a cell each. The row with the target is what the machine
   has less of (MemAvailable, mean of the way up and the way down): page tables, sockets, mounts, cgroups and all that
   the kernel holds for a session are in it, which smaps does not know. The private pages of the processes, on which
   other people on the machine have no influence, stand beside it.
6. With docker, where an engine with the image answers: 1 and 3 in a container.

Every time is the median of its repetitions, and of the rounds the best: their targets are absolute, and other people's
load can only lengthen them.

    python benchmarks/sandbox.py [--quick] [--rounds 3] [--json FILE] [--check]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from _bench import Row, parser, report

from agentrl.errors import AgentRLError
from agentrl.sandbox import Limits, LocalSandbox, Sandbox, Session

ROOMY = Limits(memory_bytes=4 << 30)
ONE_MB = "for i in range(10):\n    open(f'/work/{i}', 'wb').write(b'x' * 100_000)"
AT_A_TIME = 4
DEPTH = 10

_FLOOR = """
import json, os, statistics, sys, time
import numpy
megabytes, count = map(int, sys.argv[1:])
kept = numpy.ones(megabytes << 17)
taken = []
for _ in range(count):
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    taken.append(time.perf_counter() - began)
print(json.dumps(statistics.median(taken)))
"""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        cells: cells of a round.
        sessions: new sessions of a round.
        forks: forks of a round, of each kind.
        megabytes: sizes of numpy state.
        seconds: of whole lives, each round.
        live: sessions at once.
    """

    cells: int = 3000
    sessions: int = 150
    forks: int = 40
    megabytes: tuple[int, ...] = (0, 50, 500)
    seconds: float = 3.0
    live: int = 500


QUICK = Size(cells=200, sessions=10, forks=5, megabytes=(0, 50), seconds=0.5, live=20)


async def clocked(
    count: int, work: Callable[[], Awaitable[Any]], after: Callable[[Any], Awaitable[None]]
) -> list[float]:
    """Seconds that each of ``count`` awaits of ``work`` took; ``after`` has its result, outside of the clock."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        result = await work()
        taken.append(time.perf_counter() - began)
        await after(result)
    return taken


async def nothing(_: Any) -> None:
    """No afterwards."""


async def close(session: Session) -> None:
    """End a session."""
    await session.close()


def pipe_round_trip(count: int) -> float:
    """Median seconds of a byte to another process and back."""
    (there, out), (back, answer) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        while os.read(there, 1):
            os.write(answer, b"x")
        os._exit(0)
    os.close(there)
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        os.write(out, b"x")
        os.read(back, 1)
        taken.append(time.perf_counter() - began)
    for descriptor in (out, back, answer):
        os.close(descriptor)
    os.waitpid(child, 0)
    return median(taken)


def plain_fork(megabytes: int, count: int) -> float:
    """Median seconds of fork, exit and wait, in a process of its own."""
    command = [sys.executable, "-c", _FLOOR, str(megabytes), str(count)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


async def exec_times(sandbox: Sandbox, count: int) -> dict[str, float]:
    """Microseconds of a cell."""
    session = await sandbox.open(limits=Limits(cpu_seconds=600))
    await clocked(count // 10, lambda: session.exec("1 + 1"), nothing)
    taken = await clocked(count, lambda: session.exec("1 + 1"), nothing)
    await session.close()
    return {"exec of 1+1, p50": median(taken) * 1e6, "exec of 1+1, p99": quantiles(taken, n=100)[-1] * 1e6}


async def open_times(sandbox: Sandbox, count: int) -> dict[str, float]:
    """Milliseconds of a new session."""
    taken = await clocked(count, sandbox.open, close)
    return {"new session, p50": median(taken) * 1e3, "new session, p99": quantiles(taken, n=100)[-1] * 1e3}


async def fork_times(sandbox: Sandbox, megabytes: int, files: bool, count: int) -> dict[str, float]:
    """Milliseconds of a fork."""
    session = await sandbox.open(limits=ROOMY)
    result = await session.exec(f"import numpy\nx = numpy.ones({megabytes} << 17)\n{ONE_MB if files else ''}", 60.0)
    if result.status != "ok":
        sys.exit(f"the state to fork could not be made: {result}")
    taken = await clocked(count, session.fork, close)
    await session.close()
    return {fork_name(megabytes, files): median(taken) * 1e3}


def fork_name(megabytes: int, files: bool) -> str:
    """Name of the row."""
    return f"fork, {megabytes} MB of state, {'1 MB of files' if files else 'no files'}, p50"


async def depth_times(sandbox: Sandbox, count: int) -> dict[str, float]:
    """Milliseconds of a fork of a fork of a fork ..."""
    taken = []
    while len(taken) < count:
        line = [await sandbox.open()]

        async def deeper(line: list[Session] = line) -> None:
            line.append(await line[-1].fork())

        taken += await clocked(DEPTH, deeper, nothing)
        for session in reversed(line):
            await session.close()
    return {f"fork of a fork, {DEPTH} deep, p50": median(taken) * 1e3}


async def lives(sandbox: Sandbox, seconds: float) -> dict[str, float]:
    """Sessions a second that are opened, used once and killed."""
    began, done = time.perf_counter(), 0

    async def live() -> None:
        nonlocal done
        while time.perf_counter() < began + seconds:
            session = await sandbox.open()
            await session.exec("1 + 1")
            await session.close()
            done += 1

    await asyncio.gather(*(live() for _ in range(AT_A_TIME)))
    return {"new + exec + kill": done / (time.perf_counter() - began)}


async def memory(sandbox: Sandbox, live: int) -> dict[str, float]:
    """Megabytes of a live session."""
    await close(await sandbox.open())
    spared, before = helpers(), available()
    sessions = [await sandbox.open() for _ in range(live)]
    for session in sessions:
        await session.exec("1 + 1")
    between = available()
    private = [held(pid) for pid in helpers() - spared]
    for session in sessions:
        await session.close()
    after = available()
    return {
        f"memory per session at {live} live, of the machine": ((before + after) / 2 - between) / live / 1e6,
        f"memory per session at {live} live, private pages": sum(private) / live / 1e6,
    }


def available() -> int:
    """Bytes that the machine could still give to programs."""
    match = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(match[1]) * 1024 if match else 0


def helpers() -> set[int]:
    """Processes below this one."""
    found, todo = set(), [os.getpid()]
    while todo:
        with contextlib.suppress(OSError):
            pid = todo.pop()
            children = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
            found.update(children)
            todo += children
    return found


def held(pid: int) -> int:
    """Bytes of a process that are nobody else's."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return 1024 * sum(map(int, re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB$", text, re.MULTILINE)))
    return 0


def measure_floors(size: Size) -> dict[str, float]:
    """What the kernel alone takes."""
    floors = {"floor: pipe round trip, p50": pipe_round_trip(size.cells) * 1e6}
    for megabytes in size.megabytes:
        taken = plain_fork(megabytes, size.forks)
        floors[f"floor: os.fork and wait, {megabytes} MB of state, p50"] = taken * 1e3
    return floors


async def measure_local(sandbox: Sandbox, size: Size) -> dict[str, float]:
    """One round."""
    measured = await exec_times(sandbox, size.cells) | await open_times(sandbox, size.sessions)
    for megabytes in size.megabytes:
        for files in (False, True):
            measured |= await fork_times(sandbox, megabytes, files, size.forks)
    return measured | await depth_times(sandbox, size.forks) | await lives(sandbox, size.seconds)


async def measure_docker(size: Size, rounds: int) -> tuple[list[dict[str, float]], str]:
    """The rounds in a container, and why there are none."""
    try:
        from agentrl.sandbox.docker import DockerSandbox

        async with DockerSandbox() as sandbox:
            taken = [
                await exec_times(sandbox, size.cells) | await fork_times(sandbox, 0, False, size.forks)
                for _ in range(rounds)
            ]
    except (ImportError, AgentRLError) as error:
        return [], f"skipped, docker: {error}"
    return [{f"docker: {name}": value for name, value in one.items()} for one in taken], ""


def targets() -> dict[str, tuple[str, float | None]]:
    """(unit, bound) of the rows, by the beginning of their names."""
    return {
        "floor: pipe": ("us", None),
        "floor": ("ms", None),
        "docker: exec of 1+1, p50": ("us", 1000),
        "docker: exec": ("us", None),
        "docker: fork": ("ms", 10),
        "exec of 1+1, p50": ("us", 100),
        "exec of 1+1, p99": ("us", 500),
        "new session, p50": ("ms", 6),
        "new session": ("ms", None),
        "fork of": ("ms", None),
        **{fork_name(megabytes, False): ("ms", 4) for megabytes in Size().megabytes},
        **{fork_name(megabytes, True): ("ms", 10) for megabytes in Size().megabytes},
        "new +": ("/s", 200),
        f"memory per session at {Size().live} live, of": ("MB", 2.5),
        "memory": ("MB", None),
    }


def rows(rounds: list[dict[str, float]]) -> list[Row]:
    """The best of the rounds."""
    made = []
    for name in rounds[0]:
        unit, target = next(bound for start, bound in targets().items() if name.startswith(start))
        better = "higher" if unit == "/s" else "lower"
        best = (max if better == "higher" else min)(one[name] for one in rounds)
        made.append(Row(name, best, unit, target, better))
    return made


async def run(size: Size, rounds: int) -> tuple[list[Row], list[str]]:
    """All rows, and what has to be said about them."""
    taken, floors = [], []
    async with LocalSandbox() as sandbox:
        await close(await sandbox.open())
        for _ in range(rounds):  # the floors between the rounds: the machine's mood is in both
            floors.append(measure_floors(size))
            taken.append(await measure_local(sandbox, size))
        live = await memory(sandbox, size.live)
    docker, why = await measure_docker(size, rounds)
    return [*rows(floors), *rows(taken), *rows([live]), *(rows(docker) if docker else [])], [why] if why else []


def main() -> int:
    words = parser(__doc__, rounds=3)
    words.add_argument("--quick", action="store_true", help="few repetitions, one round: whether it runs, no more")
    options = words.parse_args()
    if options.quick:
        options.rounds = 1
    made, notes = asyncio.run(run(QUICK if options.quick else Size(), options.rounds))
    if options.quick:
        made = [Row(row.name, row.value, row.unit) for row in made]
        notes.append("--quick: too few repetitions to hold against the targets")
    return report("sandboxed sessions", made, options, notes)


if __name__ == "__main__":
    sys.exit(main())
