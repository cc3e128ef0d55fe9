"""What all processes of a session hold together is bounded: by a cgroup where there is one, else by the watchdog."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentrl.sandbox import ExecStatus, Limits, LocalSandbox, Profile, cgroup, local
from agentrl.sandbox.cgroup import MemoryGroups

LIMITS = Limits(memory_bytes=200 << 20, scratch_bytes=1 << 20)
HOG = """
import os, time
children = []
while len(children) < 4:
    child = os.fork()
    if child == 0:
        x = bytearray(b'x') * (80 << 20); time.sleep(5); os._exit(0)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
TAKE = "x = bytearray(b'x') * (80 << 20)"
SHARED = f"{TAKE}\n" + HOG.replace(f"{TAKE}; time.sleep(5)", "time.sleep(1)")


def groups() -> MemoryGroups | None:
    try:
        return MemoryGroups.find()
    except OSError:
        return None


@pytest.fixture(params=["cgroup", "watchdog"])
async def bounded(request, monkeypatch):
    """A sandbox whose sessions are bounded in the one way or the other."""
    if request.param == "watchdog":

        def none() -> MemoryGroups:
            raise OSError("none for this test")

        monkeypatch.setattr(local.MemoryGroups, "find", none)
    elif (found := groups()) is None:
        pytest.skip("this user may make no memory cgroups")
    else:
        found.close()
    async with LocalSandbox(Profile("bare")) as made:
        yield made


async def test_processes_are_counted_together(bounded):
    session = await bounded.open(limits=LIMITS)
    other = await bounded.open(limits=LIMITS)
    await other.exec("x = 7")
    result = await session.exec(HOG, 20.0)
    if result.status is ExecStatus.MEMORY:
        assert not result.state_kept
        assert f"held more than its {LIMITS.memory_bytes} bytes" in result.error
    else:  # the kernel chose one of the children
        assert "-9" in result.output
    assert (await other.exec("x")).output == "7\n"


async def test_pages_that_processes_share_are_counted_once(bounded):
    session = await bounded.open(limits=LIMITS)
    result = await session.exec(SHARED, 20.0)
    assert (result.status, result.output) == (ExecStatus.OK, "[0, 0, 0, 0]\n")


async def test_a_fork_is_bounded_for_itself(bounded):
    session = await bounded.open(limits=LIMITS)
    await session.exec("x = bytearray(b'x') * (80 << 20)")
    forks = [await session.fork() for _ in range(4)]
    for fork in forks:
        assert (await fork.exec("x[::4096] = b'y' * len(x[::4096]); len(x) >> 20")).output == "80\n"
    result = await forks[0].exec(HOG, 20.0)
    assert result.status is ExecStatus.MEMORY or "-9" in result.output
    assert (await forks[1].exec("x[0]")).output == "121\n"


async def test_no_group_is_left():
    if (found := groups()) is None:
        pytest.skip("this user may make no memory cgroups")
    found.close()
    async with LocalSandbox(Profile("bare")) as sandbox:
        session = await sandbox.open()
        fork = await session.fork()
        folder = sandbox._groups.folder
        inside = [(inner / "cgroup.procs").read_text().split() for inner in folder.iterdir() if inner.is_dir()]
        assert sorted(map(len, inside)) == [1, 1]
        await session.close()
        await fork.close()
    assert not folder.exists()


def test_groups_of_a_dead_manager_are_swept(tmp_path):
    dead = tmp_path / "agentrl-4194303-abcdef"  # one above the highest number a process can have
    alive = tmp_path / f"agentrl-{os.getpid()}-abcdef"
    for folder in (dead / "1", alive / "1"):
        folder.mkdir(parents=True)
    cgroup._sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [alive.name]


@pytest.mark.parametrize(
    ("mounts", "paths", "found"),
    [
        (
            "30 24 0:26 / {root} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate",
            "0::/user.slice/run.scope\n",
            [("user.slice/run.scope", "memory.max"), ("user.slice", "memory.max"), ("", "memory.max")],
        ),
        (
            "33 27 0:29 / {root} rw - cgroup cgroup rw,memory",
            "4:memory:/user.slice\n0::/\n",
            [("user.slice", "memory.limit_in_bytes"), ("", "memory.limit_in_bytes")],
        ),
        ("33 27 0:29 / {root} rw - cgroup cgroup rw,cpu,cpuacct", "4:cpu,cpuacct:/\n", []),
    ],
)
def test_where_groups_are_looked_for(tmp_path, monkeypatch, mounts, paths, found):
    (tmp_path / "user.slice/run.scope").mkdir(parents=True)
    texts = {
        "/proc/self/mountinfo": mounts.format(root=tmp_path) + "\n",
        "/proc/self/cgroup": paths,
        f"{tmp_path}/cgroup.controllers": "cpu io memory pids\n",
    }
    monkeypatch.setattr(cgroup, "_read", lambda path: texts.get(path, ""))
    assert cgroup._candidates() == [(Path(tmp_path, name), limit) for name, limit in found]
