"""Places for sessions: who waits, who is refused, and that each is given back once, however a session ends."""

from __future__ import annotations

import asyncio
import random
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.errors import ForkRefused, SandboxError, SessionClosed
from agentrl.sandbox import limit
from agentrl.sandbox.limit import LimitedSandbox, fork_in_place, notice, without_waiting


class Session:
    """A session that may take its time and fail."""

    seed, rng = 1, "seeded"

    def __init__(self, sandbox):
        self.sandbox, self.closed = sandbox, False
        sandbox.live.add(self)

    async def exec(self, code, deadline=5.0):
        return code

    async def fork(self, rng="inherit", *, branch=None):
        await self.sandbox.pause("fork")
        if self.closed:
            raise SessionClosed("closed")
        return Session(self.sandbox)

    async def close(self):
        self.closed = True
        self.sandbox.live.discard(self)
        await self.sandbox.pause("close")


class Sandbox:
    fork_level = "snapshot"

    def __init__(self):
        self.live, self.fails, self.seconds = set(), {}, 0.0

    async def pause(self, what):
        await asyncio.sleep(self.seconds)
        if what in self.fails:
            raise self.fails[what]

    async def open(self, profile=None, *, seed=0, limits=None):
        await self.pause("open")
        return Session(self)

    async def close(self):
        self.live.clear()


@pytest.fixture
def made():
    """A sandbox of four places, and what is behind it."""
    behind = Sandbox()
    return LimitedSandbox(behind, 4), behind


async def waiting(sandbox):
    task = asyncio.create_task(sandbox.open())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_who_opens_waits_in_the_order_of_arrival(made):
    sandbox, behind = made
    held = [await sandbox.open() for _ in range(4)]
    first, second = await waiting(sandbox), await waiting(sandbox)
    assert len(behind.live) == sandbox.places == 4
    await held[0].close()
    await first
    assert not second.done()
    await held[1].close()
    await second
    assert (await (await second).exec("1"), sandbox.places) == ("1", 4)


async def test_forks_never_wait_and_leave_one_place(made):
    sandbox, behind = made
    session = await sandbox.open()
    twins = [await session.fork() for _ in range(2)]
    with pytest.raises(ForkRefused, match=r"3 of at most 4 are open \(sandbox.max_sessions; forks leave one place"):
        await session.fork()
    last = await sandbox.open()
    with pytest.raises(ForkRefused, match="4 of at most 4 are open"):
        await session.fork()
    for each in (*twins, last, session):
        await each.close()
    assert sandbox.places == len(behind.live) == 0


async def test_what_a_frozen_session_goes_on_in_has_its_place(made):
    sandbox, _ = made
    held = [await sandbox.open() for _ in range(4)]
    onward = await fork_in_place(held[0])
    assert sandbox.places == 4
    await held[0].close()
    assert sandbox.places == 4
    last = await fork_in_place(onward)
    await onward.close()
    await last.close()
    await last.close()
    assert sandbox.places == 3
    plain = await fork_in_place(Session(Sandbox()))
    assert isinstance(plain, Session)


async def test_a_place_is_given_back_once_in_every_way(made):
    sandbox, behind = made
    session = await sandbox.open()
    for what in ("open", "fork"):
        behind.fails = {what: SandboxError("gone")}
        for call in (sandbox.open, session.fork, lambda: fork_in_place(session)):
            before = sandbox.places
            with suppress(SandboxError):
                await (await call()).close()
            assert sandbox.places == before
    behind.fails = {"close": SandboxError("it does not end")}
    for _ in range(2):
        with pytest.raises(SandboxError, match="does not end"):
            await session.close()
        assert sandbox.places == 0
    with pytest.raises(SessionClosed):
        await fork_in_place(session)
    behind.fails = {}
    session = await sandbox.open()
    behind.seconds = 60
    for call in (sandbox.open, session.fork, lambda: fork_in_place(session)):
        running = asyncio.create_task(call())
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert sandbox.places == 1


async def test_a_close_that_is_called_off_frees_the_place_all_the_same(made):
    sandbox, behind = made
    session = await sandbox.open()
    behind.seconds = 60
    closing = asyncio.create_task(session.close())
    await asyncio.sleep(0)
    assert sandbox.places == 1, "not before the session is gone"
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert sandbox.places == 0


async def test_waiting_ends_with_an_error_when_nothing_comes_free(made, monkeypatch):
    monkeypatch.setattr(limit, "WAIT_SECONDS", 0.05)
    sandbox, _ = made
    held = [await sandbox.open() for _ in range(4)]
    with pytest.raises(SandboxError, match=r"no session .* 0.05 s: all 4 were in use. Raise sandbox.max_sessions"):
        await sandbox.open()
    await held[0].close()
    assert sandbox.places == 3
    await sandbox.open()


async def test_closing_the_sandbox_sends_away_who_waits(made):
    sandbox, _ = made
    for _ in range(4):
        await sandbox.open()
    late = await waiting(sandbox)
    await sandbox.close()
    with pytest.raises(SandboxError, match="closed while a session waited"):
        await late


async def test_who_waits_says_so_and_what_must_not_wait_is_refused(made):
    sandbox, _ = made
    said = []

    @contextmanager
    def note(what):
        said.append(what)
        yield
        said.append("over")

    notice.set(note)
    held = [await sandbox.open() for _ in range(4)]
    assert not said
    late = await waiting(sandbox)
    assert said == ["one of 4 sandbox sessions (sandbox.max_sessions)"]
    with without_waiting(), pytest.raises(ForkRefused, match="no room"):
        await sandbox.open()
    await held[0].close()
    await late
    assert said[1:] == ["over"]


@given(st.integers(0, 10_000), st.integers(1, 5))
async def test_whatever_is_called_off_when_nobody_is_left_behind(seed, most):
    """Many who open, fork, go on and close; some of them are called off at a random moment."""
    rng, behind = random.Random(seed), Sandbox()
    sandbox = LimitedSandbox(behind, most)

    async def work():
        mine = [await sandbox.open()]
        try:
            for _ in range(rng.randrange(4)):
                try:
                    mine.append(await mine[-1].fork())
                except ForkRefused:
                    mine.append(await fork_in_place(mine[-1]))
                    await mine.pop(-2).close()
                assert sandbox.places <= most
                await asyncio.sleep(0)
        finally:
            closing = asyncio.gather(*(session.close() for session in mine))
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:  # called off while it closed: what is its own it still closes
                await closing
                raise

    tasks = [asyncio.create_task(work()) for _ in range(12)]
    victims = rng.sample(tasks, 12)  # each once: a second cancellation would stop ``work`` from closing its own
    for _ in range(rng.randrange(30)):
        await asyncio.sleep(0)
        if victims and rng.random() < 0.3:
            victims.pop().cancel()
    async with asyncio.timeout(5):
        done = await asyncio.gather(*tasks, return_exceptions=True)
    assert not [each for each in done if isinstance(each, Exception)]
    assert sandbox.places == len(behind.live) == 0
