from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.errors import TaskError
from agentrl.stats import Comparison, Counts, avg_at_k, compare, pass_at_k, pass_at_k_of_task, success_counts


def counted(successes: list[int], samples: int) -> dict[str, tuple[int, int]]:
    return {f"task-{index}": (c, samples) for index, c in enumerate(successes)}


# -- point estimates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "samples"), [(0, 6), (1, 6), (3, 6), (5, 6), (6, 6), (1, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(successes: int, samples: int) -> None:
    outcomes = [True] * successes + [False] * (samples - successes)
    for k in range(1, samples + 1):
        subsets = list(combinations(outcomes, k))
        assert pass_at_k_of_task(successes, samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_stays_finite_where_factorials_overflow() -> None:
    assert pass_at_k_of_task(1, 100_000, 50_000) == pytest.approx(0.5)
    assert pass_at_k_of_task(99_999, 100_000, 1) == pytest.approx(0.99999)


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_pass_at_k_grows_with_k_from_the_mean(counts: tuple[int, int]) -> None:
    successes, samples = counts
    curve = [pass_at_k_of_task(successes, samples, k) for k in range(1, samples + 1)]
    assert curve[0] == pytest.approx(successes / samples)
    assert curve == sorted(curve)
    assert curve[-1] == (1.0 if successes else 0.0)


def test_pass_at_k_is_unbiased() -> None:
    chance, samples, k = 0.3, 8, 4
    successes = np.random.default_rng(0).binomial(samples, chance, size=20_000)
    mean = pass_at_k(counted(successes.tolist(), samples), k, resamples=100).value
    assert mean == pytest.approx(1 - (1 - chance) ** k, abs=0.005)


def test_avg_at_k_takes_the_first_k_graded_scores() -> None:
    scores = {"a": [0.5, 1.0, 9.0], "b": [0.0, 0.25, 9.0], "c": [1.0]}
    estimate = avg_at_k(scores, 2, reward_range=(0.0, 10.0))
    assert estimate.value == pytest.approx((0.75 + 0.125) / 2)
    assert (estimate.tasks, estimate.samples, estimate.excluded) == (2, 4, 1)


def test_the_interval_of_graded_scores_follows_their_range() -> None:
    scores = np.random.default_rng(1).random((60, 4))
    unit = avg_at_k({str(i): row.tolist() for i, row in enumerate(scores)}, 4)
    wide = avg_at_k({str(i): (row * 4 - 2).tolist() for i, row in enumerate(scores)}, 4, reward_range=(-2.0, 2.0))
    assert (wide.low, wide.value, wide.high) == pytest.approx([4 * x - 2 for x in (unit.low, unit.value, unit.high)])


def test_success_counts_leave_out_what_was_not_scored() -> None:
    counts = success_counts({"a": [1.0, 0.0, None], "b": [None], "c": [0.99, 1.5]})
    assert counts == {"a": Counts(1, 2), "b": Counts(0, 0), "c": Counts(1, 2)}


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "chance", "k"),
    [(30, (0.5, 0.5), 1), (64, (0.2, 3.0), 4), (64, (2.0, 2.0), 1), (64, (6.0, 0.4), 1)],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(tasks: int, chance: tuple[float, float], k: int) -> None:
    """Tasks of Beta-distributed difficulty, 8 samples each; the truth is pass@k over the population of tasks."""
    rng, rounds = np.random.default_rng(7), 1_000
    truth = float(np.mean(1 - (1 - rng.beta(*chance, size=500_000)) ** k))
    successes = rng.binomial(8, rng.beta(*chance, size=(rounds, tasks)))
    estimates = [pass_at_k(counted(row.tolist(), 8), k, resamples=500) for row in successes]
    covered = np.mean([e.low <= truth <= e.high for e in estimates])
    assert 0.92 <= covered <= 0.98


def test_the_paired_interval_covers_the_true_gain() -> None:
    rng, rounds, tasks = np.random.default_rng(8), 600, 64
    first = rng.beta(2, 2, size=(rounds, tasks))
    second = np.minimum(1.0, first * 1.1 + 0.05)
    difficulty = rng.beta(2, 2, size=500_000)
    truth = float(np.mean(np.minimum(1.0, difficulty * 1.1 + 0.05) - difficulty))
    before, after = rng.binomial(8, first), rng.binomial(8, second)
    found = [compare(counted(b, 8), counted(a, 8), 1, resamples=500) for b, a in zip(before, after, strict=True)]
    assert 0.92 <= np.mean([c.low <= truth <= c.high for c in found]) <= 0.98


def test_samples_of_one_task_are_not_counted_as_independent() -> None:
    """Tasks that are always or never solved say as much with 64 samples each as with one."""
    outcomes = [0, 1] * 20
    once = pass_at_k(counted(outcomes, 1), 1)
    often = pass_at_k(counted([64 * outcome for outcome in outcomes], 64), 1)
    assert (often.low, often.high) == (once.low, once.high)
    assert often.high - often.low > 0.28


@pytest.mark.parametrize(
    ("solved", "expected"),
    [(64, (0.9434, 1.0)), (0, (0.0, 0.0566)), (63, (0.9167, 0.9972))],
)
def test_few_deviating_tasks_get_wilsons_interval(solved: int, expected: tuple[float, float]) -> None:
    """Figures of R's ``binom::binom.confint(solved, 64, method = "wilson")``."""
    estimate = pass_at_k(counted([1] * solved + [0] * (64 - solved), 1), 1)
    assert (estimate.low, estimate.high) == pytest.approx(expected, abs=1e-4)


def test_one_task_does_not_pretend_to_know() -> None:
    estimate = pass_at_k({"only": (8, 8)}, 1)
    assert estimate.low < 0.25
    assert estimate.high == 1.0


