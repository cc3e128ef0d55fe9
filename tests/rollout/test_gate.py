"""The gate: never more than its limit, whatever is cancelled when; fair; and nothing is lost."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import TASKS, Streaming, Turn, World, by_turn, check_tree, scheduler, word

from agentrl.rollout.gate import Gate


@settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(1, 5),
    holders=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=25),
    cancels=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 12)), max_size=25),
)
def test_the_limit_holds_and_nothing_is_lost(limit, holders, cancels):
    """``holders``: (count, rank, loops inside); ``cancels``: (who, after how many loops), also in front of the gate."""

    async def run():
        gate, held, most, entered = Gate(limit), 0, 0, 0

        async def hold(count, rank, loops):
            nonlocal held, most, entered
            async with gate.hold(count, rank):
                held += min(count, limit)
                most, entered = max(most, held), entered + 1
                try:
                    for _ in range(loops):
                        await asyncio.sleep(0)
                finally:
                    held -= min(count, limit)

        tasks = [asyncio.create_task(hold(*each)) for each in holders]
        for loop in range(13):
            for who, when in cancels:
                if when == loop and who < len(tasks):
                    tasks[who].cancel()
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert most <= limit
        assert held == 0
        assert entered >= sum(not task.cancelled() for task in tasks)
        async with asyncio.timeout(1), gate.hold(limit):
            pass  # all of it is free again

    asyncio.run(run())


async def test_let_in_and_called_off_at_the_same_moment():
    """The place was given to a waiter that is cancelled before it runs: it goes to the next one."""
    gate, order = Gate(1), []

    async def hold(name, inside):
        async with gate.hold():
            order.append(name)
            await inside.wait()

    first, rest = asyncio.Event(), asyncio.Event()
    rest.set()
    one = asyncio.create_task(hold("one", first))
    two, three = (asyncio.create_task(hold(name, rest)) for name in ("two", "three"))
    await asyncio.sleep(0)
    first.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # one has left, two was let in and has not run yet
    two.cancel()
    async with asyncio.timeout(1):
        await asyncio.gather(one, two, three, return_exceptions=True)
    assert order in (["one", "three"], ["one", "two", "three"])
    async with asyncio.timeout(1), gate.hold():
        pass


async def test_the_lowest_rank_goes_in_first_and_equals_by_arrival():
    gate, order = Gate(1), []

    async def hold(name, rank):
        async with gate.hold(rank=rank):
            order.append(name)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for name, rank in (("a", 5), ("b", 2), ("c", 1), ("d", 2), ("e", 0), ("f", 1)):
            group.create_task(hold(name, rank))
    assert order == ["e", "c", "f", "b", "d", "a"], "the last to arrive is the first to go in"


async def test_more_than_the_limit_waits_for_all_of_it():
    gate, log = Gate(3), []

    async def hold(name, count):
        async with gate.hold(count):
            log.append((name, "in"))
            await asyncio.sleep(0.001)
            log.append((name, "out"))

    async with asyncio.timeout(2), asyncio.TaskGroup() as group:
        group.create_task(hold("small", 1))
        group.create_task(hold("huge", 99))
        group.create_task(hold("late", 1))
    assert log == [(name, way) for name in ("small", "huge", "late") for way in ("in", "out")], "huge is not starved"


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError])
async def test_what_fails_inside_gives_its_place_back(error):
    gate = Gate(2)
    for _ in range(3):
        with suppress(error):
            async with gate.hold(2):
                raise error
    async with asyncio.timeout(1), gate.hold(2):
        pass


# -- in a scheduler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["group", "random_tree"])
async def test_calls_that_run_at_once_are_limited(policy):
    """Turns of two calls, 32 trajectories, and a limit of 3: the tool counts for itself."""
    world = World(run=lambda _: asyncio.sleep(1e-3))
    grower = scheduler(Streaming(by_turn(Turn(2), Turn(1), Turn(0))), world, group=8, policy=policy, max_calls=3)
    trees = await grower.grow(TASKS[:4], seed=0)
    assert world.peak == 3
    assert sum(tree.spent["calls"] for tree in trees) == world.calls
    one = World(run=lambda _: asyncio.sleep(1e-4))
    await scheduler(Streaming(by_turn(Turn(1), Turn(0))), one, group=8, policy=policy, max_calls=1).grow(TASKS, seed=0)
    assert one.peak == 1


async def test_a_turn_with_more_calls_than_the_limit_has_it_for_itself():
    world = World(run=lambda _: asyncio.sleep(1e-3))
    await scheduler(Streaming(by_turn(Turn(4), Turn(0))), world, group=4, max_calls=2).grow(TASKS[:1], seed=0)
    assert (world.peak, world.calls) == (4, 16), "it cannot be split, so nothing else runs meanwhile"


@pytest.mark.parametrize("policy", ["group", "random_tree", "expand_tree"])
async def test_live_trajectories_are_limited(policy):
    sampler, rng = Streaming(None), random.Random(0)
    most = 0

    def script(request):
        nonlocal most
        most = max(most, sampler.streams + 1)
        return Turn(rng.choice([0, 1, 1]), [1.0] * 3, 5e-4)

    sampler.script = script
    trees = await scheduler(sampler, World(), group=6, policy=policy, max_live=3).grow(TASKS[:4], seed=0)
    assert most == 3
    for tree in trees:
        check_tree(tree, 6, pairs=policy == "expand_tree")


@pytest.mark.parametrize("policy", ["group", "random_tree"])
async def test_tasks_take_turns(policy):
    """One slow task and seven quick ones, two places: the slow one keeps at most one of them for itself."""
    started = []

    def script(request):
        task = TASK_OF[request.ids[1]]
        if request.turn == 0:
            started.append(task)
        return Turn(0, [1.0] * 3, 0.01 if task == "t0" else 1e-4)

    sampler = Streaming(script)
    await scheduler(sampler, World(), group=4, policy=policy, max_live=2).grow(TASKS, seed=0)
    assert len(started) == 32
    waves = [set(started[at : at + 8]) for at in range(0, 32, 8)]
    assert len(waves[0]) == 8, "every task has begun once before one begins twice"
    assert all(len(wave) >= 7 for wave in waves), "and so on: the slow one may be late by one"


TASK_OF = {word(task.prompt[0].content): task.id for task in TASKS}
