"""Trees while they grow: where siblings begin, what they share, when the decision falls, what a failure costs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import (
    TASKS,
    Streaming,
    Turn,
    World,
    broken,
    by_turn,
    check_tree,
    content,
    policy_tokens,
    request_of,
    scheduler,
    tool_results,
)

from agentrl.errors import ConfigError, EnvError, ForkRefused, SamplerError, TaskError, TooManyFailures
from agentrl.rollout.record import NO_LEAF
from agentrl.types import Outcome

CALL, ANSWER = Turn(1), Turn(0)
POLICIES = {
    "group": {},
    "random_tree": {"probability": 0.6},
    "entropy_tree": {"first_tokens": 2},
    "expand_tree": {"trees": 2, "nodes": 3},
}


EXPAND = {"policy": "expand_tree", "policy_options": {"trees": 2, "nodes": 3}}


async def grow(sampler, world, tasks=TASKS[:1], *, seed=0, **limits):
    limits = {"group": 8, "max_failures": 1.0} | limits
    trees = await scheduler(sampler, world, **limits).grow(tasks, seed=seed)
    assert not world.open
    assert not sampler.streams
    return trees


def always(**options):
    """Branches at every tool result."""
    return {"policy": "random_tree", "policy_options": {"probability": 1.0, **options}}


def surely(**options):
    """The same, decided at the k-th token."""
    return {"policy": "entropy_tree", "policy_options": {"alpha": 9.0, "first_tokens": 2, **options}}


# -- the number of leaves, and what they share ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("script", [by_turn(ANSWER), by_turn(CALL), by_turn(CALL, ANSWER)], ids=["no", "all", "one"])
async def test_there_are_as_many_leaves_as_were_asked_for(policy, script):
    sampler, world = Streaming(script), World()
    trees = await grow(sampler, world, TASKS[:3], policy=policy, policy_options=POLICIES[policy])
    for tree in trees:
        check_tree(tree, 8, pairs=policy == "expand_tree")
        assert {leaf.outcome for leaf in tree.leaves} <= {Outcome.ANSWERED, Outcome.TURN_LIMIT}
    assert sum(tree.spent["tokens"] for tree in trees) == sampler.generated
    assert sum(tree.spent["calls"] for tree in trees) == world.calls


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("error", [ForkRefused("no"), EnvError("gone"), ValueError("odd")], ids=lambda e: str(e))
async def test_refused_forks_become_roots(policy, error):
    def refuse(_):
        raise error

    sampler, world = Streaming(by_turn(CALL, CALL, ANSWER)), World(refork=refuse)
    options = POLICIES[policy] | {"entropy_tree": {"alpha": 9.0}, "random_tree": {"probability": 1.0}}.get(policy, {})
    (tree,) = await grow(sampler, world, policy=policy, policy_options=options)
    check_tree(tree, 8, pairs=policy == "expand_tree")
    assert {leaf.name for leaf in tree.leaves} == {(n,) for n in range(8)}
    assert not any(decision.granted for decision in tree.decisions)
    if policy != "group":
        assert tree.spent["forks_failed"] > 0
        reasons = [each.reason for each in tree.decisions if each.wanted and each.reason != NO_LEAF]
        assert all(reason.endswith(str(error)) for reason in reasons)
        assert reasons or policy == "expand_tree"


TURNS = st.builds(
    Turn,
    st.sampled_from([0, 0, 1, 1, 1, 2]),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.0, 1e-4, 1e-3]),
)
CASES = st.sampled_from(
    [
        ("group", {}),
        ("random_tree", {"initial": 1}),
        ("random_tree", {"probability": 0.9, "initial": 3}),
        ("random_tree", {"probability": 0.7, "first_tokens": 3}),
        ("entropy_tree", {"first_tokens": 2}),
        ("entropy_tree", {"first_tokens": 3, "rule": "bernoulli", "penalty": 0.3, "initial": 1}),
        ("entropy_tree", {"first_tokens": 1, "rule": "arpo_code"}),
        ("entropy_tree", {"first_tokens": 2, "monitor": True}),
        ("expand_tree", {"trees": 2, "nodes": 3}),
        ("expand_tree", {"trees": 3, "nodes": 2, "rounds": 2, "rank": "entropy"}),
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    case=CASES,
    turns=st.lists(TURNS, min_size=1, max_size=6),
    seed=st.integers(0, 99),
    live=st.sampled_from([1, 2, 64]),
    calls=st.sampled_from([1, 64]),
    slow=st.sampled_from(["run", "fork", "start", None]),
)
def test_any_script_gives_a_tree(case, turns, seed, live, calls, slow):
    policy, options = case
    on = {slow: lambda _: asyncio.sleep(5e-4)} if slow else {}
    # Every turn is chosen by its own seed, so that siblings go different ways.
    sampler, world = Streaming(lambda request: turns[request.params.seed % len(turns)]), World(**on)
    limits = {"policy": policy, "policy_options": options, "group": 6, "max_live": live, "max_calls": calls}
    trees = asyncio.run(grow(sampler, world, TASKS[:2], seed=seed, **limits))
    for tree in trees:
        check_tree(tree, 6, pairs=policy == "expand_tree")
    assert sum(tree.spent["tokens"] for tree in trees) == sampler.generated
    assert sum(tree.spent["calls"] for tree in trees) == world.calls
    if policy != "expand_tree":  # where what is pruned was generated too
        assert policy_tokens(trees) == sampler.generated, "what is shared was generated once"
        assert tool_results(trees) == world.calls
        for tree in trees:
            assert tree.spent["roots"] + tree.spent.get("branches", 0) == 6
            assert sum(decision.granted for decision in tree.decisions) == tree.spent.get("branches", 0)


@pytest.mark.parametrize("limits", [always(initial=1), surely(initial=1)], ids=["random", "entropy"])
@pytest.mark.parametrize("length", [1, 2, 6])
async def test_a_sibling_begins_at_the_tool_result(limits, length):
    """Also where the turn is over before anybody has had a chance to look: a sampler that never suspends."""
    sampler, world = Streaming(by_turn(*[Turn(1, [1.0] * length)] * 2, Turn(0, [1.0] * length))), World()
    (tree,) = await grow(sampler, world, group=4, **limits)
    check_tree(tree, 4)
    assert [leaf.name for leaf in tree.leaves] == [(0,), (0, 1), (0, 1, 2), (0, 2)]
    for name, turn in (((0, 1), 1), ((0, 2), 2), ((0, 1, 2), 2)):
        own, parents = request_of(sampler, name, turn), request_of(sampler, name[:-1], turn)
        assert own.ids == parents.ids, "its first request is its parent's at that point"
        assert own.params.max_tokens == parents.params.max_tokens
    assert tree.spent["tokens"] == sampler.generated == (3 + 2 + 1 + 1) * length
    assert tree.spent["calls"] == world.calls == 3


async def test_a_sibling_has_the_state_of_the_tool_result():
    """What the tool remembers is told in its results, so a state that is too late or too early shows."""
    sampler, world = Streaming(by_turn(CALL, CALL, CALL, ANSWER)), World(max_turns=9)
    (tree,) = await grow(sampler, world, group=8, **surely(initial=1))
    for leaf in tree.leaves:
        told = [result.content for node in tree.path(leaf) for result in node.tool_results]
        assert [text.split(" after ")[1] for text in told] == ["0", "1", "2"]


async def test_seeds_follow_from_names_not_from_timing():
    rng = random.Random(3)

    async def run(jitter, **limits):
        script = lambda r: Turn(1 if r.turn < 2 else 0, [1.0] * 4, rng.random() * jitter)  # noqa: E731
        trees = await grow(Streaming(script), World(), TASKS[:2], group=8, **limits)
        return {leaf.name: [n.token_ids for n in tree.path(leaf)] for tree in trees[:1] for leaf in tree.leaves}

    first = await run(0.0, **always(initial=2))
    for _ in range(3):
        again = await run(2e-3, **always(initial=2))
        common = first.keys() & again.keys()
        assert len(common) > 3
        assert all(first[name] == again[name] for name in common)


async def test_the_same_task_twice_gives_different_trees():
    sampler = Streaming(by_turn(CALL, ANSWER))
    one, two = await grow(sampler, World(), [TASKS[0], TASKS[0]], **always())
    assert (one.copy, two.copy) == (1, 2)
    check_tree(one, 8)
    check_tree(two, 8)
    assert not {leaf.seed for leaf in one.leaves} & {leaf.seed for leaf in two.leaves}
    assert {n.token_ids for n in one.nodes[1:]} & {n.token_ids for n in two.nodes[1:]} == set()


# -- when the decision falls ------------------------------------------------------------------------------------------


async def test_the_sibling_asks_before_its_parents_turn_is_over():
    """k = 2: it begins at the second token of a turn of five; the parent's third waits for the sibling's request."""
    asked = asyncio.Event()

    async def third(i):
        if i == 2:
            async with asyncio.timeout(2):
                await asked.wait()

    def script(request):
        if request.turn == 0:
            return CALL
        if request_of(sampler, (0,), 1) is request:
            return Turn(0, [1.0] * 5, third)
        asked.set()
        return ANSWER

    sampler = Streaming(script)
    (tree,) = await grow(sampler, World(), group=2, **surely(initial=1))
    parent = request_of(sampler, (0,), 1)
    assert parent is not None
    assert len(parent.made) == 5
    assert [leaf.name for leaf in tree.leaves] == [(0,), (0, 1)]
    assert {leaf.outcome for leaf in tree.leaves} == {Outcome.ANSWERED}


async def test_it_is_decided_at_the_kth_token_and_not_before():
    """k = 3. Only the first three entropies count, and until the third token nobody has forked."""
    seen = []

    async def note(i):
        await asyncio.sleep(0.005)
        seen.append((i, world.stages["fork"]))

    def script(request):
        return CALL if request.turn == 0 else Turn(0, [2.0, 2.0, 2.0, 0.0, 0.0], note)

    sampler, world = Streaming(script), World()
    (tree,) = await grow(
        sampler, world, group=2, policy="entropy_tree", policy_options={"first_tokens": 3, "initial": 1}
    )
    assert tree.decisions[0].granted
    assert [forks for _, forks in seen[:4]] == [0, 0, 0, 1], "tokens 0 to 2 without a fork, token 3 with it"


@pytest.mark.parametrize("calls", [0, 1])
async def test_a_turn_shorter_than_k_is_decided_at_its_end_and_before_env_step(calls):
    order = []
    world = World(run=lambda tool: order.append(("run", len(tool.seen))), fork=lambda tool: order.append(("fork",)))
    sampler = Streaming(by_turn(CALL, Turn(calls, [3.0, 3.0]), ANSWER))
    options = {"first_tokens": 50, "initial": 1}
    (tree,) = await grow(sampler, world, group=2, policy="entropy_tree", policy_options=options)
    check_tree(tree, 2)
    assert [leaf.name for leaf in tree.leaves] == [(0,), (0, 1)]
    assert order[:2] == [("run", 0), ("fork",)]
    # Only as many tokens are compared as both have: 2 x (3 - 1) / ln|V|.
    assert tree.decisions[0].signal == pytest.approx(2 * 2.0 / 6.907755)


async def test_the_parents_step_waits_for_the_fork():
    """``Look.fork`` asserts that nothing ran meanwhile; here the order is written down, too."""
    order = []

    async def slowly(tool):
        order.append("fork begins")
        await asyncio.sleep(0.02)
        order.append("fork ends")

    world = World(fork=slowly, run=lambda tool: order.append("run"))
    (tree,) = await grow(Streaming(by_turn(CALL, CALL, ANSWER)), world, group=2, **surely(initial=1))
    assert order[:4] == ["run", "fork begins", "fork ends", "run"]
    assert tree.decisions[0].granted


async def test_a_sibling_is_not_asked_again_where_it_began():
    (tree,) = await grow(Streaming(by_turn(CALL, CALL, ANSWER)), World(), group=16, **surely(initial=1))
    branches = [leaf.name for leaf in tree.leaves if len(leaf.name) > 1]
    asked = {(decision.name, decision.turn) for decision in tree.decisions}
    assert (0, 1) in branches
    assert ((0, 1), 2) in asked
    for name in branches:
        assert all((name, turn) not in asked for turn in range(name[-1] + 1))
        assert list(name[1:]) == sorted(set(name[1:])), "one sibling at a place"


async def test_children_compare_with_the_first_tokens_of_their_root():
    """The root began at 1 nat; its child's own first turn has 5, the next one 3: still less certain than at first."""

    def script(request):
        if request.turn == 0:
            return Turn(1, [1.0, 1.0])
        return Turn(1 if request.turn == 1 else 0, [5.0, 5.0] if request.turn == 1 else [3.0, 3.0])

    (tree,) = await grow(
        Streaming(script), World(), group=4, policy="entropy_tree", policy_options={"first_tokens": 2, "initial": 1}
    )
    signals = {(d.name, d.turn): d.signal for d in tree.decisions}
    log = 6.907755
    assert signals[(0,), 1] == pytest.approx(2 * (5 - 1) / log)
    assert signals[(0, 1), 2] == pytest.approx(2 * (3 - 1) / log)
    assert signals[(0,), 2] == pytest.approx(2 * (3 - 1) / log)


