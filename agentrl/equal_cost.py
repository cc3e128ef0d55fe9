"""Methods compared at equal cost: reward against what it took, with the seed as the sampling unit.

**What is measured.** A run is stopped at places along its budget, and the policy that it has there plays the same tasks
as every other run's, in groups. The reward of the rollouts that it learns from would not do: a tree branches at tool
results, so trajectories that call tools have more leaves, and a policy that calls tools in half of its episodes has a
higher mean over the leaves of a tree than over those of a group. What is played to measure is no part of the cost.

**Reaching the reference.** R is what the reference's policy earns at the budget, and B the cost at which its curve,
straight between the places, first is R: less than the budget where it had stopped rising before. A run of the same seed
reaches R at a first cost x of its own; its share is x / B, the reference's 1. A seed on which the reference ended no
better than it began has no shares. First passages of a noisy curve come early, those of both curves alike; but where
noise has raised R, a run that is as good may miss it.

**Intervals and tests** are over seeds: Student's 95 % interval, and the exact sign-flip test of the paired differences
(all 2^n signs). It knows no p below 2 / 2^n: with 5 seeds 0.0625.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev

import numpy as np

from agentrl.errors import ConfigError
from agentrl.stats import t_quantile

UNITS = ("calls", "tokens", "learner_tokens", "seconds")
"""Tool calls, generated tokens, unique tokens through the learner, and wall time of play and update."""
CLAIM = 0.5
"""A tree reaches the reference's reward at no more than this share of its cost."""
GRID = 200
"""Places at which curves are averaged over seeds."""


@dataclass(frozen=True, slots=True)
class Point:
    """A policy on the way.

    Attributes:
        step: training steps done; 0 at the start.
        cost: what they cost altogether, by unit.
        reward: mean over the samples of the held-out tasks.
    """

    step: int
    cost: Mapping[str, float]
    reward: float


@dataclass(frozen=True, slots=True)
class Run:
    """One method on one seed.

    Attributes:
        method: its name.
        seed: its seed.
        points: from the start to the step that spent the budget, in order.
        failure: why it has not finished; empty where it has.
    """

    method: str
    seed: int
    points: tuple[Point, ...] = ()
    failure: str = ""

    def spent(self, unit: str) -> float:
        """What it cost altogether."""
        return self.points[-1].cost[unit] if self.points else 0.0


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with Student's 95 % interval; one seed has none."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True, slots=True)
class Row:
    """What comes out for one method.

    Attributes:
        method: its name.
        finished: seeds that finished.
        failures: seeds that did not, and why.
        unspent: seeds whose steps ended before the budget was spent, and the share that they spent.
        spent: mean cost by unit.
        steps: mean number of steps.
        reward: at the budget; of a seed that did not spend it, where it ended.
        reward_p: of its difference to the reference's; None for the reference itself and without a common seed.
        shares: by seed, cost to reach the reference's reward over what it cost the reference; None: never reached.
        share: the mean of those; a seed that did not get there counts with what it spent, so it is a lower bound then.
        share_p: of its difference to 1.
        mean_curve_share: the same, of the means over seeds of both curves; None where not reached.
        claim: whether the share is at most ``CLAIM``: "met", "not met" or "not decided"; empty for the reference.
    """

    method: str
    finished: int
    failures: Mapping[int, str] = field(default_factory=dict)
    unspent: Mapping[int, float] = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)
    steps: float = 0.0
    reward: Interval | None = None
    reward_p: float | None = None
    shares: Mapping[int, float | None] = field(default_factory=dict)
    share: Interval | None = None
    share_p: float | None = None
    mean_curve_share: float | None = None
    claim: str = ""


@dataclass(frozen=True, slots=True)
class Band:
    """A method's mean curve: ``cost`` [n], ``mean`` [n], and its interval over seeds, ``low`` [n] to ``high`` [n]."""

    cost: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


# -- curves -----------------------------------------------------------------------------------------------------------


def reward_at(run: Run, unit: str, cost: float) -> float:
    """Reward at ``cost``, straight between the points; the last one's beyond them."""
    return float(np.interp(cost, *_curve(run, unit)))


def first_passage(costs: Sequence[float], rewards: Sequence[float], target: float) -> float | None:
    """The first cost at which the line through the points reaches ``target``; None: never."""
    last: tuple[float, float] | None = None
    for cost, reward in zip(costs, rewards, strict=True):
        if reward >= target - 1e-12:
            if last is None or reward == last[1]:
                return cost
            return min(cost, last[0] + (cost - last[0]) * (target - last[1]) / (reward - last[1]))
        last = (cost, reward)
    return None


