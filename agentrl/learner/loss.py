"""The parts of a policy-gradient loss that every algorithm shares: ratio, KL, value loss, aggregation.

Index names: ``L`` leaves (one trajectory each), ``T`` tokens of the longest. ``mask`` is bool and True on policy
tokens only: prompt, tool results and padding enter no loss, gradient or metric. A loss is made in four steps, and an
algorithm is a choice for each:

1. ``log_ratio``: how far the policy in training is from the one that sampled, per token, turn or sequence.
2. a surrogate (``surrogate.py``): a loss per token from ratio and advantage; times the weights of ``correction.py``
   where the sampler is corrected for.
3. plus ``beta * kl_penalty`` for a KL term.
4. ``aggregate`` to one number.

**Denominators.** Every mode is a sum over tokens divided by one number, and that number belongs to the *optimizer
step*, not to the micro-batch that happens to be in memory: a mean of micro-batch means weighs a token by its
neighbours. So take ``loss_denominator`` of the whole step (it adds up over micro-batches and processes), pass it to
every ``aggregate``, and the micro-batch losses and gradients sum to those of the full batch. Whatever else a surrogate
needs from its neighbours (a selection of tokens, a group's mean) is likewise computed once for the whole step and
handed in through ``Scores``.

Nothing here casts: float64 in, float64 out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from agentrl.errors import ConfigError, TrainingError, UnknownName

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
KLEstimator = Literal["k1", "abs", "k2", "k3", "k1+", "k3+"]
Level = Literal["token", "turn", "sequence"]
Anchor = Literal["old", "sampler"]
Reduction = Literal["mean", "sum"]
RatioGradient = Literal["token", "segment"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before ``exp``, as in verl: e^20 is 5e8. Beyond it the gradient is 0."""
MAX_SEGMENT_LOG_RATIO = 10.0
"""Log-ratios of turns and sequences are clamped to at most 10, as in verl's GSPO. Beyond it the gradient is 0."""
MAX_K3 = 10.0
"""verl clamps k3 to +-10, so that one token cannot outweigh the batch. Beyond it the gradient is 0."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a surrogate may look at: log-probs and advantages of a micro-batch, on its [L, T] layout.

    Masked entries may hold anything, NaN included. Only ``logprobs`` carries a gradient into a policy loss.

    Attributes:
        logprobs: [L, T] under the policy in training.
        old_logprobs: [L, T] under the policy at the start of the step: the usual denominator of the ratio.
        advantages: [L, T].
        mask: [L, T] bool, True on policy tokens.
        turn: [L, T] int64, index of the policy turn a token belongs to, -1 elsewhere; for the ratio per turn.
        entropies: [L, T] of the current policy, in nats.
        sampled_logprobs: [L, T] as the sampler reported them.
        ref_logprobs: [L, T] under the reference policy of a KL term.
        selected: [L, T] bool, tokens picked over the whole step (``selection.select_clip_cov``, ``select_kl_cov``).
        baseline: [L] what a surrogate subtracts per trajectory (``selection.group_baseline``).
        group_size: [L] number of trajectories in the group of each, as given by ``selection.group_baseline``.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    turn: Tensor | None = None
    entropies: Tensor | None = None
    sampled_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    selected: Tensor | None = None
    baseline: Tensor | None = None
    group_size: Tensor | None = None


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


def log_ratio(
    scores: Scores,
    level: Level = "token",
    *,
    anchor: Anchor = "old",
    reduce: Reduction = "mean",
    gradient: RatioGradient = "token",
) -> Tensor:
    """The log of the importance ratio a surrogate works with, for every token.

    "token" is PPO's ``d_t = log pi - log pi_anchor``. "sequence" is GSPO's length-normalised ratio (Zheng et al. 2025,
    arXiv:2507.18071), ``s_i = exp(mean_t d_t)``, the same for all tokens of the trajectory; "turn" the same within each
    policy turn (Tree-GRPO, arXiv:2509.21240). ``gradient`` says what is differentiated:

    - "token" is GSPO-token, ``s_it = sg(s_i) exp(log pi_t - sg(log pi_t))``: a token's loss moves that token alone, so
      advantages may differ within the segment.
    - "segment" differentiates the mean itself, so a token's loss moves its whole segment (Tree-GRPO's and TRL's code).
      Where advantage and weight are constant in a segment, both give the same sum of gradients.

    ``reduce="sum"`` is the ratio of whole segments, ``prod_t rho_t``, as in TRL's RLOO. That one wants
    ``gradient="segment"``; the token form would be its derivative divided by the length.

    Args:
        scores: needs ``turn`` for "turn", ``sampled_logprobs`` for ``anchor="sampler"``.
        level: "token", "turn" or "sequence".
        anchor: the ratio's denominator, the policy at the start of the step or the sampler.
        reduce: "mean" or "sum"; turns and sequences only.
        gradient: see above; turns and sequences only.

    Returns:
        [L, T], 0 where masked; clamped to +-20 per token and to at most 10 per turn or sequence.

    Raises:
        UnknownName: no such level, anchor, reduction or gradient.
        ConfigError: a tensor that is needed is missing, a policy token has no turn, or ``reduce`` or ``gradient`` is
            given for tokens.
    """
    for kind, value, known in (
        ("ratio level", level, Level),
        ("ratio anchor", anchor, Anchor),
        ("ratio reduction", reduce, Reduction),
        ("ratio gradient", gradient, RatioGradient),
    ):
        if value not in get_args(known):
            raise UnknownName(kind, value, get_args(known))
    denominator = scores.old_logprobs if anchor == "old" else scores.sampled_logprobs
    if denominator is None:
        raise ConfigError("ratio anchor 'sampler': expected Scores.sampled_logprobs, got none.")
    per_token = token_log_ratio(scores.logprobs, denominator, scores.mask)
    if level == "token":
        if (reduce, gradient) != ("mean", "token"):
            raise ConfigError(
                f"ratio level 'token' has no segments: expected reduce 'mean' and gradient 'token' (the defaults), got "
                f"{reduce!r} and {gradient!r}; take level 'turn' or 'sequence' for them."
            )
        return per_token
    index = _segment_index(scores, level)
    count = int(index.max()) + 1 if level == "turn" and index.numel() else 1
    segments = per_token.new_zeros(len(index), count)
    total = segments.scatter_add(-1, index, per_token)
    if reduce == "mean":
        total = total / segments.scatter_add(-1, index, scores.mask.to(per_token.dtype)).clamp(min=1)
    spread = total.gather(-1, index).masked_fill(~scores.mask, 0.0)
    if gradient == "token":
        moving = scores.logprobs.masked_fill(~scores.mask, 0.0)
        spread = spread.detach() + (moving - moving.detach())
    return spread.clamp(max=MAX_SEGMENT_LOG_RATIO)


def _segment_index(scores: Scores, level: Level) -> Tensor:
    """[L, T] int64, the segment each token is summed into; 0 where masked."""
    if level == "sequence":
        return torch.zeros_like(scores.mask, dtype=torch.int64)
    if scores.turn is None:
        raise ConfigError("ratio level 'turn': expected Scores.turn, got none.")
    if bool((scores.mask & (scores.turn < 0)).any()):
        raise ConfigError("ratio level 'turn': expected a turn of 0 or above for every policy token, got -1.")
    return scores.turn.masked_fill(~scores.mask, 0)


@torch.no_grad()
def surrogate_metrics(
    flags: dict[str, Tensor], log_ratio: Tensor, mask: Tensor, *, tokens: float | None = None
) -> dict[str, Tensor]:
    """How far the policy has moved and how often that was limited, as means over policy tokens.

    ``clip_ratio/<flag>_mean`` is the share of tokens with that flag; the names ``low``, ``high`` and ``region`` are
    TRL's, and ``region`` is verl's ``pg_clipfrac``. ``approx_kl`` is the mean of ``log pi_old - log pi``, in nats; 0 on
    policy (verl's ``ppo_kl``).

    Args:
        flags: as returned by a surrogate, [L, T] (or any shape) each.
        log_ratio: same shape, per token.
        mask: same shape, bool.
        tokens: policy tokens of the whole step, so that its micro-batches add up; default: of ``mask``.

    Returns:
        Scalars on the device of ``log_ratio``, without gradient.
    """
    per_token = {f"clip_ratio/{name}_mean": flag.to(log_ratio.dtype) for name, flag in flags.items()}
    per_token["approx_kl"] = -log_ratio
    return {name: aggregate(values, mask, "token-mean", denominator=tokens) for name, values in per_token.items()}


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: KLEstimator,
    *,
    mask: Tensor | None = None,
    log_ratio: Tensor | None = None,
) -> Tensor:
    """An estimate of KL(pi || pi_ref) from one sampled token (Schulman 2020, joschu.net/blog/kl-approx.html).

    With ``d = log pi_ref - log pi``: ``k1`` is ``-d`` (unbiased, high variance, negative at times), ``abs`` is ``|d|``,
    ``k2`` is ``d^2 / 2`` (biased, low variance), ``k3`` is ``exp(d) - d - 1`` (unbiased, never negative; GRPO's term,
    verl's ``low_var_kl``). For k3, as in verl, ``d`` is clamped to +-20 and the result to 10.

    As a *loss term* the estimators differ more than as numbers: on policy the expected gradient of k1 is 0, that of k2
    is the gradient of KL(pi || pi_ref), and that of k3 is the gradient of KL(pi_ref || pi). ``k1+`` and ``k3+`` have
    the value of k1 and k3 and the gradient of k2; verl documents them, and its code refuses them.

    Off policy every one of them is an estimate for the policy that sampled. ``log_ratio`` corrects it, ``rho * k``,
    gradient through both factors (DeepSeek-V3.2, arXiv:2512.02556; TRL's ``use_bias_correction_kl``): with k3 the
    expected gradient is then that of KL(pi || pi_ref).

    Args:
        logprobs: [L, T] (or any shape), under the policy in training; carries the gradient.
        ref_logprobs: same shape, under the reference policy; no gradient flows into it.
        estimator: "k1", "abs", "k2", "k3", "k1+" or "k3+".
        mask: same shape, bool; where False the value and its gradient are exactly 0, whatever stands there. Default:
            none masked; then hold finite numbers in the padding, as 0 x NaN is NaN in a gradient.
        log_ratio: same shape, from ``log_ratio``; default: no correction.

    Returns:
        Same shape, in nats.

    Raises:
        UnknownName: no such estimator.
    """
    if estimator not in get_args(KLEstimator):
        raise UnknownName("KL estimator", estimator, get_args(KLEstimator))
    difference = ref_logprobs.detach() - logprobs
    if mask is not None:
        difference = difference.masked_fill(~mask, 0.0)
    match estimator.removesuffix("+"):
        case "k1":
            value = -difference
        case "abs":
            value = difference.abs()
        case "k2":
            value = 0.5 * difference.square()
        case _:
            bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            value = (bounded.exp() - bounded - 1).clamp(-MAX_K3, MAX_K3)
    if estimator.endswith("+"):
        gradient_of = 0.5 * difference.square()
        value = value.detach() + (gradient_of - gradient_of.detach())
    return value if log_ratio is None else value * log_ratio.exp()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A critic's loss per token, ``1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)``, as in verl.

    The clip keeps the critic near its values at the start of the step, as PPO's keeps the policy. Older copies of verl
    (ARPO's) lack the 1/2.

    Args:
        values: [L, T] (or any shape), the critic in training; carries the gradient.
        old_values: same shape, the critic at the start of the step.
        returns: same shape, what the values should be (advantage + old value, before whitening).
        mask: same shape, bool.
        clip: how far a value may move, in units of reward (0.5 in verl); default: no clip.

    Returns:
        Same shape, 0 with zero gradient where masked; and ``{"clip": bool}``, where the clipped term was the larger.

    Raises:
        ConfigError: ``clip`` is not above 0.
    """
    if clip is not None and clip <= 0:
        raise ConfigError(f"value clip: expected a distance above 0 (0.5 is usual) or none, got {clip}.")
    values, old_values, returns = (t.masked_fill(~mask, 0.0) for t in (values, old_values.detach(), returns.detach()))
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error, {"clip": torch.zeros_like(mask)}
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return 0.5 * torch.maximum(error, clipped), {"clip": mask & (clipped > error)}


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