# -- failures ---------------------------------------------------------------------------------------------------------


def names_and_tokens(tree):
    return {leaf.name: [node.token_ids for node in tree.path(leaf)] for leaf in tree.leaves}


async def test_branches_that_fail_count_as_failures_though_they_are_played_anew():
    sampler, world = Streaming(by_turn(CALL, CALL, ANSWER)), World(run=lambda tool: tool.lineage and broken(tool))
    with pytest.raises(TooManyFailures, match=r"episodes failed(.|\n)*ended with env_failure") as stopped:
        await grow(sampler, world, group=4, max_failures=0.2, **always(initial=1))
    assert stopped.value.sample


@pytest.mark.parametrize("how", ["raises", "nan", "timeout"])
async def test_a_failing_branch_does_not_change_its_siblings(how):
    """The first branch alone fails, and the others are what they are where it does not."""

    first = []

    def fails(tool):
        first.extend([tool] if tool.lineage == (0,) and not first else [])
        return first[:1] == [tool]

    def run(tool):
        if how != "nan" and fails(tool):
            return broken(tool) if how == "raises" else asyncio.sleep(60)
        return None

    def reward(env):
        (tool,) = env._tools.values()
        return math.nan if how == "nan" and fails(tool) else 1.0

    async def grown(**on):
        sampler = Streaming(by_turn(CALL, CALL, ANSWER))
        limits = {"deadline": 0.3, "retries": 0, "max_failures": 0.5}
        (tree,) = await grow(sampler, World(**on), group=4, **limits, **always(initial=1))
        check_tree(tree, 4)
        return tree

    good, bad = await grown(), await grown(run=run, reward=reward)
    assert (0, 1) in {leaf.name for leaf in good.leaves}
    assert (0, 1) not in {leaf.name for leaf in bad.leaves}
    assert bad.spent["dropped"] == 1
    before, after = names_and_tokens(good), names_and_tokens(bad)
    common = before.keys() & after.keys()
    assert {(0,), (0, 2)} <= common
    assert all(before[name] == after[name] for name in common)
    assert all(leaf.error is None for leaf in bad.leaves)
    decision = next(each for each in bad.decisions if (each.name, each.turn) == ((0,), 1))
    assert (decision.wanted, decision.granted) == (True, False)
    assert "the branch ended with" in decision.reason


