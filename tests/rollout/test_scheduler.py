"""Many episodes at once: the same trees in the same order, whatever happens on the way."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from streaming import check_tree, policy_tokens

from agentrl import Task, tool
from agentrl.config import RolloutConfig
from agentrl.errors import ConfigError, SamplerError, TaskError, TooManyFailures
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import TokenWriter
from agentrl.sampler.hf import HFSampler
from agentrl.tool import Tool
from agentrl.types import ForkLevel, Outcome, SamplingParams

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
    assert time.perf_counter() - began < 2.0, "on a busy machine; benchmarks/rollout.py has the ratio"
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


# -- trees, on the real sampler ---------------------------------------------------------------------------------------


def tree_limits(policy, **options):
    return {"policy": policy, "policy_options": options, "group": 6, "max_failures": 1.0}


TREES = [
    tree_limits("random_tree", probability=0.7, initial=2),
    tree_limits("entropy_tree", first_tokens=4, initial=2, alpha=0.6),
    tree_limits("expand_tree", trees=2, nodes=3),
]


@pytest.mark.parametrize("limits", TREES, ids=lambda limits: limits["policy"])
async def test_trees_of_a_model_that_calls_its_tool(make, doubling, trained_model, limits):
    """About half of its trajectories call the tool, so that some branch and the others are filled up with roots."""
    sampler = HFSampler(trained_model, max_slots=64, max_length=320)
    try:
        scheduler = make(doubling, sampler, **limits)
        trees = await scheduler.grow(TASKS[:4], seed=1)
        again = await scheduler.grow(TASKS[:4], seed=1)
    finally:
        await sampler.close()
    for tree in trees:
        check_tree(tree, 6, pairs=limits["policy"] == "expand_tree")
        policy = [node for node in tree.nodes if node.author == "policy"]
        assert all(len(node.entropies) == len(node.logprobs) == len(node.token_ids) for node in policy)
    if limits["policy"] == "expand_tree":
        assert content(trees) == content(again), "nothing in it depends on timing"
    else:
        assert sum(tree.spent.get("branches", 0) for tree in trees) > 0
        assert policy_tokens(trees) == sum(tree.spent["tokens"] for tree in trees)
        paths = [{leaf.name: tree.path(leaf)[-1].token_ids for leaf in tree.leaves} for tree in (trees[0], again[0])]
        common = paths[0].keys() & paths[1].keys()
        assert len(common) > 2
        assert all(paths[0][name] == paths[1][name] for name in common), "the same name has the same tokens"


async def test_a_token_budget_is_exact_on_the_real_sampler(make, doubling, trained_model):
    sampler = HFSampler(trained_model, max_slots=64, max_length=320)
    try:
        trees = await make(doubling, sampler, **TREES[0], step_budget={"tokens": 150}).grow(TASKS[:4], seed=1)
        assert sum(tree.spent["tokens"] for tree in trees) == policy_tokens(trees) == 150
        assert any(leaf.outcome is Outcome.BUDGET for tree in trees for leaf in tree.leaves)
        await sampler.sample([1, 2, 3], SamplingParams(1))
        assert not sampler._by_slot
    finally:
        await sampler.close()


async def test_evaluation_plays_groups_whatever_the_policy_is(make, doubling, scripted_sampler):
    """And without the budgets of training."""
    scheduler = make(doubling, scripted_sampler(CALL, ANSWER), **TREES[0], step_budget={"calls": 0})
    trees = await scheduler.play(TASKS[:2], group=3, seed=0)
    assert [leaf.name for tree in trees for leaf in tree.leaves] == [(0,), (1,), (2,)] * 2
    assert {leaf.outcome for tree in trees for leaf in tree.leaves} == {Outcome.ANSWERED}
    assert all(not tree.decisions for tree in trees)


async def test_a_tool_that_refuses_to_fork_stops_a_tree_policy_before_it_begins(make, doubling, scripted_sampler):
    class Rooted(Tool):
        name, fork_level = "rooted", ForkLevel.REFUSED

        async def run(self, x: int) -> str:
            """Stay.

            Args:
                x: where.
            """
            raise AssertionError("nothing is played")

    class Fixed(doubling):
        tools = (Rooted(),)

    for limits in TREES:
        scheduler = make(Fixed, scripted_sampler(CALL, ANSWER), **limits)
        with pytest.raises(ConfigError, match=r"tool 'rooted' of Fixed .*refuses to be forked"):
            await scheduler.grow(TASKS[:1], seed=0)
        assert len(await scheduler.play(TASKS[:1], group=2, seed=0)) == 1, "without forks it can be played"
