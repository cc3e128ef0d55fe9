"""Corrections for a sampler that is not the learner: weights [L, T] on the loss, from their log-ratio.

Sampler and learner disagree even with the same weights (kernels, dtypes, batch shapes), and the more so when the
sampler's weights are older. With ``d = log pi_old - log pi_sampler`` per token, both of the *start* of the step, a
correction is a weight that multiplies the surrogate's loss and carries no gradient: an importance weight, bounded, or a
1 or 0 that keeps or rejects. The surrogate's own ratio then divides by ``old_logprobs`` of the learner, not of the
sampler, or the same gap would be corrected twice.

The denominators of the loss stay those of the original mask (as in AReaL, where else a rejected token would raise the
weight of the others); several corrections multiply.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from agentrl.config import CorrectionKind
from agentrl.errors import ConfigError, UnknownName
from agentrl.learner.loss import MAX_LOG_RATIO

BOUNDS: dict[str, tuple[float, float]] = {
    "token_tis": (0.0, 2.0),
    "sequence_tis": (0.0, 2.0),
    "token_mask": (0.5, 5.0),
    "sequence_mask": (0.0, 3.0),
    "geometric_mask": (0.999, 1.001),
    "decoupled": (0.0, math.inf),
    "seq_sum_k1": (0.5, 2.0),
    "seq_mean_k1": (0.999, 1.001),
    "seq_mean_k3": (0.0, 0.01),
}
"""Published ``low`` and ``high`` of each kind that has any: verl's presets, IcePop's paper, TRL's ``sequence_mask``."""


