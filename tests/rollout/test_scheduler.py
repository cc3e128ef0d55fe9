"""Many episodes at once: the same trees in the same order, whatever happens on the way."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from agentrl import Task, tool
from agentrl.config import RolloutConfig
from agentrl.errors import SamplerError, TaskError, TooManyFailures
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import TokenWriter
from agentrl.sampler.hf import HFSampler
from agentrl.types import Outcome, SamplingParams

CALL = '<tool_call>\n{"name": "double", "arguments": {"x": 7}}\n</tool_call><|im_end|>'
ANSWER = "14<|im_end|>"
TASKS = [Task(f"double {n}", answer=str(2 * n), id=f"t{n}") for n in range(6)]
PARAMS = SamplingParams(80, 0.9)


@pytest.fixture
def make(renderer):
    """A scheduler over ``make_env`` and ``sampler`` with ``limits``."""

    def scheduler(make_env, sampler, **limits):
        return Scheduler(
            make_env, lambda seed: TokenWriter(sampler, renderer, PARAMS, seed), RolloutConfig(**limits), PARAMS
        )

    return scheduler


def content(trees):
    """Everything but wall times."""
    return [
        (
            tree.task.id,
            [(node.parent, node.author, node.token_ids, node.logprobs) for node in tree.nodes],
            [(leaf.node, leaf.reward, leaf.outcome, leaf.seed, leaf.metrics) for leaf in tree.leaves],
        )
        for tree in trees
    ]


async def test_a_group_is_a_tree_under_its_prompt(make, doubling, scripted_sampler):
    (tree,) = await make(doubling, scripted_sampler(CALL, ANSWER)).play(TASKS[:1], group=3, seed=0)
    assert [node.author for node in tree.nodes] == ["prompt", *["policy", "tool", "policy"] * 3]
    assert [node.parent for node in tree.nodes] == [-1, 0, 1, 2, 0, 4, 5, 0, 7, 8]
    assert [leaf.node for leaf in tree.leaves] == [3, 6, 9]
    assert (tree.temperature, tree.top_p) == (0.9, 1.0)
    for leaf in tree.leaves:
        assert [node.author for node in tree.path(leaf)] == ["prompt", "policy", "tool", "policy"]


async def test_prompts_that_depend_on_the_seed_are_several_roots(make, doubling, scripted_sampler):
    class Varied(doubling):
        async def reset(self, *, seed=None, options=None):
            opening, info = await super().reset(seed=seed, options=options)
            self.system = None
            return (*opening, *(opening if seed % 2 else ())), info

    (tree,) = await make(Varied, scripted_sampler(lambda *_: ANSWER)).play(TASKS[:1], group=8, seed=0)
    roots = [node for node in tree.nodes if node.parent == -1]
    assert len(roots) == 2
    for leaf in tree.leaves:
        twice = leaf.seed % 2
        assert len(tree.path(leaf)[0].messages) == 1 + twice


async def test_the_order_is_that_of_the_tasks_not_of_finishing(make, doubling, scripted_sampler):
    async def slowly(ids, params):
        await asyncio.sleep(random.random() * 0.02)
        return ANSWER

    finished = []
    scheduler = make(doubling, scripted_sampler(slowly))
    trees = await scheduler.play(TASKS, group=4, seed=0, progress=lambda leaf: finished.append(leaf.seed))
    assert [tree.task.id for tree in trees] == [task.id for task in TASKS]
    in_order = [leaf.seed for tree in trees for leaf in tree.leaves]
    assert sorted(finished) == sorted(in_order)
    assert finished != in_order


async def test_the_same_seed_gives_the_same_trees(make, doubling, make_model, renderer):
    async def run(seed, **limits):
        sampler = HFSampler(make_model(), max_slots=64, max_length=320)
        try:
            return content(await make(doubling, sampler, **limits).play(TASKS[:3], group=3, seed=seed))
        finally:
            await sampler.close()

    first = await run(1)
    assert await run(1) == first
    assert await run(1, max_live=3) == first, "however many are in flight"
    assert await run(2) != first


async def test_equal_tasks_of_one_wave_are_played_differently(make, doubling, scripted_sampler):
    trees = await make(doubling, scripted_sampler(ANSWER)).play([TASKS[0], TASKS[1], TASKS[0]], group=3, seed=5)
    assert len({leaf.seed for tree in trees for leaf in tree.leaves}) == 9


async def test_limits_on_what_is_live(make, doubling, scripted_sampler):
    live, most = 0, 0

    async def watch(ids, params):
        nonlocal live, most
        live += 1
        most = max(most, live)
        await asyncio.sleep(0.001)
        live -= 1
        return ANSWER

    await make(doubling, scripted_sampler(watch), max_live=5).play(TASKS, group=4, seed=0)
    assert most == 5


async def test_nothing_waits_for_the_slowest_tool(make, doubling, scripted_sampler):
    """64 episodes with a tool of 50 ms each: one after another they would take 3.2 s."""

    @tool(name="double")
    async def slow_double(x: int) -> str:
        """Double, slowly.

        Args:
            x: the number.
        """
        await asyncio.sleep(0.05)
        return str(2 * x)

    class Slow(doubling):
        tools = (slow_double,)

    scheduler = make(Slow, scripted_sampler(CALL, ANSWER))
    began = time.perf_counter()
    trees = await scheduler.play(TASKS[:4], group=16, seed=0)
    assert time.perf_counter() - began < 0.8
    assert all(leaf.metrics["tool_calls"] == 1 for tree in trees for leaf in tree.leaves)


# -- failures ---------------------------------------------------------------------------------------------------------


def flaky(doubling, failures):
    """Fails at the first ``failures`` resets of each task, counted over all its episodes."""
    left = {}

    class Flaky(doubling):
        async def setup(self, task):
            left[task.id] = left.get(task.id, failures) - 1
            if left[task.id] >= 0:
                raise ConnectionError("the sandbox is gone")

    return Flaky


async def test_a_failure_is_tried_again(make, doubling, scripted_sampler):
    trees = await make(flaky(doubling, 1), scripted_sampler(ANSWER), retries=1).play(TASKS, group=2, seed=0)
    assert {leaf.outcome for tree in trees for leaf in tree.leaves} == {Outcome.ANSWERED}
    again = await make(doubling, scripted_sampler(ANSWER)).play(TASKS, group=2, seed=0)
    assert content(trees) == content(again), "an attempt that failed leaves no trace"


async def test_only_what_failed_is_tried_again(make, doubling, scripted_sampler):
    played = []

    class Counted(flaky(doubling, 1)):
        async def setup(self, task):
            played.append(task.id)
            await super().setup(task)

    await make(Counted, scripted_sampler(ANSWER), retries=3).play(TASKS[:3], group=2, seed=0)
    assert sorted(played) == sorted(["t0", "t1", "t2"] * 3), "two episodes each, one of them twice"


async def test_what_fails_again_is_left_out_of_the_rewards_and_shown(make, doubling, scripted_sampler):
    scheduler = make(flaky(doubling, 2), scripted_sampler(ANSWER), retries=0, max_failures=0.5)
    trees = await scheduler.play(TASKS[:2], group=4, seed=0)
    for tree in trees:
        assert [leaf.reward is None for leaf in tree.leaves] == [True, True, False, False]
        assert len(tree.rewards) == len(list(tree.scored())) == 2
        assert all("ConnectionError: the sandbox is gone" in leaf.error for leaf in tree.leaves[:2])


async def test_too_many_failures_stop_the_run_with_the_first_of_them(make, doubling, scripted_sampler):
    scheduler = make(flaky(doubling, 2), scripted_sampler(ANSWER), retries=0, max_failures=0.49)
    with pytest.raises(TooManyFailures, match=r"(?s)4 of 8 .* 49% .*ConnectionError: the sandbox is gone"):
        await scheduler.play(TASKS[:2], group=4, seed=0)
    none = make(doubling, scripted_sampler(ANSWER), max_failures=0.0)
    assert len(await none.play(TASKS, group=2, seed=0)) == 6


async def test_environments_that_never_begin_have_no_node(make, doubling, scripted_sampler):
    class Dead(doubling):
        async def reset(self, *, seed=None, options=None):
            raise OSError("no")

    (tree,) = await make(Dead, scripted_sampler(ANSWER), max_failures=1.0).play(TASKS[:1], group=2, seed=0)
    assert (tree.nodes, [leaf.node for leaf in tree.leaves]) == ((), [-1, -1])
    assert tree.path(tree.leaves[0]) == []


@pytest.mark.parametrize("error", [TaskError("task t3 has no answer"), SamplerError("the sampler is closed")])
async def test_errors_that_stop_the_run_come_as_themselves(make, doubling, scripted_sampler, error):
    closed = []

    class Sour(doubling):
        async def setup(self, task):
            await asyncio.sleep(0)
            if task.id == "t3":
                raise error

        async def close(self):
            await super().close()
            closed.append(self)

    before = asyncio.all_tasks()
    with pytest.raises(type(error)) as raised:
        await make(Sour, scripted_sampler(CALL, ANSWER)).play(TASKS, group=4, seed=0)
    assert raised.value is error
    assert asyncio.all_tasks() == before
    assert len(set(closed)) == 24


async def test_cancelling_leaves_nothing_running_and_closes_everything(make, doubling, make_model):
    opened, closed = set(), set()

    class Noted(doubling):
        async def setup(self, task):
            opened.add(self)

        async def close(self):
            await super().close()
            closed.add(self)

    sampler = HFSampler(make_model(), max_slots=64, max_length=320)
    before = asyncio.all_tasks()
    running = asyncio.create_task(make(Noted, sampler, max_live=10).play(TASKS, group=4, seed=0))
    await asyncio.sleep(0.03)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert asyncio.all_tasks() == before
    assert opened
    assert opened <= closed
    await sampler.sample([1, 2, 3], SamplingParams(1))
    await sampler.close()
    assert not sampler._by_slot


async def test_a_deadline_of_one_does_not_stop_the_others(make, doubling, scripted_sampler):
    class Stuck(doubling):
        async def setup(self, task):
            if task.id == "t0":
                await asyncio.sleep(60)

    scheduler = make(Stuck, scripted_sampler(ANSWER), deadline=0.1, retries=0, max_failures=0.5)
    trees = await scheduler.play(TASKS[:2], group=2, seed=0)
    assert [leaf.outcome for tree in trees for leaf in tree.leaves] == [Outcome.TIMEOUT] * 2 + [Outcome.ANSWERED] * 2
    assert "stuck in reset" in trees[0].leaves[0].error
