"""The configured loss: ratio, surrogate, correction, KL, entropy bonus, aggregation, put together.

What belongs to the whole optimizer step is computed once, without gradient, in ``prepare``: the correction's weights,
the surrogate's selections, the denominators. ``loss`` then acts on any part of it, and the parts add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agentrl.config import RunConfig
from agentrl.errors import ConfigError, UnknownName
from agentrl.learner import selection
from agentrl.learner.adaptive import Adaptive, PenaltyKL, ProportionalKL, TargetEntropy
from agentrl.learner.correction import opsm_mask, sampler_correction
from agentrl.learner.loss import (
    Scores,
    aggregate,
    kl_penalty,
    log_ratio,
    loss_denominator,
    surrogate_metrics,
    token_log_ratio,
)
from agentrl.learner.options import checked_options, option_names
from agentrl.learner.surrogate import find_surrogate

CLIPS = ("clip_low", "clip_high", "dual_clip")
"""Options of surrogates that are configuration keys of their own."""

RATIO_OPTIONS = ("reduce", "gradient")
"""Options of ``log_ratio`` for turns and sequences, set through ``surrogate_options``."""

SELECTS: dict[str, Callable[..., Tensor]] = {
    "clip_cov": selection.select_clip_cov,
    "kl_cov": selection.select_kl_cov,
}


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step has in common.

    Attributes:
        weights: [L, T] factor of each token's loss: correction, rejected and unselected tokens; no gradient.
        selected: [L, T] bool, see ``Scores.selected``.
        baseline: [L], see ``Scores.baseline``.
        group_size: [L], see ``Scores.group_size``.
        denominator: what the loss is divided by.
        tokens: policy tokens learnt from, at least 1: what means over tokens are divided by.
    """

    weights: Tensor
    selected: Tensor | None
    baseline: Tensor | None
    group_size: Tensor | None
    denominator: float
    tokens: float

    def take(self, rows: Tensor, width: int) -> Step:
        """The share of the leaves ``rows``, ``width`` tokens wide; the denominators stay."""

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows, :width] if tensor.dim() == 2 else tensor[rows]

        return replace(
            self,
            weights=self.weights[rows, :width],
            selected=some(self.selected),
            baseline=some(self.baseline),
            group_size=some(self.group_size),
        )