@pytest.mark.parametrize("error", [SamplerError("closed"), TaskError("no answer"), ConfigError("wrong")], ids=repr)
@pytest.mark.parametrize("where", ["sampler", "step", "refork"])
@pytest.mark.parametrize("limits", [always(initial=1), EXPAND], ids=["random", "expand"])
async def test_an_error_in_a_branch_stops_everything_as_itself(error, where, limits):
    def sour(what):
        (tool,) = what._tools.values()
        if tool.lineage or where == "refork":
            raise error

    def script(request):
        if where == "sampler" and len(sampler.requests) == 5:
            raise error
        return Turn(1 if request.turn < 3 else 0, [1.0] * 3, 1e-4)

    sampler = Streaming(script)
    world = World(**({} if where == "sampler" else {where: sour}))
    before = asyncio.all_tasks()
    with pytest.raises(type(error)) as raised:
        await scheduler(sampler, world, group=6, **limits).grow(TASKS[:3], seed=0)
    assert raised.value is error
    assert asyncio.all_tasks() == before
    assert (len(world.open), sampler.streams) == (0, 0)


async def test_a_root_that_failed_after_it_had_branched_gets_a_new_name():
    """Its branches keep theirs: the tree of names stays the tree of nodes."""
    failed = []

    def run(tool):
        if not tool.lineage and len(tool.seen) == 1 and not failed:
            failed.append(tool)
            broken(tool)

    sampler, world = Streaming(by_turn(CALL, CALL, ANSWER)), World(run=run)
    (tree,) = await grow(sampler, world, group=5, max_failures=0.0, retries=1, **always(initial=1))
    check_tree(tree, 5)
    assert tree.spent["retried"] == 1
    assert (0,) not in {leaf.name for leaf in tree.leaves}
    assert {(0, 1), (1,), (1, 1)} <= {leaf.name for leaf in tree.leaves}


