"""The policy-gradient loss as independent choices: ratio, clip, KL, aggregation.

Index names: ``L`` leaves (one trajectory each), ``T`` tokens of the longest. ``mask`` is bool and True on policy
tokens only: prompt, tool results and padding enter no loss, gradient or metric. A loss is made in two steps, and an
algorithm is a choice for each:

1. a loss per token: ``policy_loss`` (``token_log_ratio``, then ``clipped_surrogate``), plus ``beta * kl_penalty`` for
   a KL term, times importance weights where the sampler is corrected for. All act elementwise on any shape, [L, T] or
   packed [M].
2. ``aggregate`` to one number. This needs [L, T], since a token's weight may depend on its trajectory.

**Denominators.** Every mode is a sum over tokens divided by one number, and that number belongs to the *optimizer
step*, not to the micro-batch that happens to be in memory: a mean of micro-batch means weighs a token by its
neighbours. So take ``loss_denominator`` of the whole step (it adds up over micro-batches and processes), pass it to
every ``aggregate``, and the micro-batch losses and gradients sum to those of the full batch.

Nothing here casts: float64 in, float64 out.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from agentrl.errors import ConfigError, TrainingError, UnknownName

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
KLEstimator = Literal["k1", "abs", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before ``exp``, as in verl: e^20 is 5e8. Beyond it the gradient is 0."""
MAX_K3 = 10.0
"""verl clamps k3 to +-10, so that one token cannot outweigh the batch. Beyond it the gradient is 0."""


