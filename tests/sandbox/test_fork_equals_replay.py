"""For random programs split at a random point: a fork goes on exactly as a replay from the start would."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentrl.sandbox import LocalSandbox

programs = runpy.run_path(str(Path(__file__).with_name("programs.py")))


@pytest.fixture(scope="module")
def runner():
    """An event loop that lasts as long as the module's sandbox: hypothesis calls plain functions."""
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def shared(runner):
    made = LocalSandbox()
    yield made
    runner.run(made.close())


async def play(session, cells):
    return [str(await session.exec(cell)) for cell in cells]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=programs["PROGRAMS"], data=st.data())
def test_a_fork_goes_on_as_a_replay_from_the_start_would(runner, shared, cells, data):
    split = data.draw(st.integers(0, len(cells)), label="split")
    seed = data.draw(st.integers(0, 3), label="seed")

    async def check():
        replayed = await shared.open(seed=seed)
        session = await shared.open(seed=seed)
        try:
            expected = await play(replayed, [programs["START"], *cells, programs["TELL"]])
            before = await play(session, [programs["START"], *cells[:split]])
            first = await session.fork()
            disturbed = await session.fork("derive")
            await play(
                disturbed, [*reversed(cells), "import os, shutil; os.chdir('/work'); shutil.rmtree('d'); b.clear()"]
            )
            second = await session.fork()
            deeper = await second.fork()
            for fork in (first, deeper):
                assert before + await play(fork, [*cells[split:], programs["TELL"]]) == expected
        finally:
            await replayed.close()
            await shared_close(session, shared)

    runner.run(check())


async def shared_close(session, sandbox):
    await session.close()
    for other in tuple(sandbox._sessions):
        await other.close()
