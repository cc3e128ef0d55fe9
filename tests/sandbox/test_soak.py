"""Ten thousand sessions, opened, forked and closed, and killed at random moments; nothing of them may be left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import re
import signal
import tempfile
from pathlib import Path

import pytest

from agentrl.errors import ForkRefused, IsolationUnavailable, SandboxError
from agentrl.sandbox import ExecStatus, LocalSandbox, Profile
from agentrl.sandbox.wire import ANCESTOR

from .hostile.leftovers import descendants, difference, footprint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEED = 20
SESSIONS = 10_000
WORKERS = 8
GROWTH = 4 * 1024 * 1024
"""Bytes that the manager and the zygote may hold more after all sessions than after a fifth of them."""

HONEST = ("1 + 1", "x = [0] * 1000", "open('f', 'w').write('x' * 5000)", "import json; json.dumps({})")
HOSTILE = (
    "import os; os._exit(1)",
    "import os; os.close(3)",
    "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)",
    "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))",
    "import os; os.write(3, b'x' * 100)",
    "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "import socket; kept = socket.socketpair()",
    "open('/tmp/large', 'wb').write(bytes(1 << 20))",
)


class Soak:
    """Opens sessions and ends them in every way; a task that is cut off leaves its sessions to be closed by ``one``."""

    def __init__(self, sandbox: LocalSandbox) -> None:
        self.sandbox, self.random, self.opened, self.forked, self.failed = sandbox, random.Random(SEED), 0, 0, 0
        self.unclear = 0
        self.blamed: list[str] = []  # failures that honest programs are told to be theirs
        self.untyped: list[str] = []

    async def run(self, sessions: int, zygote_kills: int = 0) -> None:
        """Open about so many sessions, several at once; the zygote is killed so many times meanwhile."""
        end = self.opened + sessions
        killings = sorted(self.random.randrange(self.opened, end) for _ in range(zygote_kills))

        async def work() -> None:
            while self.opened < end:
                self.opened += 1
                if killings and self.opened > killings[0]:
                    killings.pop(0)
                    kill_zygote()
                if self.random.random() < 0.02:
                    kill_one(self.random)
                await self.one()

        await asyncio.gather(*(work() for _ in range(WORKERS)))

    async def one(self) -> None:
        """The life of a session and of its forks, cut off at a random moment or not at all."""
        alive: list = []
        task = asyncio.create_task(self._live(alive, random.Random(self.random.random())))
        if self.random.random() < 0.4:
            await asyncio.sleep(self.random.random() * 0.05)
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        except SandboxError:
            self.failed += 1
        except Exception as error:
            self.untyped.append(repr(error))
        for session in alive:
            if self.random.random() < 0.1:
                closing = asyncio.create_task(session.close())
                await asyncio.sleep(self.random.random() * 0.002)
                closing.cancel()
                await asyncio.gather(closing, return_exceptions=True)
            await session.close()

    async def _live(self, alive: list, choose: random.Random) -> None:
        alive.append(await self.sandbox.open(seed=choose.randrange(100)))
        honest = True
        for _ in range(choose.randint(1, 4)):
            session = choose.choice(alive)
            with contextlib.suppress(ForkRefused):
                if choose.random() < 0.5:
                    alive.append(await session.fork(choose.choice(("inherit", "derive"))))
                    self.forked += 1
                elif not session._frozen:
                    hostile = choose.random() < 0.3
                    honest = honest and not hostile
                    result = await session.exec(choose.choice(HOSTILE if hostile else HONEST), 2.0)
                    if honest and ANCESTOR in str(result):
                        self.unclear += 1  # killed from outside in the moment in which its parent could have done it
                    elif honest and result.status is not ExecStatus.OK:
                        self.blamed.append(str(result))
        choose.shuffle(alive)


def zygotes() -> list[int]:
    """Our children, which have built the jail, and theirs, the zygotes proper."""
    everybody = {pid: _status(pid, "PPid") for pid in descendants()}
    outer = [pid for pid, parent in everybody.items() if parent == str(os.getpid())]
    return outer + [pid for pid, parent in everybody.items() if parent in map(str, outer)]


def kill_zygote() -> None:
    """Kill the zygote with all that hangs on it, unless there is none just now."""
    with contextlib.suppress(IndexError, ProcessLookupError):
        os.kill(zygotes()[-1], signal.SIGKILL)


def kill_one(choose: random.Random) -> None:
    """Kill the first process of a random session, as an operator might."""
    below = len(_status(os.getpid(), "NSpid").split()) + 2  # a PID namespace is the zygote's, the next a session's
    found = [(pid, _status(pid, "NSpid").split()) for pid in descendants()]
    first = [pid for pid, numbers in found if len(numbers) >= below and numbers[-1] == "1"]
    with contextlib.suppress(IndexError, ProcessLookupError):
        os.kill(choose.choice(first), signal.SIGKILL)


def _status(pid: int, name: str) -> str:
    try:
        found = re.search(rf"^{name}:\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


def held(pid: int) -> int:
    """Bytes of memory that a process has written and shares with nobody."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(re.findall(r"^Private_Dirty:\s+(\d+) kB$", text, re.MULTILINE)[0])


async def test_ten_thousand_sessions_leave_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = footprint()
    async with LocalSandbox(Profile("bare")) as sandbox:
        try:
            await (await sandbox.open()).close()
        except IsolationUnavailable as error:
            pytest.skip(str(error))
        soak = Soak(sandbox)

        async def settled() -> dict[str, int]:
            await asyncio.sleep(0.1)  # the zygote may just have been killed
            await (await sandbox.open()).close()
            for _ in range(100):
                if len(descendants()) == 2:
                    break
                await asyncio.sleep(0.05)
            assert sorted(descendants()) == sorted(zygotes())
            gc.collect()
            outer, inner = zygotes()
            return {"manager": held(os.getpid()), "zygote": held(inner), "its parent": held(outer)}

        await soak.run(SESSIONS // 5, zygote_kills=3)
        early = await settled()
        await soak.run(SESSIONS - SESSIONS // 5)
        late = await settled()
        print(f"{soak.opened} opened, {soak.forked} forked, {soak.failed} failed; held {early} -> {late}")
        assert soak.opened >= SESSIONS
        assert soak.forked > SESSIONS // 10
        assert not soak.blamed, soak.blamed[:5]
        assert soak.unclear < SESSIONS // 500
        assert not soak.untyped, soak.untyped[:5]
        assert {name: late[name] - size for name, size in early.items() if late[name] - size > GROWTH} == {}
        kill_zygote()
    assert not await difference(before)
    assert not [record.getMessage() for record in caplog.records]