def token_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``log pi(token) - log pi_old(token)``, clamped to +-20; 0 where masked.

    The mask comes first so that a masked token has exactly zero gradient even where its log-prob is -inf or NaN.

    Args:
        logprobs: [L, T] (or any shape) under the policy in training; carries the gradient.
        old_logprobs: same shape, under the policy that sampled; no gradient flows into it.
        mask: same shape, bool.

    Returns:
        Same shape.
    """
    difference = (logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's clipped objective as a loss per token, ``max(-A rho, -A clip(rho, 1 - low, 1 + high))``.

    Schulman et al. 2017 (arXiv:1707.06347, equation 7). ``clip_high > clip_low`` is DAPO's clip-higher
    (arXiv:2503.14476, section 3.1). Dual clip (Ye et al. 2020, arXiv:1912.09729) bounds the loss of a token with A < 0
    by ``-A * dual_clip``, unbounded otherwise. TRL's ``delta``, where above ``1 + clip_high``, is the same.

    Args:
        log_ratio: [L, T] (or any shape).
        advantages: broadcasts against ``log_ratio``.
        clip_low: how far below 1 the ratio may fall, 0.2 in GRPO and DAPO.
        clip_high: how far above 1 it may rise, 0.2 in GRPO, 0.28 in DAPO.
        dual_clip: above 1 (3.0 in verl), or None for none.

    Returns:
        Same shape as ``log_ratio``.

    Raises:
        ConfigError: ``dual_clip`` is not above 1.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ConfigError(f"dual_clip: expected a ratio above 1 (3.0 is usual) or none, got {dual_clip}.")
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    tokens: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The token-level clipped loss of GRPO and DAPO, not yet aggregated, and how often it was clipped.

    GRPO (arXiv:2402.03300) is clip 0.2/0.2 with ``aggregate(..., "seq-mean-token-mean")``; DAPO (arXiv:2503.14476) is
    clip 0.2/0.28 with ``"token-mean"``. See ``token_log_ratio`` and ``clipped_surrogate`` for the formula.

    Args:
        logprobs: [L, T] or packed [M], under the policy in training.
        old_logprobs: same shape, under the policy that sampled.
        advantages: [L], the same for all tokens of a leaf, or the shape of ``logprobs``.
        mask: same shape as ``logprobs``, bool, True on policy tokens.
        clip_low: see ``clipped_surrogate``.
        clip_high: see ``clipped_surrogate``.
        dual_clip: see ``clipped_surrogate``.
        tokens: policy tokens of the whole step, so that the metrics of its micro-batches add up; default: of ``mask``.

    Returns:
        The loss of each token, shaped as ``logprobs``, 0 where masked; and the metrics of ``clip_metrics``.

    Raises:
        ConfigError: ``dual_clip`` is not above 1.
    """
    if advantages.dim() < logprobs.dim():
        advantages = advantages.unsqueeze(-1)
    log_ratio = token_log_ratio(logprobs, old_logprobs, mask)
    loss = clipped_surrogate(log_ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    metrics = clip_metrics(
        log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, tokens=tokens
    )
    return loss.masked_fill(~mask, 0.0), metrics


@torch.no_grad()
def clip_metrics(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    tokens: float | None = None,
) -> dict[str, Tensor]:
    """How far the policy has moved, as means over policy tokens under TRL's names.

    ``clip_ratio/low_mean``: share with A < 0 and ratio below the lower bound. ``clip_ratio/high_mean``: A > 0, above
    the upper bound. ``clip_ratio/region_mean``: either; these tokens have no gradient (verl's ``pg_clipfrac``).
    ``clip_ratio/dual_mean`` (only with ``dual_clip``): A < 0, above ``dual_clip``; no gradient either.
    ``approx_kl``: mean of ``log pi_old - log pi``, in nats; 0 on policy (verl's ``ppo_kl``).

    Args:
        log_ratio: [L, T] (or any shape).
        advantages: broadcasts against ``log_ratio``.
        mask: same shape as ``log_ratio``, bool.
        clip_low: see ``clipped_surrogate``.
        clip_high: see ``clipped_surrogate``.
        dual_clip: see ``clipped_surrogate``.
        tokens: what to divide by; default: the policy tokens of ``mask``.

    Returns:
        Scalars on the device of ``log_ratio``, without gradient.
    """
    ratio = log_ratio.exp()
    low = (advantages < 0) & (ratio < 1 - clip_low)
    high = (advantages > 0) & (ratio > 1 + clip_high)
    shares = {"low": low, "high": high, "region": low | high}
    if dual_clip is not None:
        shares["dual"] = (advantages < 0) & (ratio > dual_clip)
    per_token = {f"clip_ratio/{name}_mean": flag.to(ratio.dtype) for name, flag in shares.items()}
    per_token["approx_kl"] = -log_ratio
    return {name: aggregate(values, mask, "token-mean", denominator=tokens) for name, values in per_token.items()}


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """An estimate of KL(pi || pi_ref) from one sampled token (Schulman 2020, joschu.net/blog/kl-approx.html).

    With ``d = log pi_ref - log pi``: ``k1`` is ``-d`` (unbiased, high variance, negative at times), ``abs`` is ``|d|``,
    ``k2`` is ``d^2 / 2`` (biased, low variance), ``k3`` is ``exp(d) - d - 1`` (unbiased, never negative; GRPO's term,
    verl's ``low_var_kl``). For k3, as in verl, ``d`` is clamped to +-20 and the result to 10.

    As a *loss term* the estimators differ more than as numbers: on policy the expected gradient of k1 is 0, that of k2
    is the gradient of KL(pi || pi_ref), and that of k3 is the gradient of KL(pi_ref || pi).

    Args:
        logprobs: [L, T] (or any shape), under the policy in training; carries the gradient.
        ref_logprobs: same shape, under the reference policy; no gradient flows into it.
        estimator: "k1", "abs", "k2" or "k3".

    Returns:
        Same shape, in nats, not masked: hold finite numbers in the padding, as 0 x NaN is NaN in a gradient.

    Raises:
        UnknownName: no such estimator.
    """
    difference = ref_logprobs.detach() - logprobs
    match estimator:
        case "k1":
            return -difference
        case "abs":
            return difference.abs()
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return (difference.exp() - difference - 1).clamp(-MAX_K3, MAX_K3)
    raise UnknownName("KL estimator", estimator, get_args(KLEstimator))


def loss_denominator(mask: Tensor, mode: Aggregation, *, max_tokens: int | None = None) -> float:
    """What ``aggregate`` divides by in ``mode``; over the parts of a step it adds up to that of the whole.

    Args:
        mask: [L, T] bool.
        mode: see ``aggregate``.
        max_tokens: Dr.GRPO's constant length, the token budget of an answer; "seq-mean-token-sum-norm" only.

    Returns:
        Policy tokens for "token-mean"; trajectories with at least one policy token for "seq-mean-token-mean" and
        "seq-mean-token-sum"; the same times ``max_tokens`` for "seq-mean-token-sum-norm".

    Raises:
        UnknownName: no such mode.
        ConfigError: "seq-mean-token-sum-norm" without ``max_tokens``.
    """
    if mode not in get_args(Aggregation):
        raise UnknownName("aggregation", mode, get_args(Aggregation))
    if mode == "token-mean":
        return float(mask.sum().item())
    sequences = float(mask.any(dim=-1).sum().item())
    if mode != "seq-mean-token-sum-norm":
        return sequences
    if max_tokens is None:
        raise ConfigError(
            "seq-mean-token-sum-norm divides by a constant length: expected max_tokens (the budget of an answer) or an "
            "explicit denominator, got neither. (The padded length would tie the loss to the batch's longest answer.)"
        )
    return sequences * max_tokens


def aggregate(values: Tensor, mask: Tensor, mode: Aggregation, *, denominator: float | None = None) -> Tensor:
    """One number from a loss per token. The names are verl's.

    ==========================  =====================================  =============================================
    mode                        loss                                   who
    ==========================  =====================================  =============================================
    "token-mean"                sum_it v / sum_i len_i                 DAPO (arXiv:2503.14476, section 3.3): long
                                                                       answers weigh more
    "seq-mean-token-mean"       sum_i (sum_t v / len_i) / sequences    GRPO (arXiv:2402.03300): every answer weighs
                                                                       the same, so tokens of long ones weigh less
    "seq-mean-token-sum"        sum_it v / sequences                   the policy gradient as such
    "seq-mean-token-sum-norm"   sum_it v / constant                    Dr.GRPO (arXiv:2503.20783): the same up to a
                                                                       constant, so steps compare across lengths
    ==========================  =====================================  =============================================

    ``len_i`` counts the policy tokens of a trajectory; ``sequences`` counts those that have any, as verl does, so that
    overlong filtering removes a trajectory instead of mixing a zero into the mean (TRL counts all rows).

    Args:
        values: [L, T] ("token-mean" takes any shape); masked entries may hold anything.
        mask: same shape, bool.
        mode: see above.
        denominator: that of the whole step, from ``loss_denominator``, in gradient accumulation; default: of ``mask``.

    Returns:
        A scalar. A mask without a token gives 0 with a zero gradient.

    Raises:
        UnknownName: no such mode.
        ConfigError: no ``denominator`` in "seq-mean-token-sum-norm".
        TrainingError: ``denominator`` is not above 0, as when filters left a step without tokens.
    """
    if denominator is None:
        denominator = max(loss_denominator(mask, mode), 1.0)
    elif mode not in get_args(Aggregation):
        raise UnknownName("aggregation", mode, get_args(Aggregation))
    if denominator <= 0:
        raise TrainingError(
            f"loss denominator: expected a count above 0, got {denominator}; a step without policy tokens has to be "
            "refilled or skipped before its loss is taken."
        )
    values = values.masked_fill(~mask, 0.0)
    if mode == "seq-mean-token-mean":
        values = values / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return values.sum() / denominator


def mask_overlong(mask: Tensor, truncated: Tensor) -> Tensor:
    """DAPO's overlong filtering (arXiv:2503.14476, section 3.4): a cut-off answer says nothing about its quality.

    Args:
        mask: [L, T] bool.
        truncated: [L] bool, True where the token budget ended the trajectory.

    Returns:
        [L, T] bool: ``mask``, all False in the truncated rows.
    """
    return mask & ~truncated.unsqueeze(-1)
