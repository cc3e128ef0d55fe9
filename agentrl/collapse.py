"""Stops a run whose policy has collapsed, before it spends days on nothing.

Two signs, each of which has to last: the entropy stays near 0, so that the policy no longer explores; or nearly every
group earns one reward, so that group-relative advantages are 0. Both are off by default. A third sign, a gap between
the sampler's log-probs and the learner's, needs no patience: ``train.max_gap`` stops the run before such an update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from agentrl.config import TrainConfig
from agentrl.errors import TrainingCollapsed

Metrics = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Sign:
    """A number that must not stay below a bound.

    Attributes:
        reason: its short name.
        key: the configuration key of its bound.
        what: the number in words, for the message.
        advice: what to try.
        measure: the number, from a step's metrics; None where it was not measured.
    """

    reason: str
    key: str
    what: str
    advice: str
    measure: Callable[[Metrics], float | None]


def informative(metrics: Metrics) -> float | None:
    """The share of groups with two different rewards, before groups are replaced (dynamic sampling)."""
    same = metrics.get("frac_reward_zero_std")
    return None if same is None else 1.0 - same


ENTROPY = Sign(
    "entropy",
    "train.min_entropy",
    "the policy's entropy in nats a token",
    "The policy says the same thing every time. Start again from an earlier policy with a smaller train.lr, a larger "
    "algorithm.clip_high, an entropy bonus (algorithm.entropy_coef) or a KL penalty (algorithm.kl_coef).",
    lambda metrics: metrics.get("entropy"),
)
REWARD_VARIANCE = Sign(
    "reward variance",
    "train.min_informative",
    "the share of groups with two different rewards",
    "There is next to nothing to learn from. Look into rollouts/: the tasks may be too hard or too easy for the "
    "policy, or the reward the same for all. Try other tasks, a larger rollout.group or a warm start.",
    informative,
)


class Watch:
    """Counts for how many steps in a row each sign has been below its bound.

    The counts follow from the metrics alone, so a resumed run restores them from its ``metrics.jsonl``: nothing else
    has to be saved, and bounds that were changed hold for the past too.

    Args:
        min_entropy: lowest mean entropy of a step's policy tokens, in nats, ``entropy``; 0: off.
        min_informative: lowest share of groups with two different rewards, ``1 - frac_reward_zero_std``; 0: off.
        patience: steps in a row below a bound that stop the run.
        history: the metrics of the steps before, oldest first.
    """

    def __init__(
        self, min_entropy: float = 0.0, min_informative: float = 0.0, patience: int = 5, history: Iterable[Metrics] = ()
    ) -> None:
        bounds = {ENTROPY: min_entropy, REWARD_VARIANCE: min_informative}
        self._bounds = {sign: bound for sign, bound in bounds.items() if bound > 0}
        self._counts = dict.fromkeys(self._bounds, 0)
        self._patience = patience
        for metrics in history:
            self._count(metrics)

    @classmethod
    def of(cls, config: TrainConfig, history: Iterable[Metrics] = ()) -> Watch:
        """As ``config`` says."""
        return cls(config.min_entropy, config.min_informative, config.patience, history)

    def check(self, metrics: Metrics) -> None:
        """Count one more step.

        Args:
            metrics: the step's. A sign that was not measured neither counts nor ends the row.

        Raises:
            TrainingCollapsed: a sign has been below its bound for ``patience`` steps in a row, this one included.
        """
        for sign, value in self._count(metrics).items():
            if self._counts[sign] >= self._patience:
                raise _collapsed(sign, value, self._bounds[sign], self._counts[sign])

    def _count(self, metrics: Metrics) -> dict[Sign, float]:
        """Update the counts; the values that are below their bounds."""
        measured = {sign: sign.measure(metrics) for sign in self._bounds}
        values = {sign: value for sign, value in measured.items() if value is not None}
        below = {sign: value for sign, value in values.items() if value < self._bounds[sign]}
        for sign in values:
            self._counts[sign] = self._counts[sign] + 1 if sign in below else 0
        return below


def _collapsed(sign: Sign, value: float, bound: float, steps: int) -> TrainingCollapsed:
    row = f"{steps} steps in a row" if steps > 1 else "this step"
    return TrainingCollapsed(
        f"training has collapsed ({sign.reason}): {sign.what} is {value:.4g}, below {bound:g} ({sign.key}) for {row}. "
        f"{sign.advice} Everything up to here is in the run folder; to go on nevertheless from its last checkpoint: "
        f"agentrl train --resume --out DIR --{sign.key} 0",
        reason=sign.reason,
        value=value,
        bound=bound,
        steps=steps,
    )
