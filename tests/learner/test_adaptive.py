from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from agentrl.errors import ConfigError, NonFiniteError
from agentrl.learner.adaptive import Adaptive, PenaltyKL, ProportionalKL, TargetEntropy

MAKE: dict[str, Callable[[], Any]] = {
    "proportional": lambda: ProportionalKL(0.2, target=6.0),
    "penalty": lambda: PenaltyKL(1.0, target=0.01),
    "entropy": lambda: TargetEntropy(0.01, target=0.2),
}


def follow(adaptive: Any, measured: float) -> float:
    value: float = adaptive.update(measured, 64) if isinstance(adaptive, ProportionalKL) else adaptive.update(measured)
    return value


def test_proportional_kl_by_hand() -> None:
    beta = ProportionalKL(0.2, target=6.0)
    assert beta.value == 0.2
    assert beta.update(6.6, 1000) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert beta.update(600.0, 1000) == pytest.approx(0.202 * (1 + 0.2 * 0.1))  # the error is clipped
    assert beta.update(0.0, 1000) == pytest.approx(0.202 * 1.02 * (1 - 0.2 * 0.1))
    assert beta.update(6.0, 1000) == beta.value
    assert beta.update(0.0, 10**9) == 0.0  # never a reward for leaving


def test_proportional_kl_finds_the_target() -> None:
    beta = ProportionalKL(0.01, target=0.1, horizon=500.0)
    for _ in range(2000):
        kl = 0.02 / beta.value  # the more it costs, the less of it
        beta.update(kl, 64)
    assert 0.02 / beta.value == pytest.approx(0.1, rel=1e-3)


def test_penalty_kl_doubles_and_halves() -> None:
    beta = PenaltyKL(target=0.03)
    assert beta.value == 1.0
    assert [beta.update(kl) for kl in (0.046, 0.045, 0.021, 0.019, 0.0)] == [2.0, 2.0, 2.0, 1.0, 0.5]


def test_target_entropy_is_on_only_below_it() -> None:
    coefficient = TargetEntropy(target=0.2, step=0.005)
    assert coefficient.value == 0.0
    used = [coefficient.update(entropy) for entropy in (0.1, 0.1, 0.3, 0.2, 0.2, 0.3, 0.3, 0.1, 0.1)]
    assert used == pytest.approx([0.0, 0.005, 0.0, 0.005, 0.005, 0.0, 0.0, 0.0, 0.005])
    assert coefficient.value == used[-1]


@pytest.mark.parametrize("kind", MAKE)
def test_a_resumed_run_goes_on(kind: str) -> None:
    original: Adaptive = MAKE[kind]()
    for measured in (0.1, 0.002, 0.5, 0.15):
        follow(original, measured)
    saved = json.loads(json.dumps(original.state()))
    resumed: Adaptive = MAKE[kind]()
    assert resumed.state() != original.state()
    resumed.load(saved)
    assert resumed.value == original.value
    for measured in (0.1, 0.3, 0.0):
        assert follow(resumed, measured) == follow(original, measured)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("measured", [float("nan"), float("inf")])
def test_what_is_not_finite_changes_nothing(kind: str, measured: float) -> None:
    adaptive: Adaptive = MAKE[kind]()
    follow(adaptive, 0.1)
    before = adaptive.state()
    with pytest.raises(NonFiniteError, match="expected a finite number"):
        follow(adaptive, measured)
    assert adaptive.state() == before


@pytest.mark.parametrize("kind", MAKE)
def test_a_broken_checkpoint_is_refused(kind: str) -> None:
    adaptive: Adaptive = MAKE[kind]()
    before = adaptive.state()
    with pytest.raises(ConfigError, match="expected"):
        adaptive.load({})
    with pytest.raises(ConfigError, match="saved coefficient: expected a finite number of 0 or above"):
        adaptive.load(before | {"value": -1.0})
    assert adaptive.state() == before


def test_a_broken_entropy_checkpoint_changes_nothing() -> None:
    adaptive = TargetEntropy(0.01)
    with pytest.raises(ConfigError, match="in use"):
        adaptive.load({"value": 0.5, "in_use": -1.0})
    assert adaptive.state() == TargetEntropy(0.01).state()


def test_wrong_numbers_are_refused() -> None:
    for make, message in (
        (lambda: ProportionalKL(0.0, target=1.0), "initial KL coefficient"),
        (lambda: ProportionalKL(0.1, target=0.0), "KL target"),
        (lambda: ProportionalKL(0.1, target=1.0, horizon=-1.0), "KL horizon"),
        (lambda: PenaltyKL(float("nan")), "initial KL coefficient"),
        (lambda: PenaltyKL(target=0.0), "KL target"),
        (lambda: TargetEntropy(-0.1), "initial coefficient: expected a finite number of 0 or above"),
        (lambda: TargetEntropy(target=0.0), "entropy target"),
        (lambda: TargetEntropy(step=0.0), "entropy step"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
