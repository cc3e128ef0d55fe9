"""When the policies branch, in numbers: the rules against their formulas, the draws against their distributions."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest
from streaming import TASKS, VOCABULARY, Streaming, Turn, World, by_turn, check_tree, scheduler, within

from agentrl.errors import ConfigError
from agentrl.rollout.policies import EntropyTree, ExpandTree, RandomTree
from agentrl.rollout.tree import Point, Tree
from agentrl.seeds import derive_seed

LOG = math.log(VOCABULARY)


def point(seed=0, *, before=(), after=(), first=(), streak=0):
    return Point(seed, first, before, after, VOCABULARY, streak)


def change(by, **more):
    """A point at which the normalised entropy of the turns before and after has changed by ``by`` from the first."""
    return point(first=[5.0], before=[5.0 + by * LOG], after=[5.0 + by * LOG], **more)


def share(policy, count=10_000, **where):
    return sum(policy.decide(change(seed=derive_seed("share", i), **where)).wanted for i in range(count)) / count


# -- ARPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["arpo_code", "bernoulli"])
@pytest.mark.parametrize("by", [0.0, -3.0, -2.5, -1.0, 0.4, 1.0, 2.5, 4.0])
def test_the_released_rule_branches_with_its_measured_probability(rule, by):
    """0.4975 was measured at dH = 0, the first tool call, where clip(0.5 + 0.2 dH, 0, 1) is 0.5."""
    expected = min(max(0.5 + 0.2 * by, 0.0), 1.0)
    measured = share(EntropyTree(rule=rule), by=by)
    assert within(measured, expected, 10_000)
    if by == 0:
        assert within(0.4975, measured, 10_000)


def test_the_released_rule_looks_at_the_turn_that_made_the_call():
    rule = EntropyTree(rule="arpo_code")
    assert rule.decide(point(first=[1.0], before=[3.0], after=[9.0])).signal == pytest.approx(2.0 / LOG)
    for other in ("threshold", "bernoulli"):
        assert EntropyTree(rule=other).decide(point(first=[1.0], before=[9.0], after=[3.0])).signal == pytest.approx(
            2.0 / LOG
        )


@pytest.mark.parametrize(("by", "wanted"), [(-1.0, False), (-1e-6, False), (0.0, False), (1e-6, True), (1.0, True)])
def test_the_papers_rule_branches_where_the_entropy_has_grown(by, wanted):
    verdict = EntropyTree().decide(change(by))
    assert (verdict.wanted, verdict.draw) == (wanted, None)
    assert verdict.signal == pytest.approx(by)


def test_alpha_beta_and_tau():
    assert EntropyTree(alpha=0.1, beta=0.5, tau=0.34).decide(change(0.5)).wanted  # 0.35
    assert not EntropyTree(alpha=0.1, beta=0.5, tau=0.36).decide(change(0.5)).wanted


def test_only_the_first_k_tokens_count():
    after = [3.0] * 20 + [99.0] * 10
    signal = EntropyTree(first_tokens=20).decide(point(first=[1.0] * 30, after=after)).signal
    assert signal == pytest.approx(20 * 2.0 / LOG)


def test_over_the_size_of_the_vocabulary_only_the_sign_is_left():
    by_log = EntropyTree().decide(point(first=[1.0], after=[3.0])).signal
    by_size = EntropyTree(normalize="size").decide(point(first=[1.0], after=[3.0])).signal
    assert by_size == pytest.approx(2.0 / VOCABULARY)
    assert by_log == pytest.approx(by_size * VOCABULARY / LOG)


def test_a_decision_follows_from_its_seed():
    for policy in (EntropyTree(rule="bernoulli"), EntropyTree(rule="arpo_code"), RandomTree()):
        one, same, other = (policy.decide(change(0.0, seed=seed)) for seed in (1, 1, 2))
        assert one == same
        assert one.draw != other.draw
        assert 0 <= one.draw < 1


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_the_control_does_not_look(probability):
    for by in (-3.0, 3.0):
        assert within(share(RandomTree(probability=probability), by=by), probability, 10_000)
    assert RandomTree().decide(change(9.0)).signal is None


# -- AEPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("streak", "by", "p"),
    [(0, 0.0, 0.5), (1, 0.0, 0.475), (2, 1.0, 0.63), (4, -1.0, 0.24), (10, 2.0, 0.45), (20, 2.0, 0.0), (40, 2.0, 0.0)],
)
def test_branches_in_a_row_are_penalised(streak, by, p):
    """P = (0.5 + 0.2 dH) max(0, 1 - 0.05 l), by hand."""
    where = change(by, streak=streak)
    assert EntropyTree(penalty=0.05, tau=p - 1e-9).decide(where).wanted
    assert not EntropyTree(penalty=0.05, tau=p + 1e-9).decide(where).wanted
    assert within(share(EntropyTree(penalty=0.05, rule="bernoulli"), by=by, streak=streak), p, 10_000)


def test_a_long_streak_does_not_turn_certainty_into_a_reason():
    """(0.5 - 0.8) (1 - 2) would be 0.3."""
    assert share(EntropyTree(penalty=1.0, rule="bernoulli"), by=-4.0, streak=2, count=500) == 0


async def test_the_streak_is_that_of_the_path():
    """P = 0.5, 0.35 and 0.2 after 0, 1 and 2 branches in a row, against 0.3: two branches, none, two branches, none."""
    options = {"initial": 1, "first_tokens": 1, "beta": 0.0, "penalty": 0.3, "tau": 0.3}
    sampler, world = Streaming(lambda request: Turn(1 if request.turn < 6 else 0, [1.0, 1.0])), World(max_turns=9)
    (tree,) = await scheduler(sampler, world, group=64, policy="entropy_tree", policy_options=options).grow(
        TASKS[:1], seed=0
    )
    check_tree(tree, 64)
    wanted = {(decision.name, decision.turn): decision.wanted for decision in tree.decisions}
    assert all(each.granted == each.wanted for each in tree.decisions if each.name[0] == 0), "leaves enough"
    assert [wanted[(0,), turn] for turn in range(1, 7)] == [True, True, False, True, True, False]
    assert wanted[(0, 1), 2], "its own beginning counts as the first of the row"
    assert not wanted[(0, 1), 3]
    assert not wanted[(0, 1, 2), 3]
    assert wanted[(0, 2), 4]


@pytest.mark.parametrize(
    ("leaves", "first", "tools", "m"),
    [
        (8, 1.0, 1.0, 5),  # int(8 x 0.5) + 1
        (16, 1.0, 0.0, 10),  # int(16 x 0.6225) + 1
        (16, 0.0, 1.0, 7),  # int(16 x 0.3775) + 1
        (16, 0.5, 0.7, 8),  # int(16 x 0.4750) + 1
        (16, 0.9, 0.3, 10),  # int(16 x 0.5744) + 1
        (16, 8.0, 0.0, 16),  # int(16 x 0.9820) + 1
        (16, 0.0, 8.0, 1),  # int(16 x 0.0180) + 1
        (16, 90.0, 0.0, 16),  # 17, clipped
    ],
)
async def test_how_many_begin_from_the_prompt_is_monitored(leaves, first, tools, m):
    """Means over the first k tokens, in units of ln|V|; k is 4, and later tokens do not count."""
    planted = []

    async def plant(branching):
        planted.append(branching)
        turns = [[first * LOG] * 4, [tools * LOG] * 2, [tools * LOG] * 4]
        return SimpleNamespace(openings=turns, writer=SimpleNamespace(vocabulary=VOCABULARY))

    tree = SimpleNamespace(leaves=leaves, plant=plant, claim=lambda count: count)
    assert await EntropyTree(monitor=True, first_tokens=4).begin(tree) == (m, 1)
    assert planted == [False]


async def test_the_monitored_split_is_what_is_played():
    """int(16 sigmoid((1.5 - 0.5) / 2)) + 1 = 10 roots; the other six branch off, and none off the one ahead."""

    def script(request):
        high = request.turn == 0
        return Turn(1 if request.turn < 3 else 0, [(1.5 if high else 0.5) * LOG] * 4 + [77.0])

    options = {"monitor": True, "first_tokens": 4, "alpha": 9.0}
    sampler = Streaming(script)
    (tree,) = await scheduler(sampler, World(), group=16, policy="entropy_tree", policy_options=options).grow(
        TASKS[:1], seed=0
    )
    check_tree(tree, 16)
    assert (tree.spent["roots"], tree.spent["branches"]) == (10, 6)
    assert not any(decision.name == (0,) for decision in tree.decisions)


# -- Tree-GRPO --------------------------------------------------------------------------------------------------------

CHAIN = by_turn(Turn(1), Turn(1), Turn(0))
"""Two tool results: three states to expand."""


async def drawn(monkeypatch, count, nodes, rounds=1, **options):
    """The turns of the states that ``count`` trees draw, without playing on from them."""
    draws = []

    async def expand(tree, state, draw, group):
        draws[-1].append(state.turn)

    monkeypatch.setattr(Tree, "expand", expand)
    options |= {"trees": 1, "nodes": nodes, "rounds": rounds}
    grower = scheduler(Streaming(CHAIN), World(), group=1, policy="expand_tree", policy_options=options)
    for seed in range(count):
        draws.append([])
        await grower.grow(TASKS[:1], seed=seed)
    return draws


async def test_states_are_drawn_uniformly_and_with_replacement(monkeypatch):
    """The prompt and two tool results, 1/3 each: chi-square of 3,000 draws, 13.8 is its 0.999 quantile at 2 d.o.f."""
    draws = await drawn(monkeypatch, 300, 10)
    counts = [sum(turns.count(turn) for turns in draws) for turn in range(3)]
    assert sum(counts) == 3000
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 13.8
    again = sum(a == b for turns in draws for a, b in zip(turns[::2], turns[1::2], strict=True)) / 1500
    assert within(again, 1 / 3, 1500), "the second draw does not know of the first"


async def test_ranked_states_are_those_whose_next_turn_began_least_certainly(monkeypatch):
    draws = []

    async def expand(tree, state, draw, group):
        draws.append(state.turn)

    monkeypatch.setattr(Tree, "expand", expand)
    # Only the first 20 tokens of a turn are looked at, and their mean, so that a long turn is not uncertain by itself.
    entropies = [[1.0] * 20 + [99.0] * 5, [3.0], [2.0] * 30]
    script = by_turn(*(Turn(calls, each) for calls, each in zip((1, 1, 0), entropies, strict=True)))
    options = {"trees": 1, "nodes": 5, "rank": "entropy"}
    await scheduler(Streaming(script), World(), group=1, policy="expand_tree", policy_options=options).grow(
        TASKS[:1], seed=0
    )
    assert draws == [1, 2, 0, 1, 2]


async def test_leaves_are_kept_without_replacement_and_without_preference():
    """2 of the 4 leaves of each tree: each is kept half of the time, the chain itself included."""
    options = {"trees": 2, "nodes": 3}
    grower = scheduler(Streaming(CHAIN), World(), group=4, policy="expand_tree", policy_options=options)
    kept = dict.fromkeys([None, 0, 1, 2], 0)
    trees = [tree for seed in range(13) for tree in await grower.grow(TASKS, seed=seed)]
    for tree in trees:
        check_tree(tree, 4, pairs=True)
        assert sorted(leaf.name[0] for leaf in tree.leaves) == [0, 0, 1, 1]
        assert tree.spent["pruned"] == 2 * (4 - 2)
        for leaf in tree.leaves:
            kept[leaf.name[-1] if len(leaf.name) > 1 else None] += 1
    assert sum(kept.values()) == 416
    assert all(within(count / 208, 0.5, 208) for count in kept.values())


@pytest.mark.parametrize(
    ("m", "n", "rounds", "chains"), [(2, 2, 1, 4), (1, 2, 1, 2), (2, 6, 1, 8), (4, 5, 1, 14), (2, 2, 2, 6)]
)
async def test_a_tree_has_1_plus_n_l_leaves_and_costs_what_the_paper_says(m, n, rounds, chains):
    """E = M B + M L N B / 2 for long chains. One of T turns has T states; the t-th leaves (T - t) / T of it to play."""
    assert m + m * rounds * n / 2 == chains
    turns, count = 9, 8
    script, world = (lambda request: Turn(1 if request.turn < turns - 1 else 0, [1.0] * 4)), World(max_turns=turns)
    options = {"trees": m, "nodes": n, "rounds": rounds}
    sampler = Streaming(script)
    grower = scheduler(sampler, world, group=m * (1 + n * rounds), policy="expand_tree", policy_options=options)
    trees = [tree for seed in range(count // 8) for tree in await grower.grow(TASKS, seed=seed)]
    for tree in trees:
        check_tree(tree, m * (1 + n * rounds), pairs=True)
        assert tree.spent["roots"] == m
        assert tree.spent["pruned"] == 0
    chain = turns * 4
    states = (turns + 1) / (2 * turns)  # 0.56, and 0.5 in the limit
    if rounds == 1:
        assert sampler.generated / count / chain == pytest.approx(m + m * n * states, rel=0.15)
    exact = sum(turns - (leaf.name[-2] if len(leaf.name) > 1 else 0) for tree in trees for leaf in tree.leaves) * 4
    assert sampler.generated == exact, "from its own state on, and no turn before it again"


async def test_later_rounds_expand_what_earlier_ones_made():
    options = {"trees": 1, "nodes": 4, "rounds": 3}
    (tree,) = await scheduler(Streaming(CHAIN), World(), group=13, policy="expand_tree", policy_options=options).grow(
        TASKS[:1], seed=1
    )
    check_tree(tree, 13, pairs=True)
    draws = sorted(leaf.name[-1] for leaf in tree.leaves if len(leaf.name) > 1)
    assert draws == list(range(12)), "every draw has its number"
    assert max(len(leaf.name) for leaf in tree.leaves) > 3


async def test_trees_do_not_wait_for_each_other():
    """The first chain is stuck in a tool until the second tree has all its leaves."""
    rest = asyncio.Event()
    delivered = []

    async def run(tool):
        if not tool.lineage and not tool.seen and len(world.first) == 0:
            world.first.append(tool)
            async with asyncio.timeout(3):
                await rest.wait()

    def progress(leaf):
        delivered.append(leaf)
        if len(delivered) == 4:
            rest.set()

    world = World(run=run)
    world.first = []
    options = {"trees": 2, "nodes": 3}
    (tree,) = await scheduler(Streaming(CHAIN), world, group=8, policy="expand_tree", policy_options=options).grow(
        TASKS[:1], seed=0, progress=progress
    )
    check_tree(tree, 8, pairs=True)
    assert len({leaf.name[0] for leaf in delivered[:4]}) == 1


def test_the_defaults_are_the_papers_but_for_a_group_of_8():
    arpo, grpo = EntropyTree(), ExpandTree()
    assert (arpo.alpha, arpo.beta, arpo.tau, arpo.first_tokens) == (0.5, 0.2, 0.5, 20)
    assert (grpo.trees, grpo.nodes, grpo.rounds) == (2, 3, 1)


async def test_a_sampler_without_entropies_is_refused_where_they_decide():
    sampler = Streaming(by_turn(Turn(calls=1), Turn()))
    sampler.entropies = False
    for policy, options in (("entropy_tree", {}), ("expand_tree", {"rank": "entropy"})):
        asking = scheduler(sampler, World(), group=4, policy=policy, policy_options=options)
        with pytest.raises(ConfigError, match=rf"'{policy}' decides by entropies, and the sampler reports none"):
            await asking.grow(TASKS[:1], seed=0)
    assert not sampler.requests
    for policy in ("group", "random_tree", "expand_tree"):
        (tree,) = await scheduler(sampler, World(), group=4, policy=policy).grow(TASKS[:1], seed=0)
        check_tree(tree, 4, pairs=policy == "expand_tree")
