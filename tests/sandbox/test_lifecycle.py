from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from agentrl.errors import SandboxError, UserError
from agentrl.sandbox import ExecStatus, LocalSandbox, Profile
from agentrl.sandbox.launcher import ZygoteHandle

DAEMON = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)"
"""Leaves a process behind that has nothing to do with its parent any more."""


@pytest.fixture(autouse=True)
async def _isolated(sandbox):
    """Skips where the machine cannot isolate."""


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mounts() -> str:
    return Path("/proc/self/mounts").read_text()


async def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        await asyncio.sleep(0.01)


async def test_nothing_is_left_after_close(processes):
    before = (set(processes()), descriptors(), mounts())
    async with LocalSandbox(Profile("bare")) as sandbox:
        sessions = [await sandbox.open() for _ in range(5)]
        await sessions[0].exec(DAEMON)
        await sessions[1].exec("import os; os._exit(1)")
        await sessions[2].exec("import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True: pass", 0.1)
        await sessions[3].close()
        assert len(processes()) > len(before[0])
    assert (set(processes()), descriptors(), mounts()) == before


async def test_nothing_of_a_session_is_left_when_its_close_returns(processes):
    async with LocalSandbox(Profile("bare")) as sandbox:
        await (await sandbox.open()).close()
        before = (set(processes()), descriptors())
        for program in (DAEMON, "x = 1", "import os; os._exit(1)", "import os; os.close(3)"):
            session = await sandbox.open()
            await session.exec(program)
            await session.close()
            await session.close()
            assert (set(processes()), descriptors()) == before


async def test_a_closed_session_says_so():
    async with LocalSandbox(Profile("bare")) as sandbox:
        session = await sandbox.open()
        await session.close()
        with pytest.raises(SandboxError, match="closed"):
            await session.exec("1")


async def test_closing_during_a_cell_ends_the_cell():
    async with LocalSandbox(Profile("bare")) as sandbox:
        session = await sandbox.open()
        cell = asyncio.create_task(session.exec("import time; time.sleep(60)", 60.0))
        await asyncio.sleep(0.05)
        await session.close()
        with pytest.raises(SandboxError, match="closed"):
            await cell


async def test_closing_the_manager_during_a_cell_ends_the_cell():
    sandbox = LocalSandbox(Profile("bare"))
    session = await sandbox.open()
    cell = asyncio.create_task(session.exec("import time; time.sleep(60)", 60.0))
    await asyncio.sleep(0.05)
    await sandbox.close()
    await sandbox.close()
    with pytest.raises(SandboxError, match="gone"):
        await cell
    with pytest.raises(SandboxError, match="closed"):
        await sandbox.open()


async def test_a_cancelled_cell_takes_its_session_with_it(processes):
    async with LocalSandbox(Profile("bare")) as sandbox:
        session = await sandbox.open()
        before = len(processes())
        cell = asyncio.create_task(session.exec("import time; time.sleep(60)", 60.0))
        await asyncio.sleep(0.05)
        cell.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cell
        await until(lambda: len(processes()) == before - 1)
        with pytest.raises(SandboxError, match="cancelled"):
            await session.exec("1")
        await session.close()


@pytest.mark.parametrize("after", [0.0, 0.0005, 0.001, 0.002, 0.004])
async def test_a_cancelled_open_leaves_nothing(processes, after):
    async with LocalSandbox(Profile("bare")) as sandbox:
        await (await sandbox.open()).close()
        before = (len(processes()), descriptors())
        tasks = [asyncio.create_task(sandbox.open()) for _ in range(10)]
        await asyncio.sleep(after)
        for task in tasks:
            task.cancel()
        opened = await asyncio.gather(*tasks, return_exceptions=True)
        for session in opened:
            if not isinstance(session, BaseException):
                await session.close()
        await until(lambda: (len(processes()), descriptors()) == before)


async def test_a_cancelled_start_leaves_nothing(processes):
    before = (set(processes()), descriptors())
    sandbox = LocalSandbox(Profile("bare"))
    task = asyncio.create_task(sandbox.open())
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (set(processes()), descriptors()) == before
    assert (await (await sandbox.open()).exec("1")).output == "1\n"
    await sandbox.close()