def test_noise_of_the_last_digit_is_not_variation() -> None:
    scores = {str(i): [0.1 + 0.2 if i % 2 else 0.3] for i in range(40)}
    estimate = avg_at_k(scores, 1)
    assert estimate.high - estimate.low > 0.2


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.sampled_from([1, 2, 8]))
def test_the_interval_holds_the_estimate_inside_of_the_scale(successes: list[int], k: int) -> None:
    estimate = pass_at_k(counted(successes, 8), k, resamples=1_000)
    assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
    assert estimate.low < estimate.high


def test_the_same_counts_give_the_same_interval() -> None:
    counts = counted([0, 1, 2, 3, 4, 5, 6, 7] * 4, 8)
    assert pass_at_k(counts, 2) == pass_at_k(counts, 2)
    assert pass_at_k(counts, 2) != pass_at_k(counts, 2, seed=1)


# -- paired comparison ------------------------------------------------------------------------------------------------


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    before = counted([0, 2, 4, 6] * 16, 8)
    after = counted([1, 2, 5, 7] * 16, 8)
    found = compare(before, after, 1)
    first, second = pass_at_k(before, 1), pass_at_k(after, 1)
    assert found.difference == pytest.approx(second.value - first.value)
    assert first.high > second.low, "the two intervals overlap, yet"
    assert found.low > 0.05
    assert found.p_value < 0.001


def test_equal_policies_differ_by_nothing_but_not_with_certainty() -> None:
    counts = counted([8] * 64, 8)
    found = compare(counts, counts, 1)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert -0.06 < found.low < -0.03
    assert found.high == pytest.approx(-found.low)


def test_a_clean_sweep_is_certain_but_not_without_width() -> None:
    found = compare(counted([0] * 64, 8), counted([8] * 64, 8), 1)
    assert found.difference == 1.0
    assert 0.9 < found.low < 0.96
    assert found.high == 1.0


def test_swapping_the_policies_mirrors_the_result() -> None:
    rng = np.random.default_rng(3)
    before, after = (counted(rng.integers(0, 9, size=50).tolist(), 8) for _ in range(2))
    there, back = compare(before, after, 2), compare(after, before, 2)
    assert there.difference == -back.difference
    assert there.p_value == back.p_value
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=0.02)


@pytest.mark.parametrize(("wins", "losses"), [(3, 0), (7, 1), (12, 5)])
def test_the_p_value_is_the_sign_test_where_all_differences_are_equal(wins: int, losses: int) -> None:
    total = wins + losses
    heads = np.random.default_rng(0).binomial(total, 0.5, size=1_000_000)
    exact = np.mean(np.abs(2 * heads - total) >= abs(wins - losses))
    before = counted([0] * wins + [1] * losses + [1] * 20, 1)
    after = counted([1] * wins + [0] * losses + [1] * 20, 1)
    assert compare(before, after, 1).p_value == pytest.approx(exact, abs=0.02)


def test_p_values_of_equal_policies_are_below_a_twentieth_one_time_in_twenty() -> None:
    rng, rounds, tasks = np.random.default_rng(5), 300, 40
    chance = rng.beta(1, 1, size=(rounds, tasks))
    pairs = zip(rng.binomial(8, chance), rng.binomial(8, chance), strict=True)
    p_values = [compare(counted(a, 8), counted(b, 8), 1, resamples=500).p_value for a, b in pairs]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.08


def test_a_task_short_of_samples_in_either_policy_is_counted_as_excluded() -> None:
    before = {"a": (1, 4), "b": (2, 4), "c": (0, 3)}
    after = {"a": (3, 4), "b": (4, 2), "c": (0, 4)} | {"b": (2, 2)}
    found = compare(before, after, 4)
    assert isinstance(found, Comparison)
    assert (found.tasks, found.excluded) == (1, 2)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_tasks_short_of_samples_are_excluded_and_counted() -> None:
    estimate = pass_at_k({"a": (4, 4), "b": (0, 4), "c": (3, 3), "d": (0, 0)}, 4)
    assert (estimate.value, estimate.tasks, estimate.samples, estimate.excluded) == (0.5, 2, 8, 2)


def test_k_above_every_number_of_samples_is_refused() -> None:
    with pytest.raises(TaskError, match=r"pass@8 needs 8 scored samples.*the most that any of 2 tasks has is 4"):
        pass_at_k({"a": (1, 4), "b": (0, 3)}, 8)


def test_different_tasks_are_refused_by_name() -> None:
    with pytest.raises(TaskError, match=r"1 only in the first: gone; 2 only in the second: new-1, new-2"):
        compare({"a": (1, 1), "gone": (0, 1)}, {"a": (1, 1), "new-2": (0, 1), "new-1": (0, 1)}, 1)


@pytest.mark.parametrize("call", [lambda: pass_at_k({}, 1), lambda: avg_at_k({}, 1), lambda: compare({}, {}, 1)])
def test_no_tasks_are_refused(call: object) -> None:
    with pytest.raises(TaskError, match="of no tasks"):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(("counts", "k"), [((5, 4), 1), ((-1, 4), 1), ((1, 4), 0)])
def test_impossible_counts_are_refused(counts: tuple[int, int], k: int) -> None:
    with pytest.raises(TaskError, match="expected"):
        pass_at_k({"a": counts}, k)


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan")])
def test_scores_outside_of_the_range_are_refused(score: float) -> None:
    with pytest.raises(TaskError, match=r"outside of \[0, 1\]"):
        avg_at_k({"a": [0.5, score]}, 1)


def test_a_range_without_ends_is_refused() -> None:
    with pytest.raises(TaskError, match="two finite numbers"):
        avg_at_k({"a": [0.5]}, 1, reward_range=(0.0, float("inf")))
