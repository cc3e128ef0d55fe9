"""Coefficients that follow a measurement: of the KL penalty and of the entropy bonus.

Each has ``value``, the coefficient to use now, ``update`` with what the step measured, and ``state`` / ``load`` for
checkpoints: a resumed run goes on from the coefficient it had.
"""

from __future__ import annotations

import math
from typing import ClassVar

from agentrl.errors import ConfigError, NonFiniteError


class Adaptive:
    """A coefficient and how it is kept.

    Args:
        value: to begin with, 0 or more.

    Raises:
        ConfigError: ``value`` is negative or not finite.
    """

    measures: ClassVar[str] = "measurement"

    def __init__(self, value: float) -> None:
        self._value = _checked("initial coefficient", value, at_least=0.0)

    @property
    def value(self) -> float:
        """The coefficient to use now."""
        return self._value

    def state(self) -> dict[str, float]:
        """What a checkpoint has to hold."""
        return {"value": self._value}

    def load(self, state: dict[str, float]) -> None:
        """Go on from ``state``, as given by ``state()``.

        Raises:
            ConfigError: the coefficient in it is missing, negative or not finite.
        """
        if "value" not in state:
            raise ConfigError(f"state of an adaptive coefficient: expected a key 'value', got {sorted(state)}.")
        self._value = _checked("saved coefficient", state["value"], at_least=0.0)

    def _measured(self, number: float) -> float:
        if not math.isfinite(number):
            raise NonFiniteError(
                f"the {self.measures} that adapts a coefficient is {number}: expected a finite number; the coefficient "
                f"stays at {self._value:g}."
            )
        return number


class ProportionalKL(Adaptive):
    """KL coefficient by a proportional controller (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    ``beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)``. The paper writes the gain as ``K_beta = 0.1``
    per batch; its code, TRL and verl as ``n / horizon``, episodes of the step over a horizon of 10,000.

    Args:
        value: beta to begin with; 0 would stay 0.
        target: KL to keep, in nats, measured as what ``update`` gets (per token or per episode).
        horizon: episodes over which the error is worked off.

    Raises:
        ConfigError: a number is not above 0.
    """

    measures = "KL"

    def __init__(self, value: float, *, target: float, horizon: float = 10_000.0) -> None:
        super().__init__(_above_zero("initial KL coefficient", value))
        self.target, self.horizon = _above_zero("KL target", target), _above_zero("KL horizon", horizon)

    def update(self, kl: float, episodes: int) -> float:
        """Follow the step's mean ``kl``, in nats, over ``episodes``. Returns the new value.

        Raises:
            NonFiniteError: ``kl`` is NaN or infinite.
        """
        error = min(max(self._measured(kl) / self.target - 1, -0.2), 0.2)
        # Clipped at 0, which a step of more than 5 horizons would cross: a negative penalty rewards leaving.
        self._value *= max(1 + error * episodes / self.horizon, 0.0)
        return self._value


class PenaltyKL(Adaptive):
    """PPO-penalty's beta (Schulman et al. 2017, arXiv:1707.06347, section 4): doubled above the target, halved below.

    Doubled where KL(pi_old, pi) after the step exceeds 1.5 x target, halved where it is below target / 1.5. The paper
    calls the constants heuristic and the start value unimportant, as beta adjusts quickly.

    Args:
        value: beta to begin with; 1.0 in the paper.
        target: KL(pi_old, pi) to keep, in nats a token; 0.003, 0.01 and 0.03 in the paper.

    Raises:
        ConfigError: a number is not above 0.
    """

    measures = "KL"

    def __init__(self, value: float = 1.0, *, target: float = 0.01) -> None:
        super().__init__(_above_zero("initial KL coefficient", value))
        self.target = _above_zero("KL target", target)

    def update(self, kl: float) -> float:
        """Follow the step's mean ``kl``, in nats. Returns the new value.

        Raises:
            NonFiniteError: ``kl`` is NaN or infinite.
        """
        if self._measured(kl) > 1.5 * self.target:
            self._value *= 2
        elif kl < self.target / 1.5:
            self._value /= 2
        return self._value


class TargetEntropy(Adaptive):
    """Coefficient of the entropy bonus that keeps entropy from falling below a target (Skywork-OR1, arXiv:2505.22312).

    Step k has the coefficient ``c_k`` where its entropy is at or below the target, and 0 above; ``c_k+1`` is ``c_k``
    plus ``step`` below the target and minus ``step`` above. So ``update`` comes *before* the loss of the step whose
    entropy it gets, that of the policy that sampled. c stops at 0, below which the bonus would be a penalty.

    Args:
        value: c to begin with; 0 in the paper.
        target: entropy to keep, in nats a token; 0.2 in the paper.
        step: how much c moves; 0.005 in the paper.

    Raises:
        ConfigError: ``value`` is negative, or ``target`` or ``step`` is not above 0.
    """

    measures = "entropy"

    def __init__(self, value: float = 0.0, *, target: float = 0.2, step: float = 0.005) -> None:
        super().__init__(value)
        self.target, self.step = _above_zero("entropy target", target), _above_zero("entropy step", step)
        self._in_use = 0.0

    @property
    def value(self) -> float:
        """The coefficient of the step last given to ``update``; 0 before the first."""
        return self._in_use

    def update(self, entropy: float) -> float:
        """The coefficient of the step whose mean entropy, in nats, is ``entropy``.

        Raises:
            NonFiniteError: ``entropy`` is NaN or infinite.
        """
        self._in_use = self._value if self._measured(entropy) <= self.target else 0.0
        if entropy < self.target:
            self._value += self.step
        elif entropy > self.target:
            self._value = max(self._value - self.step, 0.0)
        return self._in_use

    def state(self) -> dict[str, float]:
        """What a checkpoint has to hold."""
        return super().state() | {"in_use": self._in_use}

    def load(self, state: dict[str, float]) -> None:
        """Go on from ``state``, as given by ``state()``.

        Raises:
            ConfigError: something is missing, negative or not finite.
        """
        if "in_use" not in state:
            raise ConfigError(f"state of TargetEntropy: expected keys 'value' and 'in_use', got {sorted(state)}.")
        in_use = _checked("saved coefficient in use", state["in_use"], at_least=0.0)
        super().load(state)
        self._in_use = in_use


def _above_zero(name: str, number: float) -> float:
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"{name}: expected a finite number above 0, got {number}.")
    return float(number)


def _checked(name: str, number: float, *, at_least: float) -> float:
    if not (math.isfinite(number) and number >= at_least):
        raise ConfigError(f"{name}: expected a finite number of {at_least:g} or above, got {number}.")
    return float(number)
