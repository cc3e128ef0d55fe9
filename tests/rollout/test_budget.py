"""Budgets: never a token or a call too many, nothing begun in vain, and what is cut says so."""

from __future__ import annotations

import asyncio
import math
import random
import time

import pytest
from streaming import TASKS, Streaming, Turn, World, by_turn, check_tree, scheduler

from agentrl.config import load_config
from agentrl.errors import ConfigError, UnknownName, UserError
from agentrl.rollout.batch import collect, rollout_metrics
from agentrl.rollout.budget import Budget, Caps
from agentrl.rollout.scheduler import Scheduler
from agentrl.sampler.openai import ChatWriter
from agentrl.tasks import TaskStream
from agentrl.types import Outcome, SamplingParams

POLICIES = [
    ("group", {}),
    ("random_tree", {"probability": 0.7}),
    ("entropy_tree", {"first_tokens": 2, "alpha": 0.9}),
    ("entropy_tree", {"first_tokens": 2, "alpha": 0.9, "monitor": True}),
    ("expand_tree", {"trees": 2, "nodes": 3}),
]
POLICY = pytest.mark.parametrize(("policy", "options"), POLICIES, ids=["group", "random", "entropy", "aepo", "expand"])


def wandering(seed=0, delay=0.0):
    """Turns of 1 to 6 tokens with 0 to 2 calls, chosen by the request's own seed."""

    def script(request):
        rng = random.Random(request.params.seed + seed)
        return Turn(rng.choice([0, 1, 1, 2]), [rng.random() for _ in range(rng.randint(1, 6))], delay)

    return script


async def grow(sampler, world, tasks=TASKS[:1], *, seed=0, **limits):
    limits = {"group": 6, "max_failures": 0.0, "retries": 0} | limits
    grower = scheduler(sampler, world, **limits)
    budget = grower.step_budget()
    trees = await grower.grow(tasks, seed=seed, budget=budget)
    assert not world.open
    assert not sampler.streams
    assert sum(tree.spent["tokens"] for tree in trees) == sampler.generated == budget.tokens
    assert sum(tree.spent["calls"] for tree in trees) == world.calls == budget.calls
    for tree in trees:
        check_tree(tree, pairs=limits.get("policy") == "expand_tree")
        for leaf in tree.leaves:
            assert leaf.outcome is not Outcome.BUDGET or (leaf.reward, leaf.error) == (None, None)
        assert len(tree.rewards) == sum(leaf.outcome is not Outcome.BUDGET for leaf in tree.leaves)
    return trees


def cut(trees):
    return [leaf for tree in trees for leaf in tree.leaves if leaf.outcome is Outcome.BUDGET]


# -- exact ------------------------------------------------------------------------------------------------------------


@POLICY
@pytest.mark.parametrize("delay", [0.0, 2e-4])
async def test_never_a_token_too_many(policy, options, delay):
    """Many trajectories are in the middle of a token when the last one is spent."""
    for cap in (1, 2, 7, 20, 31):
        sampler = Streaming(wandering(cap, delay))
        trees = await grow(sampler, World(), policy=policy, policy_options=options, task_budget={"tokens": cap})
        assert sampler.generated == cap, "all of it is used, and no more"
        assert cut(trees)
    sampler = Streaming(wandering(0, delay))
    await grow(sampler, World(), policy=policy, policy_options=options, task_budget={"tokens": 10_000})
    assert sampler.generated < 10_000


@POLICY
async def test_never_a_call_too_many(policy, options):
    for cap in (0, 1, 3, 8):
        world = World(run=lambda _: asyncio.sleep(1e-3), max_turns=9)
        script = by_turn(Turn(2), Turn(1), Turn(2), Turn(2), Turn(0))
        trees = await grow(Streaming(script), world, policy=policy, policy_options=options, task_budget={"calls": cap})
        assert world.calls <= cap
        assert cap - world.calls < 2, "a turn's calls are paid for together"
        assert cut(trees)


