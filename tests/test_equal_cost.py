"""Cost curves and what is read off them, on runs made by hand."""

from __future__ import annotations

import itertools
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.equal_cost import (
    UNITS,
    Point,
    Run,
    first_passage,
    interval,
    mean_curve,
    reward_at,
    sign_flip_p_value,
    summarise,
)
from agentrl.errors import ConfigError
from agentrl.stats import t_quantile


def run(method: str, seed: int, *points: tuple[float, float], failure: str = "") -> Run:
    """A run through (calls, reward); tokens are ten times the calls."""
    costs = [dict.fromkeys(UNITS, 0.0) | {"calls": calls, "tokens": 10 * calls} for calls, _ in points]
    found = tuple(Point(i, cost, reward) for i, (cost, (_, reward)) in enumerate(zip(costs, points, strict=True)))
    return Run(method, seed, found, failure)


def test_the_curve_is_straight_between_its_points() -> None:
    made = run("a", 0, (0, 0.2), (100, 0.6), (220, 0.6))
    assert reward_at(made, "calls", 50) == pytest.approx(0.4)
    assert reward_at(made, "tokens", 500) == pytest.approx(0.4)
    assert reward_at(made, "calls", 999) == 0.6


@pytest.mark.parametrize(
    ("target", "cost"),
    [(0.1, 0.0), (0.2, 0.0), (0.3, 50.0), (0.4, 100.0), (0.5, 250.0), (0.9, None)],
    ids=["below the start", "the start", "on the way", "a point", "after a fall", "never"],
)
def test_the_first_passage(target: float, cost: float | None) -> None:
    found = first_passage([0, 100, 200, 300], [0.2, 0.4, 0.3, 0.7], target)
    assert found == (None if cost is None else pytest.approx(cost))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1))
def test_the_curve_is_at_the_target_where_it_passes_it_first(rewards: list[float], target: float) -> None:
    made = run("a", 0, *((100.0 * i, reward) for i, reward in enumerate(rewards)))
    found = first_passage([100.0 * i for i in range(len(rewards))], rewards, target)
    if found is None:
        assert max(rewards) < target
    else:
        assert reward_at(made, "calls", found) >= target - 1e-6
        assert all(reward_at(made, "calls", found * share) < target for share in (0.25, 0.5, 0.9) if found > 1e-3)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, rel=1e-4)


def test_an_interval_of_one_seed_has_no_width_to_show() -> None:
    alone = interval([0.5])
    assert (alone.mean, alone.low, alone.high) == (0.5, None, None)
    both = interval([0.4, 0.6])
    assert (both.low, both.high) == (pytest.approx(0.5 - 12.7062 * 0.1, rel=1e-3), pytest.approx(1.7706, rel=1e-3))


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=7))
def test_the_exact_test_counts_sign_patterns(differences: list[int]) -> None:
    signs = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(pattern, differences, strict=True))) for pattern in signs]
    assert sign_flip_p_value(differences) == pytest.approx(fmean(s >= abs(sum(differences)) for s in sums))


def test_five_seeds_that_agree_give_p_of_a_sixteenth() -> None:
    assert sign_flip_p_value([0.1, 0.2, 0.05, 0.3, 0.01]) == 2 / 32
    assert sign_flip_p_value([]) is None
    with pytest.raises(ConfigError, match="at most 20 seeds"):
        sign_flip_p_value([1.0] * 21)


GROUP = [run("group", seed, (0, 0.2), (100, 0.4 + 0.01 * seed), (200, 0.6)) for seed in range(4)]


def rows(*others: Run) -> dict[str, object]:
    return {row.method: row for row in summarise([*others, *GROUP], "group", "calls", 200.0)}


def test_a_method_that_needs_a_quarter_meets_the_claim() -> None:
    found = rows(*(run("tree", seed, (0, 0.2), (50 + seed, 0.6), (200, 0.9)) for seed in range(4)))
    assert list(found) == ["group", "tree"]
    tree, group = found["tree"], found["group"]
    assert tree.shares == {seed: pytest.approx((50 + seed) / 200) for seed in range(4)}
    assert tree.claim == "met"
    assert (tree.share_p, tree.reward_p) == (2 / 16, 2 / 16)
    assert tree.reward.mean == pytest.approx(0.9)
    assert group.shares == dict.fromkeys(range(4), 1.0)
    assert (group.claim, group.reward_p, group.share_p) == ("", None, None)
    assert group.spent["tokens"] == 2000


def test_seeds_that_never_get_there_count_with_what_they_spent() -> None:
    found = rows(*(run("tree", seed, (0, 0.2), (100, 0.3), (210 + 2 * seed, 0.5)) for seed in range(4)))["tree"]
    assert found.shares == dict.fromkeys(range(4))
    assert found.share.mean == pytest.approx(fmean((210 + 2 * seed) / 200 for seed in range(4)))
    assert found.claim == "not met"
    assert found.mean_curve_share is None


def test_one_seed_that_never_gets_there_leaves_a_claim_undecided_at_best() -> None:
    quick = [run("tree", seed, (0, 0.2), (10, 0.6), (200, 0.9)) for seed in range(3)]
    found = rows(*quick, run("tree", 3, (0, 0.2), (90, 0.3)))["tree"]
    assert found.claim == "not decided"
    assert found.unspent == {3: 0.45}


def test_what_the_reference_spends_after_it_stopped_to_rise_does_not_count() -> None:
    flat = [run("group", seed, (0, 0.2), (100, 0.6), (150, 0.6), (200, 0.6)) for seed in range(3)]
    same = [run("same", seed, (0, 0.2), (100, 0.6), (200, 0.6)) for seed in range(3)]
    found = {row.method: row for row in summarise([*flat, *same], "group", "calls", 200.0)}
    for row in found.values():
        assert row.shares == dict.fromkeys(range(3), 1.0)
        assert row.mean_curve_share == pytest.approx(1.0)
    assert (found["same"].claim, found["same"].share_p) == ("not met", 1.0)


def test_a_seed_on_which_the_reference_gained_nothing_has_no_share() -> None:
    flat = run("group", 0, (0, 0.5), (200, 0.4))
    found = summarise([flat, *GROUP[1:], run("tree", 0, (0, 0.5), (200, 0.9))], "group", "calls", 200.0)
    assert [list(row.shares) for row in found] == [[1, 2, 3], []]
    assert (found[1].share, found[1].share_p, found[1].claim) == (None, None, "not decided")


def test_failed_runs_are_left_out_and_named() -> None:
    good = [run("tree", seed, (0, 0.2), (200, 0.7)) for seed in range(3)]
    found = rows(*good, run("tree", 3, failure="TooManyFailures: all"), run("lost", 0, failure="NonFiniteError: loss"))
    assert (found["tree"].finished, found["tree"].failures) == (3, {3: "TooManyFailures: all"})
    assert found["tree"].reward_p == 2 / 8
    assert (found["lost"].finished, found["lost"].reward) == (0, None)


def test_a_mean_curve_ends_with_the_shortest_run() -> None:
    short, long = run("a", 0, (0, 0.0), (80, 0.8)), run("a", 1, (0, 0.2), (300, 0.2))
    band = mean_curve([short, long], "calls", 200)
    assert (band.cost[0], band.cost[-1]) == (0, 80)
    assert (band.mean[0], band.mean[-1]) == (pytest.approx(0.1), pytest.approx(0.5))
    assert band.low[-1] < band.mean[-1] < band.high[-1]
    assert mean_curve([], "calls", 200).cost == []