async def test_a_dead_zygote_is_an_infrastructure_failure_and_the_next_session_gets_a_new_one(processes):
    before = set(processes())
    async with LocalSandbox(Profile("bare")) as sandbox:
        session = await sandbox.open()
        cell = asyncio.create_task(session.exec("import time; time.sleep(60)", 60.0))
        await asyncio.sleep(0.05)
        os.kill(next(iter(sandbox._zygotes.values()))._process.pid, signal.SIGKILL)
        with pytest.raises(SandboxError, match="zygote"):
            await cell
        other = await sandbox.open()
        assert (await other.exec("1")).output == "1\n"
        await session.close()
        await other.close()
    assert set(processes()) == before


async def test_a_session_killed_from_outside_is_an_infrastructure_failure(processes):
    async with LocalSandbox(Profile("bare")) as sandbox:
        await (await sandbox.open()).close()
        before = set(processes())
        session = await sandbox.open()
        (pid,) = set(processes()) - before
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(SandboxError, match="killed from outside"):
            await session.exec("1")
        with pytest.raises(SandboxError, match="has failed"):
            await session.exec("1")


def test_a_manager_that_is_killed_leaves_nothing(processes):
    program = """
        import asyncio, os
        from agentrl.sandbox import LocalSandbox, Profile

        async def main():
            sandbox = LocalSandbox(Profile("bare"))
            sessions = [await sandbox.open() for _ in range(3)]
            await sessions[0].exec({daemon!r})
            if os.fork() == 0:  # a child of the manager that lives on and holds a copy of every socket
                import time
                time.sleep(30)
            busy = asyncio.create_task(sessions[1].exec("while True: pass", 60.0))
            await asyncio.sleep(0.05)
            print("ready", flush=True)
            await busy

        asyncio.run(main())
    """
    code = textwrap.dedent(program).format(daemon=DAEMON)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as manager:
        try:
            assert manager.stdout.readline() == b"ready\n"
            assert len(processes(manager.pid)) >= 6
            manager.kill()
            end = time.monotonic() + 5
            while processes(manager.pid) and time.monotonic() < end:
                time.sleep(0.01)
            assert not processes(manager.pid)
        finally:
            os.killpg(manager.pid, signal.SIGKILL)


async def test_descriptors_sent_by_a_program_do_not_pile_up():
    async with LocalSandbox(Profile("bare")) as sandbox:
        session = await sandbox.open()
        before = descriptors()
        code = (
            "import socket, time\ncontrol = socket.socket(fileno=3)\n"
            "socket.send_fds(control, [b'x' * 100], [0, 1, 2])\ntime.sleep(5)"
        )
        assert (await session.exec(code)).status is ExecStatus.KILLED
        assert descriptors() == before


async def test_running_out_of_descriptors_is_an_infrastructure_failure():
    async with LocalSandbox(Profile("bare")) as sandbox:
        session = await sandbox.open()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
        hoard = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    hoard.append(os.dup(0))
            with pytest.raises(SandboxError, match="ulimit"):
                await sandbox.open()
            assert (await session.exec("1")).output == "1\n"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in hoard:
                os.close(descriptor)


async def test_a_manager_belongs_to_one_event_loop():
    async with LocalSandbox(Profile("bare")) as sandbox:
        await sandbox.open()
        caught = []

        def other_loop():
            try:
                asyncio.run(sandbox.open())
            except UserError as error:
                caught.append(str(error))

        thread = threading.Thread(target=other_loop)
        thread.start()
        thread.join()
        assert "one LocalSandbox per event loop" in caught[0]


async def test_a_copy_of_the_managers_descriptor_does_not_keep_a_session_alive(processes):
    async with LocalSandbox(Profile("bare")) as sandbox:
        session = await sandbox.open()
        before = len(processes())
        copy = os.dup(session._channel._socket.fileno())  # as a forked worker of the manager has one
        await session.close()
        assert len(processes()) == before - 1
        os.close(copy)


async def test_a_zygote_that_was_stopped_refuses_by_type_and_still_has_its_last_words():
    """A session may hold the handle of a zygote that another one found dead and put away."""
    zygote = await ZygoteHandle.start((), (), watching=False)
    zygote._log.write(b"goodbye")
    await zygote.stop()
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(SandboxError, match=r"cannot be reached.*goodbye"):
        zygote.ask(theirs, {"name": 1}, lambda news: None)