@POLICY
async def test_the_step_pays_for_all_tasks(policy, options):
    sampler, world = Streaming(wandering(1, 1e-4)), World()
    trees = await grow(
        sampler,
        world,
        TASKS[:4],
        policy=policy,
        policy_options=options,
        task_budget={"tokens": 60},
        step_budget={"tokens": 100, "calls": 15},
    )
    assert sampler.generated <= 100
    assert world.calls <= 15
    assert all(tree.spent["tokens"] <= 60 for tree in trees)
    assert cut(trees)


async def test_a_call_that_the_step_cannot_pay_costs_the_task_nothing():
    step = Budget(Caps(calls=3))
    one, other = Budget(Caps(calls=2), step), Budget(Caps(), step)
    assert one.take_calls(2)
    assert not one.take_calls(1)
    assert not other.take_calls(2)
    assert other.take_calls(1)
    assert (one.calls, other.calls, step.calls) == (2, 1, 3)


async def test_calls_that_the_environment_refuses_are_not_spent():
    """More calls than ``max_tool_calls`` end the episode, and none of them runs."""

    class Strict(World):
        def env(self):
            made = super().env()
            made.max_tool_calls = 1
            return made

    world = Strict()
    (tree,) = await grow(Streaming(by_turn(Turn(2))), world, group=2, task_budget={"calls": 2})
    assert {leaf.outcome for leaf in tree.leaves} == {Outcome.TOOL_LIMIT}, "neither takes the other's calls"


async def test_seconds_end_a_slow_turn():
    began = time.perf_counter()
    (tree,) = await grow(Streaming(by_turn(Turn(0, [1.0] * 5000, 1e-3))), World(), task_budget={"seconds": 0.1})
    assert time.perf_counter() - began < 0.5
    assert {leaf.outcome for leaf in tree.leaves} == {Outcome.BUDGET}


@pytest.mark.parametrize("stage", ["start", "run", "fork"])
@pytest.mark.parametrize("of", ["task_budget", "step_budget"])
async def test_seconds_end_what_hangs(stage, of):
    """Not only between tokens: a tool that takes its time is cut as well, and that is no failure."""
    world = World(**{stage: lambda _: asyncio.sleep(20)})
    began = time.perf_counter()
    trees = await grow(
        Streaming(by_turn(Turn(1), Turn(0))),
        world,
        TASKS[:2],
        policy="random_tree",
        policy_options={"probability": 1.0},
        max_live=3,
        **{of: {"seconds": 0.1}},
    )
    assert time.perf_counter() - began < 1.0
    assert cut(trees)


# -- what is cut ------------------------------------------------------------------------------------------------------


async def test_what_is_cut_is_no_failure_and_left_out_of_the_group():
    (tree,) = await grow(Streaming(by_turn(Turn(1), Turn(0))), World(), group=4, task_budget={"calls": 2})
    outcomes = [leaf.outcome for leaf in tree.leaves]
    assert sorted(outcomes) == [Outcome.ANSWERED] * 2 + [Outcome.BUDGET] * 2
    assert not any(outcome.failed for outcome in outcomes)
    assert len(tree.rewards) == 2


async def test_a_turn_that_ends_with_the_last_token_counts():
    """The third token answers and is the last one paid for: nothing was cut."""
    (tree,) = await grow(Streaming(by_turn(Turn(0))), World(), group=1, task_budget={"tokens": 3})
    assert [leaf.outcome for leaf in tree.leaves] == [Outcome.ANSWERED]


async def test_max_tokens_is_not_the_budget():
    (tree,) = await grow(
        Streaming(by_turn(Turn(0, [1.0] * 9))), World(), group=2, max_tokens=5, task_budget={"tokens": 100}
    )
    assert [leaf.outcome for leaf in tree.leaves] == [Outcome.LENGTH] * 2


@POLICY
async def test_nothing_begins_once_the_step_is_spent(policy, options):
    sampler, world = Streaming(wandering()), World()
    grower = scheduler(sampler, world, group=6, policy=policy, policy_options=options, step_budget={"tokens": 4})
    budget = grower.step_budget()
    budget.spend_tokens(4)
    trees = await grower.grow(TASKS[:2], seed=0, budget=budget)
    assert (world.stages["start"], sampler.generated, world.calls) == (0, 0, 0)
    assert [tree.leaves for tree in trees] == [(), ()]


