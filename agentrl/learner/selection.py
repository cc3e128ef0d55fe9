"""What a surrogate or a filter needs from the whole optimizer step: selections of tokens, and baselines of groups.

Computed once, before the step is cut into micro-batches, from tensors of all its rows and without gradient; then cut
along with them. That is why a micro-batch's size changes nothing. Index names as in ``loss.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from agentrl.errors import ConfigError
from agentrl.learner.loss import Scores


@torch.no_grad()
def select_clip_cov(
    log_ratio: Tensor,
    scores: Scores,
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The tokens that Clip-Cov takes out of the step, drawn at random (Cui et al. 2025, arXiv:2505.22617).

    A token's covariance is ``(A - mean A)(lp - mean lp)`` over the policy tokens of the step; entropy falls through
    tokens where it is large. Out of those within ``(low, high)`` that the clip leaves a gradient, ``fraction`` of all
    policy tokens is drawn, at least one. verl draws per micro-batch.

    Args:
        log_ratio: [L, T] of the whole step, level "token".
        scores: of the whole step.
        fraction: of all policy tokens; 2e-4 in the paper.
        low: lower bound of the covariance.
        high: upper bound.
        clip_low: the clip's, see ``surrogate.clip``.
        clip_high: the clip's.
        generator: on the CPU; default: torch's global one.

    Returns:
        [L, T] bool, for ``Scores.selected``.

    Raises:
        ConfigError: ``fraction`` is not in (0, 1], or ``low`` is not below ``high``.
    """
    _check_fraction("clip_cov fraction", fraction)
    if low >= high:
        raise ConfigError(f"clip_cov: expected low below high (1 and 5), got {low:g} and {high:g}.")
    ratio, covariance, selected = log_ratio.exp(), _covariance(scores), torch.zeros_like(scores.mask)
    falls = (scores.advantages < 0) & (ratio < 1 - clip_low)
    rises = (scores.advantages > 0) & (ratio > 1 + clip_high)
    candidates = (scores.mask & ~falls & ~rises & (covariance > low) & (covariance < high)).nonzero()
    count = max(int(fraction * int(scores.mask.sum())), 1)
    drawn = candidates[torch.randperm(len(candidates), generator=generator)[:count].to(candidates.device)]
    selected[drawn[:, 0], drawn[:, 1]] = True
    return selected


@torch.no_grad()
def select_kl_cov(scores: Scores, *, fraction: float = 2e-4) -> Tensor:
    """The tokens that KL-Cov penalises: those of the largest covariance, see ``select_clip_cov``.

    Args:
        scores: of the whole step.
        fraction: of all policy tokens, at least one; 2e-4 for a 32B model in the paper, 2e-3 for 7B.

    Returns:
        [L, T] bool, for ``Scores.selected``.

    Raises:
        ConfigError: ``fraction`` is not in (0, 1].
    """
    _check_fraction("kl_cov fraction", fraction)
    places, selected = scores.mask.nonzero(), torch.zeros_like(scores.mask)
    if len(places):
        largest = _covariance(scores)[scores.mask].topk(max(1, int(len(places) * fraction))).indices
        selected[places[largest, 0], places[largest, 1]] = True
    return selected


@torch.no_grad()
def top_entropy_mask(entropies: Tensor, mask: Tensor, *, fraction: float = 0.2) -> Tensor:
    """The most uncertain tokens of the step, to be learnt from alone (Wang et al. 2025, arXiv:2506.01939).

    Those at or above the ``1 - fraction`` quantile of the entropies, as TRL's ``top_entropy_quantile``. The loss of the
    others is 0, but the denominator stays that of all policy tokens: multiply the loss, do not narrow the mask.

    Args:
        entropies: [L, T] of the whole step, in nats.
        mask: [L, T] bool.
        fraction: of the policy tokens; 0.2 in the paper.

    Returns:
        [L, T] bool, False where masked.

    Raises:
        ConfigError: ``fraction`` is not in (0, 1].
    """
    _check_fraction("top_entropy fraction", fraction)
    values = entropies[mask]
    if not len(values):
        return torch.zeros_like(mask)
    # The quantile lies between two neighbours in order; what is at or above it is at or above the upper one. Taken from
    # the sorted values because torch.quantile refuses more than 16 million.
    upper = math.ceil((1 - fraction) * (len(values) - 1) - 1e-9)
    return mask & (entropies >= values.sort().values[upper])


@torch.no_grad()
def group_baseline(log_ratio: Tensor, mask: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """GVPO's mean over a group of ``sum_t d``, and the sizes of the groups.

    Args:
        log_ratio: [L, T] of the whole step, level "token".
        mask: [L, T] bool.
        group: [L] int64, equal numbers are one group.

    Returns:
        ``Scores.baseline`` [L], in nats, and ``Scores.group_size`` [L] int64.
    """
    total = log_ratio.masked_fill(~mask, 0.0).sum(-1)
    _, index, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    means = total.new_zeros(len(sizes)).scatter_add(0, index, total) / sizes
    return means[index], sizes[index]


def _covariance(scores: Scores) -> Tensor:
    """[L, T], a token's part in the covariance of advantage and log-prob over the policy tokens of ``scores``."""
    count = scores.mask.sum().clamp(min=1)
    a, b = (t.detach().masked_fill(~scores.mask, 0.0) for t in (scores.advantages, scores.logprobs))
    return (a - a.sum() / count) * (b - b.sum() / count)


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{name}: expected a share of the tokens above 0 and at most 1, got {value:g}.")
