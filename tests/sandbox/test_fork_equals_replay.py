"""For random programs split at a random point: a fork goes on exactly as a replay from the start would."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

programs = runpy.run_path(str(Path(__file__).with_name("programs.py")))


@pytest.fixture(scope="module")
def runner():
    """An event loop that lasts as long as the module's sandbox: hypothesis calls plain functions."""
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(
    scope="module",
    params=["local", "remote", pytest.param("docker", marks=[pytest.mark.docker, pytest.mark.timeout(300)])],
)
def shared(request, runner, backends):
    manager = backends[request.param]()
    yield runner.run(manager.__aenter__())
    runner.run(manager.__aexit__(None, None, None))


DISTURB = "import os, shutil; os.chdir('/work'); shutil.rmtree('d'); b.clear()"


async def play(session, cells):
    return [str(await session.exec(cell)) for cell in cells]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=programs["PROGRAMS"], data=st.data())
def test_a_fork_goes_on_as_a_replay_from_the_start_would(runner, shared, cells, data):
    split = data.draw(st.integers(0, len(cells)), label="split")
    seed = data.draw(st.integers(0, 3), label="seed")

    async def check():
        opened = [await shared.open(seed=seed), await shared.open(seed=seed)]

        async def fork(session, rng="inherit"):
            opened.append(await session.fork(rng))
            return opened[-1]

        try:
            replayed, session = opened
            expected = await play(replayed, [programs["START"], *cells, programs["TELL"]])
            before = await play(session, [programs["START"], *cells[:split]])
            first, disturbed = await fork(session), await fork(session, "derive")
            await play(disturbed, [*reversed(cells), DISTURB])
            deeper = await fork(await fork(session))
            for goes_on in (first, deeper):
                assert before + await play(goes_on, [*cells[split:], programs["TELL"]]) == expected
        finally:
            for session in reversed(opened):
                await session.close()

    runner.run(check())