class Objective:
    """The loss as ``config.algorithm`` has it, with its adaptive coefficients.

    Args:
        config: the run's configuration.

    Raises:
        ConfigError: choices that contradict one another.
        UnknownName: an option that the chosen function does not have.
    """

    def __init__(self, config: RunConfig) -> None:
        self.algorithm, self.budget = config.algorithm, config.rollout.max_tokens
        self.surrogate = find_surrogate(self.algorithm.surrogate)
        self.options, self.ratio_options, self.select_options = self._options()
        self.correction_options = checked_options(
            "algorithm.correction_options", sampler_correction, self.algorithm.correction_options
        )
        self._check()
        self.kl, self.entropy = self._coefficients()
        self._rehearse()

    # -- what it needs ------------------------------------------------------------------------------------------------

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probs of the starting policy are read."""
        return self.algorithm.kl_coef > 0 and self.algorithm.kl_reference == "start"

    @property
    def needs_current(self) -> bool:
        """Whether ``prepare`` reads the policy as it is at the start of an optimizer step."""
        selects = not {"selected", "baseline"}.isdisjoint(self.surrogate.needs)
        return selects or self.needs_entropies or self.algorithm.opsm_delta > 0

    @property
    def needs_entropies(self) -> bool:
        """Whether ``prepare`` reads the policy's entropies."""
        return self.algorithm.top_entropy < 1

    @property
    def measures_after(self) -> bool:
        """Whether ``adapt`` wants the KL from the old policy to the one after all updates."""
        return isinstance(self.kl, PenaltyKL)

    # -- once for an optimizer step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, scores: Scores, group: Tensor, generator: torch.Generator) -> Step:
        """What the parts of an optimizer step share.

        Args:
            scores: of all its leaves; ``logprobs`` and ``entropies`` are read where ``needs_current``.
            group: [L].
            generator: of random selections.
        """
        algorithm, mask = self.algorithm, scores.mask
        weights = self._weights(scores)
        if algorithm.opsm_delta:
            assert scores.sampled_logprobs is not None
            gap = token_log_ratio(scores.logprobs, scores.sampled_logprobs, mask)
            weights = weights * opsm_mask(gap, scores.advantages, mask, delta=algorithm.opsm_delta)
        if algorithm.top_entropy < 1:
            assert scores.entropies is not None
            weights = weights * selection.top_entropy_mask(scores.entropies, mask, fraction=algorithm.top_entropy)
        selected = baseline = size = None
        if algorithm.surrogate == "clip_cov":
            ratio = token_log_ratio(scores.logprobs, scores.old_logprobs, mask)
            clips = {name: self.options[name] for name in ("clip_low", "clip_high")}
            selected = selection.select_clip_cov(ratio, scores, generator=generator, **clips, **self.select_options)
        elif algorithm.surrogate == "kl_cov":
            selected = selection.select_kl_cov(scores, **self.select_options)
        elif algorithm.surrogate == "gvpo":
            ratio = token_log_ratio(scores.logprobs, scores.old_logprobs, mask)
            baseline, size = selection.group_baseline(ratio, mask, group)
        denominator = loss_denominator(mask, algorithm.aggregation, max_tokens=self.budget)
        tokens = max(float(mask.sum()), 1.0)
        return Step(weights, selected, baseline, size, max(denominator, 1.0), tokens)

    def _weights(self, scores: Scores) -> Tensor:
        if self.algorithm.correction == "none":
            return torch.ones_like(scores.old_logprobs)
        assert scores.sampled_logprobs is not None
        gap = token_log_ratio(scores.old_logprobs, scores.sampled_logprobs, scores.mask)
        return sampler_correction(self.algorithm.correction, gap, scores.mask, **self.correction_options)[0]

    # -- for every part -----------------------------------------------------------------------------------------------

    def loss(self, scores: Scores, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """A part's share of the step's loss, and its shares of the metrics.

        Args:
            scores: of the part; ``logprobs`` carries the gradient, and ``entropies`` where there is a bonus.
            step: the part's share of what ``prepare`` gave.
        """
        algorithm, mask = self.algorithm, scores.mask
        scores = replace(scores, selected=step.selected, baseline=step.baseline, group_size=step.group_size)
        ratio = log_ratio(scores, algorithm.ratio, anchor=self.surrogate.anchor, **self.ratio_options)
        per_token, flags = self.surrogate.function(ratio, scores, **self.options)
        per_token = per_token * step.weights
        moved = token_log_ratio(scores.logprobs.detach(), scores.old_logprobs, mask)
        metrics = surrogate_metrics(flags, moved, mask, tokens=step.tokens)
        if self.kl.value and algorithm.kl_placement == "loss":
            kl = self._kl(scores)
            per_token = per_token + self.kl.value * kl
            metrics["kl"] = aggregate(kl.detach(), mask, "token-mean", denominator=step.tokens)
        if self.entropy.value:
            assert scores.entropies is not None
            per_token = per_token - self.entropy.value * scores.entropies.masked_fill(~mask, 0.0)
        if scores.entropies is not None:
            metrics["learner/entropy"] = aggregate(
                scores.entropies.detach(), mask, "token-mean", denominator=step.tokens
            )
        if algorithm.correction != "none":
            kept = (step.weights > 0).to(ratio.dtype)
            metrics["sampling/importance_sampling_ratio/mean"] = aggregate(
                step.weights, mask, "token-mean", denominator=step.tokens
            )
            metrics["sampling/kept_mean"] = aggregate(kept, mask, "token-mean", denominator=step.tokens)
        loss = aggregate(per_token, mask, algorithm.aggregation, denominator=step.denominator)
        metrics["loss"] = loss.detach()
        return loss, metrics

    def _kl(self, scores: Scores) -> Tensor:
        if self.algorithm.kl_reference == "old":
            # The old policy sampled, so this estimates KL(old, new), and its expected slope is exact (PPO, section 4).
            moved = token_log_ratio(scores.logprobs, scores.old_logprobs, scores.mask)
            return moved.exp() - 1 - moved
        assert scores.ref_logprobs is not None
        a, mask = self.algorithm, scores.mask
        ratio = token_log_ratio(scores.logprobs, scores.old_logprobs, mask) if a.kl_importance else None
        return kl_penalty(scores.logprobs, scores.ref_logprobs, a.kl_estimator, mask=mask, log_ratio=ratio)

    def moved_kl(self, scores: Scores, logprobs: Tensor) -> float:
        """KL(old, new) in nats a token, for a policy with ``logprobs`` [L, T]."""
        return float(self._kl(replace(scores, logprobs=logprobs))[scores.mask].mean()) if scores.mask.any() else 0.0

    def reward_kl(self, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        """[L, T] what each token pays where the KL belongs to the reward: coefficient times estimate, in nats."""
        return self.kl.value * kl_penalty(old_logprobs, ref_logprobs, self.algorithm.kl_estimator, mask=mask)

    # -- between steps ------------------------------------------------------------------------------------------------

    def begin(self, entropies: Tensor) -> dict[str, float]:
        """Before a step: adapt the entropy bonus to the sampled tokens' ``entropies``; the coefficients in use."""
        if isinstance(self.entropy, TargetEntropy):
            self.entropy.update(float(entropies.mean()))
        used = {"kl_coef": self.kl.value if self.algorithm.kl_target else None}
        used["entropy_coef"] = self.entropy.value if self.algorithm.entropy_target else None
        return {name: value for name, value in used.items() if value is not None}

    def adapt(self, metrics: Mapping[str, float]) -> None:
        """After a step: adapt the KL coefficient to what it measured."""
        if isinstance(self.kl, ProportionalKL):
            self.kl.update(metrics["kl"], episodes=int(metrics["num_trajectories"]))
        elif isinstance(self.kl, PenaltyKL):
            self.kl.update(metrics["kl"])

    def state(self) -> dict[str, dict[str, float]]:
        """What a resumed run needs beside the weights."""
        return {"kl": self.kl.state(), "entropy": self.entropy.state()}

    def load_state(self, state: Mapping[str, dict[str, float]]) -> None:
        """Put ``state`` back."""
        self.kl.load(state["kl"])
        self.entropy.load(state["entropy"])

    # -- reading the configuration ------------------------------------------------------------------------------------

    def _options(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Arguments of the surrogate, of ``log_ratio``, and of the selection."""
        algorithm, key = self.algorithm, "algorithm.surrogate_options"
        function, select = self.surrogate.function, SELECTS.get(algorithm.surrogate)
        own = option_names(function)
        of_ratio = RATIO_OPTIONS if algorithm.ratio != "token" else ()
        of_select = [n for n in option_names(select) if n not in (*CLIPS, "generator")] if select else []
        given = dict(algorithm.surrogate_options)
        for name in given:
            if name in CLIPS:
                raise ConfigError(f"{key}.{name}: expected under algorithm.{name}, which is a key of its own.")
            if name not in (*own, *of_ratio, *of_select):
                raise UnknownName(f"option of {key}:", name, [*own, *of_ratio, *of_select])
        defaults = type(algorithm).model_fields
        for name in CLIPS:
            if name in own:
                given[name] = getattr(algorithm, name)
            elif name != "clip_high" and getattr(algorithm, name) != defaults[name].default:
                raise ConfigError(
                    f"algorithm.{name} is {getattr(algorithm, name)}, which the surrogate {algorithm.surrogate!r} does "
                    "not read: leave it out, or take another surrogate."
                )
        return (
            checked_options(key, function, {n: v for n, v in given.items() if n in own}),
            {n: v for n, v in given.items() if n in of_ratio},
            checked_options(key, select, {n: v for n, v in given.items() if n in of_select}, among=of_select)
            if select
            else {},
        )

    def _check(self) -> None:
        """Refuse choices that contradict one another."""
        a = self.algorithm
        if a.ratio not in self.surrogate.levels:
            raise ConfigError(
                f"algorithm.ratio is {a.ratio!r}, but the surrogate {a.surrogate!r} is defined for "
                f"{' and '.join(map(repr, self.surrogate.levels))}."
            )
        if a.correction != "none" and a.old_logprobs == "sampler":
            raise ConfigError(
                f"algorithm.correction is {a.correction!r}, which weighs the learner's old log-probs against the "
                'sampler\'s, but algorithm.old_logprobs is "sampler", so that they are the same: set it to "learner".'
            )
        if a.ratio != "token" and a.correction.startswith(("token", "decoupled")):
            raise ConfigError(
                f"algorithm.ratio is {a.ratio!r} and algorithm.correction {a.correction!r}: a ratio of whole segments "
                "needs a correction of whole sequences, as sequence_tis, sequence_mask or geometric_mask."
            )
        if a.surrogate in ("gmpo", "gvpo") and a.aggregation != "seq-mean-token-mean":
            raise ConfigError(
                f"algorithm.aggregation is {a.aggregation!r}, but {a.surrogate!r} is a loss of whole answers: expected "
                '"seq-mean-token-mean", which is their mean.'
            )
        if a.kl_target and not a.kl_coef:
            raise ConfigError(
                f"algorithm.kl_target is {a.kl_target}, but algorithm.kl_coef is 0: expected the coefficient to begin "
                "with, as 0.01."
            )
        if a.kl_reference == "old" and a.kl_placement == "reward":
            raise ConfigError(
                'algorithm.kl_reference is "old" and algorithm.kl_placement "reward": the policy has not moved from '
                'the old one when it is rewarded; expected the placement "loss".'
            )
        if a.surrogate == "gvpo" and a.kl_coef:
            raise ConfigError("gvpo has its own pull to the old policy (beta): set algorithm.kl_coef to 0.")

    def _rehearse(self) -> None:
        """Take the loss of two made-up tokens: options out of range are refused by the formulas that they belong to."""
        old, ones = torch.full((2, 1), -1.0), torch.ones(2, 1)
        scores = Scores(old, old, torch.tensor([[1.0], [-1.0]]), ones > 0, torch.zeros(2, 1).long(), ones, old, old)
        self.loss(scores, self.prepare(scores, torch.zeros(2).long(), torch.Generator()))

    def _coefficients(self) -> tuple[Adaptive, Adaptive]:
        a = self.algorithm
        kl: Adaptive = Adaptive(a.kl_coef)
        if a.kl_target:
            kind = PenaltyKL if a.kl_reference == "old" else ProportionalKL
            kl = kind(a.kl_coef, target=a.kl_target)
        entropy = Adaptive(a.entropy_coef)
        if a.entropy_target:
            entropy = TargetEntropy(a.entropy_coef, target=a.entropy_target)
        return kl, entropy
