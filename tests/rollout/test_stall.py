"""The stall report: which trajectory of which task is stuck, what it waits for, and until when; once."""

from __future__ import annotations

import asyncio
import logging

import pytest
from streaming import TASKS, Streaming, Turn, World, by_turn, scheduler

LIMITS = {"stall": 0.04, "deadline": 0.4, "retries": 0, "max_failures": 1.0}


async def reports(caplog, sampler, world, **limits):
    with caplog.at_level(logging.WARNING, "agentrl.rollout.scheduler"):
        await scheduler(sampler, world, **LIMITS | limits).grow(TASKS[:2], seed=0)
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("stalled")]


def stuck(when):
    return lambda what: asyncio.sleep(60) if when(what) else None


async def test_a_tool_that_hangs_is_named_with_trajectory_and_deadline(caplog):
    world = World(run=stuck(lambda tool: len(tool.seen) == 1))
    (one, other) = sorted(await reports(caplog, Streaming(by_turn(Turn(1), Turn(2), Turn(0))), world, group=1))
    assert one.startswith("stalled: task t0, trajectory 0 has been in env.step (look, look) of turn 2 for ")
    assert other.startswith("stalled: task t1, ")
    assert "its deadline is 0.4 s (rollout.deadline). 2 trajectories are live." in one


async def test_it_is_said_once_for_each_stage(caplog):
    """Two calls hang, one after the other: two reports, though each is looked at several times."""
    world = World(run=lambda tool: asyncio.sleep(0.12))
    sampler = Streaming(by_turn(Turn(1), Turn(1), Turn(0)))
    lines = await reports(caplog, sampler, world, group=1, deadline=5.0)
    mine = [line for line in lines if "task t0," in line]
    assert len(mine) == 2
    assert ["of turn 1 " in mine[0], "of turn 2 " in mine[1]] == [True, True]


async def test_nothing_is_said_of_what_goes_on(caplog):
    sampler = Streaming(by_turn(Turn(1, [1.0] * 5, 2e-3), Turn(0)))
    assert await reports(caplog, sampler, World(run=lambda _: asyncio.sleep(2e-3)), group=2, stall=0.5) == []


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("start", "in reset of turn 0"),
        ("sampling", "in sampling of turn 0"),
        ("reward", "in env.step (answer) of turn"),
    ],
)
async def test_every_stage_has_its_name(caplog, stage, says):
    delay = 60.0 if stage == "sampling" else 0.0
    world = World(**({} if stage == "sampling" else {stage: stuck(lambda _: True)}))
    lines = await reports(caplog, Streaming(by_turn(Turn(0, [1.0], delay))), world, group=1)
    assert len(lines) == 2
    assert says in lines[0]


async def test_a_branch_is_reported_by_its_name(caplog):
    world = World(run=stuck(lambda tool: bool(tool.lineage)))
    options = {"initial": 1, "probability": 1.0}
    sampler = Streaming(by_turn(Turn(1), Turn(1), Turn(0)))
    lines = await reports(caplog, sampler, world, group=2, policy="random_tree", policy_options=options)
    assert any("task t0, trajectory 0.1 has been in env.step (look) of turn 2" in line for line in lines)


@pytest.mark.parametrize("policy", ["random_tree", "expand_tree"])
async def test_who_waits_for_a_fork_is_said_to_wait_for_a_fork(caplog, policy):
    """The fork hangs, not the parent's tool: its call has not begun."""
    world = World(fork=stuck(lambda _: True))
    options = {"initial": 1, "probability": 1.0} if policy == "random_tree" else {"trees": 1}
    sampler = Streaming(by_turn(Turn(1), Turn(1), Turn(0)))
    lines = await reports(caplog, sampler, world, group=2, policy=policy, policy_options=options)
    assert any("task t0, trajectory 0 has been in" in line and "a fork of its state" in line for line in lines), lines


async def test_who_waits_for_a_place_for_its_calls_is_said_to_wait_for_that(caplog):
    world = World(run=stuck(lambda _: True))
    lines = await reports(caplog, Streaming(by_turn(Turn(1), Turn(0))), world, group=2, max_calls=1)
    assert sum("in env.step (look) of turn 1" in line for line in lines) >= 1
    assert any("in a place for its tool calls (look) of turn 1" in line for line in lines)