async def test_a_root_that_failed_before_it_branched_leaves_no_trace():
    failed = []

    def run(tool):
        if not failed:
            failed.append(tool)
            broken(tool)

    script = by_turn(CALL, CALL, ANSWER)
    for limits in (
        always(initial=1),
        surely(initial=1),
        {"policy": "expand_tree", "policy_options": {"trees": 1, "nodes": 9}},
    ):
        failed.clear()
        (tree,) = await grow(Streaming(script), World(run=run), group=5, retries=1, **limits)
        failed.append(None)
        (same,) = await grow(Streaming(script), World(run=run), group=5, retries=1, **limits)
        assert (tree.spent["retried"], same.spent.get("retried", 0)) == (1, 0)
        assert content([tree]) == content([same])


async def test_states_of_an_attempt_that_failed_are_not_played_on():
    """It kept two states before its second call failed; the expansions all share nodes with the second attempt."""
    failed = []

    def run(tool):
        if len(tool.seen) == 1 and not failed:
            failed.append(tool)
            broken(tool)

    options = {"trees": 1, "nodes": 24}
    (tree,) = await grow(
        Streaming(by_turn(CALL, CALL, ANSWER)), World(run=run), group=25, policy="expand_tree", policy_options=options
    )
    assert tree.spent["retried"] == 1
    check_tree(tree, 25, pairs=True)


