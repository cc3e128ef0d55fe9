"""The suite itself can fail: what a program gets away with, and what it leaves, is seen."""

from __future__ import annotations

import os
import subprocess
import tempfile

import pytest

from . import leftovers
from .steps import Cell, Close, Fork, Get, Open, Program, Put, play

FAULTS = {
    "wrong output": Cell("print(['got away'])"),
    "wrong status": Cell("1 / 0", ("ok",), ""),
    "state lost": Cell("import os; os._exit(1)", ("killed",), "", kept=True),
    "no exception": Cell("1", raises=("SessionFrozen",)),
    "a fork that should have been refused": Fork(ends=("ForkRefused",)),
    "a file that should not be there": Get("x", raises=("OSError",)),
    "a file that should be there": Get("y"),
    "another content": Get("x", b"other"),
    "an exception that a program must not choose": Get("y", raises=("OSError",), never=("FileNotFoundError",)),
    "a file that should not go in": Put("z", raises=("OSError",)),
    "an unknown session": Cell("1 / 0", ("ok",), "", on="other"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_program_that_gets_away_is_reported(sandbox, fault):
    wrong = await play(Program(fault, (Put("x"), Open("other"), FAULTS[fault])), sandbox)
    assert len(wrong) == 1
    assert wrong[0].startswith("step 2: ")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_refusal_says_what_it_must_and_no_more(sandbox):
    held = Cell("import os; pipe = os.pipe()", shows="")
    for fork in (Fork(ends=("ForkRefused",), shows="a thread"), Fork(ends=("ForkRefused",), never="pipe")):
        assert await play(Program("a pipe", (held, fork)), sandbox)
    fine = Program("a pipe", (held, Fork(ends=("ForkRefused",), shows="pipe"), Cell("1 / 0", on="fork"), Close()))
    assert not await play(fine, sandbox)


async def test_what_is_left_is_reported(monkeypatch, tmp_path):
    async def left() -> str:
        return " ".join(await leftovers.difference(before))

    monkeypatch.setattr(leftovers, "_SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = leftovers.footprint()
    assert not await left()

    descriptor = os.dup(0)
    assert "descriptors" in await left()
    os.close(descriptor)

    with subprocess.Popen(["sleep", "60"]) as process:  # noqa: ASYNC220 -- takes no time
        assert "processes" in await left()
        process.kill()

    (tmp_path / "socket").touch()
    assert "files" in await left()


def test_a_manager_that_grows_is_reported():
    before = leftovers.resident()
    kept = b"x" * (80 << 20)
    assert leftovers.grown(before)
    del kept