@POLICY
async def test_nothing_begins_behind_the_gate_once_the_step_is_spent(policy, options):
    """With one place, most trajectories wait in front of it while the first ones spend everything."""
    sampler, world = Streaming(wandering()), World()
    started = []
    world.on["start"] = lambda _: started.append(budget.exhausted)
    grower = scheduler(
        sampler, world, group=6, max_live=1, policy=policy, policy_options=options, step_budget={"tokens": 8}
    )
    budget = grower.step_budget()
    await grower.grow(TASKS[:3], seed=0, budget=budget)
    assert not any(started)
    assert sampler.generated == 8
    assert not world.open


async def test_a_call_is_not_begun_when_no_token_is_left_to_answer_it():
    sampler, world = Streaming(by_turn(Turn(1))), World()
    (tree,) = await grow(sampler, world, group=1, task_budget={"tokens": 3})
    assert [leaf.outcome for leaf in tree.leaves] == [Outcome.BUDGET]
    assert world.calls == 0


# -- a step's report --------------------------------------------------------------------------------------------------


async def collected(script, world=None, *, dynamic=True, refills=5, **limits):
    limits = {"prompts": 3, "group": 4, "max_failures": 0.0} | limits
    sampler, world = Streaming(script), world or World()
    config = load_config({"rollout": limits, "algorithm": {"dynamic_sampling": dynamic, "max_refills": refills}})
    stream = TaskStream(TASKS, seed=0)
    batch = await collect(scheduler(sampler, world, **limits), stream, config, step=0)
    return batch, sampler, world, stream


async def test_refills_are_paid_by_the_same_budget():
    """All rewards are equal, so that every tree asks to be replaced: until the budget is spent."""
    world = World(reward=lambda _: 1.0)
    batch, sampler, _, stream = await collected(by_turn(Turn(0)), world, step_budget={"tokens": 50})
    assert sampler.generated == 50, "36 a round: a second one begins, a third does not"
    assert batch.refills == 1
    assert stream.cursor == 6
    free, *_ = await collected(by_turn(Turn(0)), World(reward=lambda _: 1.0))
    assert free.refills == 5


async def test_no_refill_once_the_budget_is_spent():
    world = World(reward=lambda _: 1.0)
    batch, sampler, _, stream = await collected(by_turn(Turn(0)), world, step_budget={"tokens": 36})
    assert (sampler.generated, batch.refills, stream.cursor) == (36, 0, 3)


async def test_metrics_say_what_was_spent_where():
    batch, sampler, world, _ = await collected(
        by_turn(Turn(1), Turn(1), Turn(0)),
        policy="random_tree",
        policy_options={"probability": 1.0},
        step_budget={"calls": 14},
    )
    metrics = rollout_metrics(batch)
    assert metrics["spent/tokens"] == sampler.generated
    assert metrics["spent/calls"] == world.calls == 14
    leaves = [leaf for tree in batch.fresh for leaf in tree.leaves]
    assert metrics["rollout/over_budget"] == sum(leaf.outcome == "budget" for leaf in leaves) > 0
    assert metrics["rollout/failures"] == 0
    assert metrics["spent/roots"] + metrics["spent/branches"] == metrics["rollout/leaves"]
    for name in ("forks_failed", "dropped", "pruned", "retried"):
        assert metrics[f"spent/{name}"] == 0
    assert all(value is None or math.isfinite(value) for value in metrics.values())


async def test_a_step_of_which_nothing_was_scored_has_no_reward():
    batch, *_ = await collected(by_turn(Turn(1), Turn(0)), dynamic=False, step_budget={"calls": 0})
    metrics = rollout_metrics(batch)
    assert metrics["reward"] is None
    assert metrics["rollout/over_budget"] == 12
    assert batch.informative == []


# -- what cannot be met -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["task_budget", "step_budget"])
def test_a_budget_of_something_else(key):
    with pytest.raises(UnknownName, match=rf"budget in rollout\.{key}: 'token': did you mean 'tokens'"):
        scheduler(Streaming(by_turn(Turn(0))), World(), **{key: {"token": 5}})