@torch.no_grad()
def sampler_correction(
    kind: CorrectionKind,
    log_ratio: Tensor,
    mask: Tensor,
    *,
    low: float | None = None,
    high: float | None = None,
    normalize: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights for the loss from ``d = log pi_old - log pi_sampler``.

    ==================  =============================================  ================================================
    kind                weight of a token                              who
    ==================  =============================================  ================================================
    "token_tis"         exp(d), clamped to [low, high]                 truncated importance sampling (Yao et al. 2025)
    "sequence_tis"      exp(sum d), clamped to [low, high]             the same, unbiased but for the truncation
    "geometric_tis"     exp(mean d), clamped to [low, high]            AReaL's "sequence"; goes with GMPO (verl)
    "token_mask"        exp(d) within [low, high], else 0              IcePop (arXiv:2510.18855), MIS of slime
    "sequence_mask"     exp(sum d) within [low, high], else 0          TRL's default (high 3)
    "geometric_mask"    1 where exp(mean d) in [low, high], else 0     geometric rejection: no length trap
    "decoupled"         exp(d) up to high, else 0; default all         decoupled PPO (AReaL, arXiv:2505.24298): the
                                                                       surrogate's ratio is to the learner of the start
                                                                       of the step ("proximal"), this one to the sampler
    "<level>_<k>"       1 where the divergence is in bounds, else 0    verl's rejection masks
    ==================  =============================================  ================================================

    verl's masks estimate KL(pi_sampler, pi_old) per token: ``k1 = -d``, ``k2 = d^2 / 2``, ``k3 = exp(d) - 1 - d``; the
    level is "token", or "seq_sum", "seq_mean", "seq_max" over a trajectory, which is then rejected whole. k2 and k3
    must not exceed ``high``, in nats. k1 has bounds on ``exp(k1)``, which is pi_sampler / pi_old: the *reciprocal* of
    the ratio in "geometric_mask", otherwise the same as "seq_mean_k1".

    Args:
        kind: see above.
        log_ratio: d, [L, T]; masked entries may hold anything. Clamped to +-20, sums too.
        mask: [L, T] bool.
        low: default: that of ``BOUNDS``; where ``high`` is given, 0, and 1 / high for k1, as in verl. k2 and k3 have
            none.
        high: default: that of ``BOUNDS``, where the kind has one.
        normalize: divide importance weights by their mean over tokens (token kinds) or over the means of trajectories
            (the others), as verl's ``rollout_is_batch_normalize``. Then ``log_ratio`` has to be of the whole step.

    Returns:
        Weights [L, T], 0 where masked, without gradient; and flags [L, T] bool, ``low`` and ``high``: tokens beyond the
        bound.

    Raises:
        UnknownName: no such kind.
        ConfigError: a kind without published bounds and no ``high``; ``low`` for k2 or k3, or not below ``high``; or
            ``normalize`` with a kind that only keeps or rejects.
    """
    if kind not in get_args(CorrectionKind):
        raise UnknownName("sampler correction", kind, get_args(CorrectionKind))
    rejects = kind == "geometric_mask" or kind[-2:] in ("k1", "k2", "k3")
    if rejects and normalize:
        raise ConfigError(f"correction {kind!r} has weights of 0 and 1: expected normalize False, got True.")
    low, high = _bounds(kind, low, high)
    d = log_ratio.masked_fill(~mask, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    measure = _divergence(kind, d, mask) if rejects else _weight(kind, d, mask)
    below, above = mask & (measure < low), mask & (measure > high)
    if rejects:
        weights = torch.ones_like(d).masked_fill(below | above, 0.0)
    elif kind.endswith("tis"):
        weights = measure.clamp(low, high)
    else:
        weights = measure.masked_fill(below | above, 0.0)
    weights = weights.masked_fill(~mask, 0.0)
    if normalize:
        by_sequence = kind.startswith(("sequence", "geometric"))
        weights = weights / _mean(weights, mask, by_sequence=by_sequence).clamp(min=1e-8)
    return weights, {"low": below, "high": above}


@torch.no_grad()
def opsm_mask(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, delta: float) -> Tensor:
    """Off-policy sequence masking: 0 where A < 0 and the trajectory has become unlikely, else 1.

    DeepSeek-V3.2 (arXiv:2512.02556); slime's ``opsm``, TRL's ``off_policy_mask_threshold``. A trajectory has become
    unlikely where ``mean_t (log pi_sampler - log pi) > delta``: an answer that was bad and that the policy has left is
    not pushed down further. The sign is each token's own.

    Args:
        log_ratio: [L, T], ``log pi - log pi_sampler``, of the policy in training (not of the start of the step).
        advantages: [L, T].
        mask: [L, T] bool.
        delta: nats a token.

    Returns:
        [L, T] in the dtype of ``log_ratio``, 0 where masked.

    Raises:
        ConfigError: ``delta`` is below 0.
    """
    if not delta >= 0:
        raise ConfigError(f"opsm delta: expected 0 or more nats a token, got {delta:g}.")
    gap = -_row(log_ratio.masked_fill(~mask, 0.0), mask, "mean")
    return (mask & ~((advantages < 0) & (gap > delta))).to(log_ratio.dtype)


def _bounds(kind: str, low: float | None, high: float | None) -> tuple[float, float]:
    one_sided = kind.endswith(("k2", "k3"))
    if one_sided and low is not None:
        raise ConfigError(f"correction {kind!r} has an upper bound only: expected no low, got {low:g}.")
    usual = BOUNDS.get(kind)
    if high is None:
        if usual is None:
            raise ConfigError(f"correction {kind!r} has no published bounds: expected high, got none.")
        low, high = usual[0] if low is None else low, usual[1]
    elif low is None:
        low = 1 / high if kind.endswith("k1") and high else 0.0
    if not 0 <= low < high:
        raise ConfigError(f"correction {kind!r}: expected 0 <= low < high, got {low:g} and {high:g}.")
    return low, high


def _weight(kind: str, d: Tensor, mask: Tensor) -> Tensor:
    if kind.startswith("sequence"):
        d = _row(d, mask, "sum").clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    elif kind.startswith("geometric"):
        d = _row(d, mask, "mean")
    return d.exp()


def _divergence(kind: str, d: Tensor, mask: Tensor) -> Tensor:
    """[L, T], the quantity that a rejection compares with its bounds."""
    if kind == "geometric_mask":
        return _row(d, mask, "mean").exp()
    level, _, estimator = kind.rpartition("_")
    value = -d if estimator == "k1" else 0.5 * d.square() if estimator == "k2" else d.exp() - 1 - d
    if level != "token":
        value = _row(value, mask, level.removeprefix("seq_"))
    return value.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() if estimator == "k1" else value


def _row(values: Tensor, mask: Tensor, how: str) -> Tensor:
    """[L, T], a trajectory's sum, mean or largest; ``values`` are 0 where masked and, for "max", never negative."""
    if how == "max":
        return values.amax(-1, keepdim=True).expand_as(values)
    total = values.sum(-1, keepdim=True)
    return (total if how == "sum" else total / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(values)


def _mean(weights: Tensor, mask: Tensor, *, by_sequence: bool) -> Tensor:
    if by_sequence:
        return _row(weights, mask, "mean")[:, 0].sum() / mask.any(-1).sum().clamp(min=1)
    return weights.sum() / mask.sum().clamp(min=1)