async def test_expansions_that_fail_become_roots():
    """Every expansion's environment fails: one leaf of each tree is left, and the others are played from the prompt."""
    world = World(run=lambda tool: broken(tool) if tool.lineage else None)
    options = {"trees": 2, "nodes": 3}
    (tree,) = await grow(
        Streaming(by_turn(CALL, ANSWER)), world, group=6, policy="expand_tree", policy_options=options, retries=0
    )
    check_tree(tree, 6, pairs=True)
    assert tree.spent["roots"] + sum(len(leaf.name) > 1 for leaf in tree.leaves) == 6


# -- cancellation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [always(), surely(), EXPAND], ids=["random", "entropy", "expand"])
async def test_cancelled_at_any_moment_nothing_stays_open(limits):
    """Ten moments for each policy, with something slow at every stage; the scheduler can be used again."""
    rng, nap = random.Random(7), lambda _: asyncio.sleep(rng.random() * 2e-3)
    world = World(start=nap, run=nap, fork=nap, refork=nap, close=nap)

    def script(request):
        return Turn(1 if request.params.seed % 4 else 0, [1.0] * 3, 3e-4)

    sampler = Streaming(script)
    grower = scheduler(sampler, world, group=8, max_live=7, max_calls=3, **limits)
    before = asyncio.all_tasks()
    for moment in range(10):
        growing = asyncio.create_task(grower.grow(TASKS[:3], seed=moment))
        await asyncio.sleep(rng.random() * 0.03)
        growing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await growing
        assert asyncio.all_tasks() == before
        assert (len(world.open), sampler.streams, world.running) == (0, 0, 0)
    assert world.stages["start"] > 20
    trees = await grower.grow(TASKS[:3], seed=0)
    for tree in trees:
        check_tree(tree, 8, pairs=limits is EXPAND)
    assert not world.open
    assert not grower._playing


async def test_a_fork_that_is_ready_when_it_is_called_off_is_closed():
    """Cancelled in the very moment in which the environment's fork is made, at each of many moments."""
    for moment in range(40):
        steps = 0

        async def dawdle(_):
            nonlocal steps
            for _ in range(3):
                steps += 1
                await asyncio.sleep(0)

        world = World(fork=dawdle, refork=dawdle, start=dawdle, close=dawdle)
        sampler = Streaming(by_turn(CALL, CALL, ANSWER))
        grower = scheduler(sampler, world, group=4, **always(initial=1))
        growing = asyncio.create_task(grower.grow(TASKS[:1], seed=0))
        for _ in range(moment):
            await asyncio.sleep(0)
        growing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await growing
        assert growing.cancelled() or growing.done()
        assert not world.open, moment