@pytest.mark.parametrize("key", ["task_budget", "step_budget"])
@pytest.mark.parametrize(
    ("caps", "says"),
    [
        ({"tokens": 0}, "greater than or equal to 1"),
        ({"tokens": -3}, "greater than or equal to 1, got -3"),
        ({"tokens": 2.5}, "integer"),
        ({"calls": -1}, "greater than or equal to 0, got -1"),
        ({"seconds": 0}, "greater than 0"),
        ({"seconds": -1.0}, "greater than 0"),
        ({"seconds": math.nan}, "finite"),
        ({"seconds": math.inf}, "finite"),
    ],
)
def test_budgets_that_are_none_are_refused(key, caps, says):
    with pytest.raises(ConfigError, match=rf"rollout\.{key}\.{next(iter(caps))}.*{says}"):
        scheduler(Streaming(by_turn(Turn(0))), World(), **load_config({"rollout": {key: caps}}).rollout.model_dump())


@pytest.mark.parametrize(
    ("policy", "options", "says"),
    [
        ("entropy_tree", {"initial": 9}, r"initial: expected at most rollout.group = 8 .* got 9"),
        ("random_tree", {"initial": 9}, r"initial: expected at most rollout.group = 8 .* got 9"),
        ("entropy_tree", {"first_tokens": 41}, r"first_tokens: expected at most rollout.max_tokens = 40.* got 41"),
        ("random_tree", {"first_tokens": 41}, r"first_tokens: expected at most rollout.max_tokens = 40.* got 41"),
        ("entropy_tree", {"monitor": True, "initial": 2}, r"monitor or initial.* got both"),
        ("entropy_tree", {"first_tokens": 0}, r"first_tokens: .*greater than or equal to 1, got 0"),
        ("random_tree", {"first_tokens": -1}, r"first_tokens: .*greater than or equal to 0, got -1"),
        ("random_tree", {"probability": 1.5}, r"probability: .*less than or equal to 1, got 1.5"),
        ("entropy_tree", {"alpha": math.nan}, r"alpha: .*finite"),
        ("entropy_tree", {"rule": "coin"}, r"rule: .*threshold.*got 'coin'"),
        ("expand_tree", {"trees": 3}, r"trees x leaves of each.* got group 8 and trees 3"),
        ("expand_tree", {"trees": 1}, r"at most 1 \+ nodes x rounds = 4 leaves of each, got group 8 and trees 1"),
        ("expand_tree", {"nodes": 0}, r"nodes: .*got 0"),
    ],
)
def test_policies_that_cannot_be_met_are_refused(policy, options, says):
    with pytest.raises(ConfigError, match=says):
        scheduler(Streaming(by_turn(Turn(0))), World(), max_tokens=40, policy=policy, policy_options=options)


@pytest.mark.parametrize(
    ("policy", "option", "near"),
    [
        ("entropy_tree", "first_token", "did you mean 'first_tokens'"),
        ("expand_tree", "tree", "did you mean 'trees'"),
        ("group", "initial", "unknown option of group"),
        ("group", "first_tokens", "unknown option of group"),
        ("expand_tree", "first_tokens", "unknown option of expand_tree"),
    ],
)
def test_options_that_a_policy_does_not_have_are_refused(policy, option, near):
    with pytest.raises(UnknownName, match=near):
        scheduler(Streaming(by_turn(Turn(0))), World(), policy=policy, policy_options={option: 5})


@pytest.mark.parametrize("policy", ["entropy_tree", "random_tree", "expand_tree"])
async def test_a_branching_policy_needs_tokens(policy):
    """A chat server gives text: refused before anything is played."""
    world = World()
    plain = scheduler(Streaming(by_turn(Turn(0))), world, policy=policy, group=6)
    params = SamplingParams(9)
    chat = Scheduler(world.env, lambda seed: ChatWriter(None, "m", params, seed), plain._limits, params)
    with pytest.raises(UserError, match="a chat server gives no token ids"):
        await chat.grow(TASKS, seed=0)
    assert world.stages["start"] == 0
