"""Forks: independent of parent and siblings, refused with the list where they cannot be exact."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from agentrl.errors import ForkRefused, SandboxError, SessionClosed
from agentrl.sandbox import ExecStatus, Limits

pytestmark = pytest.mark.asyncio(loop_scope="module")

REFUSED = {
    "a thread": ("import threading; e = threading.Event(); threading.Thread(target=e.wait).start()", "running thread"),
    "a child": ("import os, time; os.fork() or time.sleep(60)", "child process"),
    "a child that nobody has waited for": ("import os; os.fork() or os._exit(0)", "child process"),
    "a pool": ("import multiprocessing; p = multiprocessing.Pool(2)", "child processes"),
    "anonymous shared memory": ("import mmap; m = mmap.mmap(-1, 4096)", "shared memory (anonymous, 4096 bytes)"),
    "a shared file map": (
        "import mmap; f = open('f', 'w+b'); f.truncate(5000); m = mmap.mmap(f.fileno(), 5000)",
        "shared memory",
    ),
    "a read-only map of a scratch file": (
        "import mmap; f = open('f', 'w+'); f.write('x'); f.flush(); m = mmap.mmap(f.fileno(), 1, access=1)",
        "shared memory",
    ),
    "numpy.memmap": ("import numpy; m = numpy.memmap('f', mode='w+', shape=(100,))", "shared memory"),
    "memory in /dev/shm": (
        "import mmap; f = open('/dev/shm/x', 'w+b'); f.truncate(100); m = mmap.mmap(f.fileno(), 100); f.close()",
        "shared memory (/tmp/x, 4096 bytes)",
    ),
    "a sqlite file": ("import sqlite3; d = sqlite3.connect('f'); d.execute('create table t(x)')", "sqlite connection"),
    "an untouched sqlite file": ("import sqlite3; d = sqlite3.connect('f')", "sqlite connection to /work/f"),
    "a pipe": ("import os; p = os.pipe()", "descriptor 4: a pipe"),
    "a socket pair": ("import socket; s = socket.socketpair()", "a socket"),
    "an event loop": ("import asyncio; loop = asyncio.new_event_loop()", "eventpoll"),
    "a timer": ("import signal; signal.setitimer(signal.ITIMER_REAL, 100)", "a running timer (signal.ITIMER_REAL)"),
    "a lock": ("import fcntl; f = open('f', 'w'); fcntl.flock(f, fcntl.LOCK_EX)", "a lock on /work/f"),
    "a file of the library": ("import json; f = open(json.__file__)", "outside /work and /tmp"),
    "a deleted working directory": ("import os; os.mkdir('x'); os.chdir('x'); os.rmdir('../x')", "working directory"),
    "a half-read folder": (
        "import os\nfor i in range(2000): open(str(i), 'w')\nl = os.scandir('.'); next(l)",
        "a half-read folder",
    ),
    "a pending signal": (
        "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [10]); os.kill(1, 10)",
        "pending signals (SIGUSR1)",
    ),
    "no free descriptors": ("files = []\nwhile len(files) < 58: files.append(open('f', 'w'))", "free descriptors"),
}


@pytest.mark.parametrize(("code", "reason"), REFUSED.values(), ids=REFUSED)
async def test_what_cannot_be_forked_is_refused_and_the_session_goes_on(session, code, reason):
    result = await session.exec(f"x = 5\n{code}\nNone")
    assert result.status is ExecStatus.OK, result
    with pytest.raises(ForkRefused) as caught:
        await session.fork()
    assert any(reason in said for said in caught.value.reasons), caught.value.reasons
    assert all(said in str(caught.value) for said in caught.value.reasons)
    assert (await session.exec("x")).output == "5\n"


async def test_a_refusal_lists_everything_and_can_be_mended(session):
    await session.exec(
        "import os, signal, sqlite3, threading\ne = threading.Event()\nt = threading.Thread(target=e.wait); t.start()"
    )
    await session.exec("p = os.pipe(); d = sqlite3.connect('db'); signal.setitimer(signal.ITIMER_REAL, 100)")
    with pytest.raises(ForkRefused) as caught:
        await session.fork()
    assert len(caught.value.reasons) == 5, caught.value.reasons
    await session.exec(
        "e.set(); t.join(); os.close(p[0]); os.close(p[1]); d.close(); signal.setitimer(signal.ITIMER_REAL, 0)"
    )
    fork = await session.fork()
    assert (await fork.exec("p")).output == "(4, 5)\n"
    await fork.close()


async def test_sqlite_in_memory_is_forked(session):
    await session.exec(
        "import sqlite3\nd = sqlite3.connect(':memory:')\n"
        "d.execute('create table t(x)'); d.execute('insert into t values (1)')"
    )
    fork, other = await session.fork(), await session.fork()
    await fork.exec("d.execute('insert into t values (2)')")
    assert (await fork.exec("d.execute('select sum(x) from t').fetchone()")).output == "(3,)\n"
    assert (await other.exec("d.execute('select sum(x) from t').fetchone()")).output == "(1,)\n"
    await asyncio.gather(fork.close(), other.close())


async def test_at_fork_handlers_do_not_run_and_the_fork_cannot_tell(session):
    await session.exec(
        "import os; seen = []\n"
        "os.register_at_fork(before=lambda: seen.append(1), after_in_child=lambda: seen.append(2))"
    )
    ids = "import os, threading; seen, os.getpid(), os.getppid(), os.getuid(), threading.main_thread().native_id"
    before = await session.exec(ids)
    fork = await session.fork()
    assert (await fork.exec(ids)).output == before.output
    await fork.close()


async def test_derived_random_numbers_depend_on_seed_and_branch(sandbox):
    async def draw(seed, branch):
        session = await sandbox.open(seed=seed)
        await session.exec("import random, numpy\nr = random.Random(1)")
        fork = await session.fork("derive", branch=branch)
        drawn = (await fork.exec("random.random(), numpy.random.rand(), r.random()")).output
        facts = fork.rng, fork.seed == session.seed
        await asyncio.gather(session.close(), fork.close())
        return drawn, facts

    one, again, other, third = await asyncio.gather(draw(1, 0), draw(1, 0), draw(1, 1), draw(2, 0))
    assert one == again
    assert len({one[0], other[0], third[0]}) == 3
    assert len({drawn.split(", ")[2] for drawn, _ in (one, other, third)}) == 1  # a generator of the program's own
    assert one[1] == ("derive", False)


async def test_many_forks_of_one_session(sandbox):
    """More than a session may have processes: each counts for itself."""
    session = await sandbox.open(limits=Limits(processes=8))
    await session.exec("x = list(range(1000))")
    forks = [await session.fork() for _ in range(20)]
    results = await asyncio.gather(
        *(f.exec(f"import os\np = os.fork()\nif p: os.waitpid(p, 0); x[{i}] = 'own'") for i, f in enumerate(forks))
    )
    assert {str(r.status) for r in results} == {"ok"}
    counted = await asyncio.gather(*(f.exec("x.count('own')") for f in forks))
    assert {r.output for r in counted} == {"1\n"}
    await session.close()
    await asyncio.gather(*(f.close() for f in forks))


async def test_a_chain_of_forks_ends_with_a_reason(sandbox):
    chain = [await sandbox.open()]
    await chain[0].exec("depth = 0")

    async def deepen():
        chain.append(await chain[-1].fork())
        await chain[-1].exec("depth += 1")

    async def deepen_often(times):
        for _ in range(times):
            await deepen()

    await deepen_often(25)
    with pytest.raises(ForkRefused, match="32 deep"):
        await deepen_often(10)
    assert (await chain[-1].exec("depth")).output == f"{len(chain) - 1}\n"
    for session in chain:
        await session.close()


async def test_limits_hold_in_a_fork(sandbox):
    session = await sandbox.open(limits=Limits(processes=6, scratch_bytes=1 << 20))
    fork = await session.fork()
    bomb = (
        "import os, signal\nn = 0\ntry:\n    while True:\n        if os.fork() == 0: signal.pause()\n        n += 1\n"
        "except OSError: pass\nn"
    )
    assert int((await fork.exec(bomb)).output) < 6
    other = await session.fork()
    assert "No space left" in (await other.exec("open('big', 'wb').write(bytes(2 << 20))")).error
    await session.close()
    await asyncio.gather(fork.close(), other.close())


async def test_closing_a_parent_waits_for_its_forks(sandbox, processes):
    before = set(processes())
    session = await sandbox.open()
    fork = await session.fork()
    inner = await fork.fork()
    await session.close()
    await fork.close()
    assert (await inner.exec("1 + 1")).output == "2\n"
    assert len(set(processes()) - before) == 3
    await inner.close()
    assert set(processes()) == before
    with pytest.raises(SessionClosed, match="closed"):
        await session.fork()


async def test_a_lost_session_cannot_be_forked(sandbox):
    session = await sandbox.open()
    await session.exec("import os; os._exit(1)")
    with pytest.raises(SessionClosed, match=r"lost.*exit status 1"):
        await session.fork()
    await session.close()


async def test_how_a_fork_ended_is_known(sandbox):
    session = await sandbox.open(limits=Limits(cpu_seconds=1))
    ends = {
        "import os; os._exit(7)": "exit status 7",
        "import os; os.abort()": "was ended by SIG",
        "while True: pass": "CPU time",
    }
    for code, how in ends.items():
        fork = await session.fork()
        result = await fork.exec(code, 10.0)
        assert (result.status, result.state_kept) == (ExecStatus.KILLED, False)
        assert how in result.error
        await fork.close()
    await session.close()


async def test_a_fork_killed_from_outside_is_an_infrastructure_failure(sandbox, processes):
    session = await sandbox.open()
    before = set(processes())
    fork = await session.fork()
    (pid,) = set(processes()) - before
    await asyncio.sleep(0.4)  # the moment in which its parent could have done it is over
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(SandboxError, match="killed from outside"):
        await fork.exec("1")
    await asyncio.gather(session.close(), fork.close())


async def test_a_cancelled_fork_leaves_nothing(sandbox, processes):
    session = await sandbox.open()
    await session.exec("x = bytearray(50 << 20)")
    before = set(processes())
    for after in (0.0, 0.0005, 0.001, 0.002, 0.004):
        task = asyncio.create_task(session.fork())
        await asyncio.sleep(after)
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(result, BaseException):
            await result.close()
    for _ in range(200):
        if set(processes()) <= before:
            break
        await asyncio.sleep(0.01)
    assert set(processes()) <= before
    await session.close()
