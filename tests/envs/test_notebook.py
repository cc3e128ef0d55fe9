from __future__ import annotations

import random

import pytest

from agentrl import Message, ToolCall
from agentrl.envs import notebook
from agentrl.errors import UserError
from agentrl.sandbox.shared import close_shared_sandboxes
from agentrl.tool import MAX_RESULT_CHARS


@pytest.fixture
async def play():
    """Plays messages on the first task and gives the last step."""
    envs = []

    async def _play(messages):
        env = notebook.Notebook()
        envs.append(env)
        await env.reset(seed=0, options={"task": TASK})
        for message in messages:
            result = await env.step(message)
        return result

    yield _play
    for env in envs:
        await env.close()
    await close_shared_sandboxes()


TASK = next(iter(notebook.Notebook().tasks("train")))
EXPERT = notebook.Notebook().expert(TASK, random.Random(0))
FILE, NAME = TASK.metadata["file"], TASK.metadata["name"]


def cell(code):
    return Message("assistant", "", (ToolCall("call", "python", {"code": code}),))


async def test_the_expert_solves_it(play):
    assert (await play(EXPERT[:1])).observation[0].content == NAME
    assert (await play(EXPERT[:3])).observation[0].content == TASK.answer
    assert (await play(EXPERT)).reward == 1.0


async def test_the_last_cell_alone_knows_nothing(play):
    assert "NameError: name 'kept' is not defined" in (await play(EXPERT[2:3])).observation[0].content


async def test_one_turn_sees_one_page_only(play):
    whole = f"kept = {NAME}; print(sum(a * b for a, b in zip(kept, {NAME})))"
    assert (await play([cell(whole)])).observation[0].content != TASK.answer
    several = tuple(
        ToolCall(f"call_{i}", "python", {"code": code})
        for i, code in enumerate([f"kept = {NAME}", f"print(sum(a * b for a, b in zip(kept, {NAME})))"])
    )
    assert (await play([Message("assistant", "", several)])).observation[1].content != TASK.answer


async def test_a_page_is_too_long_to_read(play):
    content = (await play([cell(f"print({NAME})")])).observation[0].content
    assert len(content) < MAX_RESULT_CHARS + 60 < len(str(notebook.make_pages(TASK)[0]))


async def test_wasting_a_turn_is_forgiven(play):
    assert (await play([cell("1"), *EXPERT])).reward == 1.0


async def test_a_lost_session_still_has_the_task(play):
    content = (await play([cell("import os; os._exit(1)"), *EXPERT[:3]])).observation[0].content
    assert content == TASK.answer


def test_splits_are_disjoint_and_options_checked():
    seeds = [
        {task.metadata["seed"] for task in notebook.Notebook(length=10).tasks(split)} for split in ("train", "test")
    ]
    assert not seeds[0] & seeds[1]
    assert list(map(len, seeds)) == [400, 100]
    with pytest.raises(UserError, match="notebook: expected"):
        notebook.Notebook(length=0)


async def test_it_keeps_the_contract(env_conformance):
    await env_conformance(notebook.Notebook, tasks=2)