def mean_curve(runs: Sequence[Run], unit: str, budget: float) -> Band:
    """The reward on a grid up to ``budget``, its mean over ``runs`` and its interval.

    It ends where the first of the runs ended, so that every point is a mean over the same seeds.
    """
    if not runs or not all(run.points for run in runs):
        return Band([], [], [], [])
    costs = np.linspace(0.0, min([budget, *(run.spent(unit) for run in runs)]), GRID).tolist()
    found = [interval(reward_at(run, unit, cost) for run in runs) for cost in costs]
    means = [each.mean for each in found]
    low = [each.mean if each.low is None else each.low for each in found]
    high = [each.mean if each.high is None else each.high for each in found]
    return Band(costs, means, low, high)


def _curve(run: Run, unit: str) -> tuple[list[float], list[float]]:
    return [point.cost[unit] for point in run.points], [point.reward for point in run.points]


# -- statistics over seeds --------------------------------------------------------------------------------------------


def interval(values: Iterable[float]) -> Interval:
    """Mean and Student's 95 % interval of ``values``, at least one."""
    found = list(values)
    mean = fmean(found)
    if len(found) < 2:
        return Interval(mean, None, None, len(found))
    half = t_quantile(len(found) - 1) * stdev(found) / len(found) ** 0.5
    return Interval(mean, mean - half, mean + half, len(found))


def sign_flip_p_value(differences: Sequence[float]) -> float | None:
    """Exact two-sided p-value of the mean under all sign patterns; None without differences.

    Raises:
        ConfigError: more than 20 differences, whose patterns are too many.
    """
    if len(differences) > 20:
        raise ConfigError(f"compare.seeds: the exact test takes at most 20 seeds, got {len(differences)}.")
    if not differences:
        return None
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - 1e-9))


# -- the comparison ---------------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Run], reference: str, unit: str, budget: float) -> list[Row]:
    """A row per method, the reference first, the others in the order in which they come.

    Args:
        runs: every method on every seed, failed ones included.
        reference: the method to compare with.
        unit: of the budget.
        budget: what every run was to spend.
    """
    methods = sorted(dict.fromkeys(run.method for run in runs), key=lambda method: method != reference)
    base = _finished([run for run in runs if run.method == reference])
    return [
        _row(
            method, [run for run in runs if run.method == method], base, unit, budget, is_reference=method == reference
        )
        for method in methods
    ]


def _finished(runs: Sequence[Run]) -> dict[int, Run]:
    return {run.seed: run for run in runs if not run.failure}


def _row(
    method: str, runs: Sequence[Run], base: Mapping[int, Run], unit: str, budget: float, *, is_reference: bool
) -> Row:
    done = _finished(runs)
    failures = {run.seed: run.failure for run in runs if run.failure}
    if not done:
        return Row(method, 0, failures)
    passages = {seed: _passages(run, base[seed], unit, budget) for seed, run in done.items() if seed in base}
    shares = {seed: None if own is None else own / b for seed, (own, b) in passages.items() if b}
    # A seed that never got there would have taken more than it spent.
    bounds = [done[seed].spent(unit) / passages[seed][1] if s is None else s for seed, s in shares.items()]
    row = Row(
        method,
        len(done),
        failures,
        {seed: run.spent(unit) / budget for seed, run in done.items() if run.spent(unit) < budget},
        {each: fmean(run.spent(each) for run in done.values()) for each in UNITS},
        fmean(run.points[-1].step for run in done.values()),
        interval(reward_at(run, unit, budget) for run in done.values()),
        shares=shares,
        share=interval(bounds) if bounds else None,
        mean_curve_share=_mean_curve_share(list(done.values()), list(base.values()), unit, budget),
    )
    if is_reference:
        return row
    gains = [
        reward_at(run, unit, budget) - reward_at(base[seed], unit, budget) for seed, run in done.items() if seed in base
    ]
    savings = [bound - 1 for bound in bounds]
    claim = _claim(row.share, shares)
    return replace(row, reward_p=sign_flip_p_value(gains), share_p=sign_flip_p_value(savings), claim=claim)


def _passages(run: Run, base: Run, unit: str, budget: float) -> tuple[float | None, float]:
    """What it cost ``run``, and what it cost ``base``, to get where ``base`` is at ``budget``."""
    target = reward_at(base, unit, budget)
    known = first_passage(*_curve(base, unit), target)
    assert known is not None
    return first_passage(*_curve(run, unit), target), known


def _mean_curve_share(runs: Sequence[Run], base: Sequence[Run], unit: str, budget: float) -> float | None:
    reference, curve = mean_curve(base, unit, budget), mean_curve(runs, unit, budget)
    if not reference.mean:
        return None
    known = first_passage(reference.cost, reference.mean, reference.mean[-1])
    passage = first_passage(curve.cost, curve.mean, reference.mean[-1])
    return None if passage is None or not known else passage / known


def _claim(share: Interval | None, shares: Mapping[int, float | None]) -> str:
    if share is None or share.low is None or share.high is None:
        return "not decided"
    if share.high <= CLAIM and all(value is not None for value in shares.values()):
        return "met"
    return "not met" if share.low > CLAIM else "not decided"
