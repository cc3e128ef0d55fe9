"""Surrogates: what importance ratio and advantage become as a loss per token, one function per published form.

Each takes ``log_ratio`` (from ``loss.log_ratio``, at the level of one's choice) and ``Scores``, and gives a loss [L, T]
and flags {name: [L, T] bool} for ``loss.surrogate_metrics``. A masked token's loss and gradient are exactly 0, whatever
its entries hold. ``SURROGATES`` has them by name, with what each needs and which ratio its paper takes.

Notation: ``d`` log-ratio, ``rho = exp(d)``, ``A`` advantage, ``p`` probability of the token, ``sg`` stop-gradient,
``lp`` log-prob under the policy in training. On policy (rho = 1) the gradient of every surrogate but GVPO's is
``-A grad lp``, save on tokens that Clip-Cov takes out: they differ in what becomes of a token that has moved.

Two kinds stand apart:

- GMPO and GVPO are losses of a whole trajectory. The same value stands at each of its tokens, so that aggregation
  "seq-mean-token-mean" gives the mean over trajectories; no other mode does.
- Clip-Cov, KL-Cov and GVPO need numbers of the whole step: ``selection.py`` computes them once, without gradient, so
  that micro-batches change nothing.

Two published algorithms are no surrogate of their own: GSPO is ``clip`` at level "sequence", and LUSPO (GSPO's loss of
a trajectory times its length) is that with aggregation "seq-mean-token-sum".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from agentrl.errors import ConfigError, UnknownName
from agentrl.learner.loss import MAX_LOG_RATIO, Anchor, Level, Scores

Flags = dict[str, Tensor]
SurrogateFunction = Callable[..., tuple[Tensor, Flags]]
F = TypeVar("F", bound=SurrogateFunction)

VESPO_MIN_LOG_WEIGHT = math.log(1e-8)
"""VESPO's code bounds the sequence ratio from below by 1e-8."""
BINARY_KL_EPS = 1e-8
"""Keeps DPPO's binary KL finite where a probability is 1."""


@dataclass(frozen=True, slots=True)
class Surrogate:
    """A surrogate as the configuration finds it.

    Attributes:
        function: ``(log_ratio, scores, **options) -> (loss, flags)``; its keyword-only arguments are the options.
        anchor: what the published form divides the ratio by; give it to ``loss.log_ratio``.
        levels: levels of the ratio for which the formula means something.
        needs: fields of ``Scores`` that may not be None.
    """

    function: SurrogateFunction
    anchor: Anchor
    levels: tuple[Level, ...]
    needs: tuple[str, ...]


SURROGATES: dict[str, Surrogate] = {}
"""Every surrogate by name."""


def find_surrogate(name: str) -> Surrogate:
    """The surrogate ``name``.

    Raises:
        UnknownName: there is none.
    """
    if name not in SURROGATES:
        raise UnknownName("surrogate", name, SURROGATES)
    return SURROGATES[name]


def _surrogate(
    *, anchor: Anchor = "old", levels: tuple[Level, ...] = ("token", "turn", "sequence"), needs: tuple[str, ...] = ()
) -> Callable[[F], F]:
    """Register a function under its name, and keep masked entries away from it and from its results."""

    def register(function: F) -> F:
        @functools.wraps(function)
        def masked(log_ratio: Tensor, scores: Scores, **options: Any) -> tuple[Tensor, Flags]:
            for field in needs:
                if getattr(scores, field) is None:
                    raise ConfigError(f"surrogate {function.__name__!r}: expected Scores.{field}, got none.")
            mask = scores.mask
            clean = replace(
                scores,
                logprobs=scores.logprobs.masked_fill(~mask, 0.0),
                advantages=scores.advantages.detach().masked_fill(~mask, 0.0),
                sampled_logprobs=None
                if scores.sampled_logprobs is None
                else scores.sampled_logprobs.detach().masked_fill(~mask, 0.0),
            )
            loss, flags = function(log_ratio.masked_fill(~mask, 0.0), clean, **options)
            return loss.masked_fill(~mask, 0.0), {name: flag & mask for name, flag in flags.items()}

        SURROGATES[function.__name__] = Surrogate(masked, anchor, levels, needs)
        return cast(F, masked)

    return register


# -- clipping ----------------------------------------------------------------------------------------------------------


@_surrogate()
def clip(
    log_ratio: Tensor,
    scores: Scores,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, Flags]:
    """PPO's clipped objective (Schulman et al. 2017, arXiv:1707.06347, equation 7).

    ``max(-A rho, -A clamp(rho, 1 - low, 1 + high))``. ``clip_high > clip_low`` is DAPO's clip-higher
    (arXiv:2503.14476, section 3.1). Dual clip (Ye et al. 2020, arXiv:1912.09729) bounds the loss of a token with A < 0
    by ``-A * dual_clip``, unbounded otherwise. INTELLECT-2's two-sided clip (TRL's ``delta``, arXiv:2505.07291) is the
    same for a bound above ``1 + clip_high``.

    Args:
        log_ratio: [L, T] (or any shape).
        scores: see ``Scores``.
        clip_low: how far below 1 the ratio may fall, 0.2 in GRPO and DAPO, 3e-4 in GSPO.
        clip_high: how far above 1 it may rise, 0.2 in GRPO, 0.28 in DAPO, 4e-4 in GSPO.
        dual_clip: above 1 (3.0 in verl), or None for none.

    Returns:
        The loss and the flags ``low`` (A < 0, ratio below the bound), ``high`` (A > 0, above), ``region`` (either: no
        gradient) and, with ``dual_clip``, ``dual`` (A < 0, above ``dual_clip``; no gradient either).

    Raises:
        ConfigError: ``dual_clip`` is not above 1, or a clip is below 0.
    """
    _check_clip(clip_low, clip_high)
    if dual_clip is not None and dual_clip <= 1:
        raise ConfigError(f"dual_clip: expected a ratio above 1 (3.0 is usual) or none, got {dual_clip}.")
    ratio = log_ratio.exp()
    loss, flags = _pessimistic(ratio, ratio.clamp(1 - clip_low, 1 + clip_high), scores, clip_low, clip_high)
    return _dual(loss, flags, ratio, scores, dual_clip)


@_surrogate()
def aepo(
    log_ratio: Tensor,
    scores: Scores,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
) -> tuple[Tensor, Flags]:
    """AEPO's clip that keeps the gradient above the upper bound (Dong et al. 2025, arXiv:2510.14545).

    The upper bound is ``(1 + high) rho / sg(rho)``: the value is that of ``clip``, but a token with A > 0 and
    ``rho > 1 + high`` has the gradient ``-(1 + high) A grad lp`` instead of 0. The paper motivates it by uncertain
    tokens; its code, as here, applies it to all. Its entropy-scaled advantages are ``credit.entropy_scaled``.

    Args:
        log_ratio: see ``clip``.
        scores: see ``Scores``.
        clip_low: see ``clip``.
        clip_high: see ``clip``.
        dual_clip: see ``clip``; 3.0 in the code.

    Returns:
        As ``clip``; tokens flagged ``high`` have a gradient here.

    Raises:
        ConfigError: ``dual_clip`` is not above 1, or a clip is below 0.
    """
    _check_clip(clip_low, clip_high)
    if dual_clip is not None and dual_clip <= 1:
        raise ConfigError(f"dual_clip: expected a ratio above 1 (3.0 is usual) or none, got {dual_clip}.")
    ratio = log_ratio.exp()
    held = (1 + clip_high) * (log_ratio - log_ratio.detach()).exp()
    bounded = torch.where(ratio > 1 + clip_high, held, ratio.clamp(min=1 - clip_low))
    loss, flags = _pessimistic(ratio, bounded, scores, clip_low, clip_high)
    return _dual(loss, flags, ratio, scores, dual_clip)


@_surrogate(levels=("token",))
def gmpo(log_ratio: Tensor, scores: Scores, *, clip_low: float = 0.4, clip_high: float = 0.4) -> tuple[Tensor, Flags]:
    """GMPO: the geometric mean of clipped token ratios, ``-A exp(mean_t d~)`` (Zhao et al. 2025, arXiv:2507.20673).

    ``d~`` is ``min(d, high)`` where A > 0 and ``max(d, -low)`` where A < 0: a clip in log space, on the side that the
    advantage pushes to. A trajectory's A is the mean of its tokens', as in verl; the paper has one A per trajectory.

    Args:
        log_ratio: [L, T], level "token".
        scores: see ``Scores``.
        clip_low: in nats; 0.4 allows ratios down to exp(-0.4).
        clip_high: in nats.

    Returns:
        [L, T], a trajectory's loss at each of its tokens (aggregate with "seq-mean-token-mean"), and the flags of
        ``clip``. verl's two clip fractions count both sides whatever the sign of A, clipped or not.

    Raises:
        ConfigError: a clip is below 0.
    """
    _check_clip(clip_low, clip_high)
    sign = scores.advantages.sign()
    clipped = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-clip_low, clip_high))
    loss = -_row_mean(scores.advantages, scores.mask) * _row_mean(clipped, scores.mask).exp()
    low, high = (sign < 0) & (log_ratio < -clip_low), (sign > 0) & (log_ratio > clip_high)
    return loss.expand_as(log_ratio), {"low": low, "high": high, "region": low | high}


@_surrogate(levels=("token",), needs=("selected",))
def clip_cov(
    log_ratio: Tensor, scores: Scores, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Tensor, Flags]:
    """Clip-Cov: PPO's clip, and no loss at all on the tokens of ``selection.select_clip_cov``.

    Cui et al. 2025 (arXiv:2505.22617, section 4).

    Args:
        log_ratio: see ``clip``.
        scores: with ``selected``.
        clip_low: see ``clip``.
        clip_high: see ``clip``.

    Returns:
        The loss, the flags of ``clip``, and ``selected`` (verl's ``pg_clipfrac`` counts these alone).

    Raises:
        ConfigError: ``scores.selected`` is missing, or a clip is below 0.
    """
    _check_clip(clip_low, clip_high)
    selected = _given(scores.selected)
    ratio = log_ratio.exp()
    loss, flags = _pessimistic(ratio, ratio.clamp(1 - clip_low, 1 + clip_high), scores, clip_low, clip_high)
    return loss.masked_fill(selected, 0.0), flags | {"selected": selected}


# -- the ratio as it is ------------------------------------------------------------------------------------------------


@_surrogate()
def unclipped(log_ratio: Tensor, scores: Scores) -> tuple[Tensor, Flags]:
    """The importance-weighted policy gradient, ``-A rho`` (Schulman et al. 2017, arXiv:1707.06347, equation 6).

    With ``beta KL(pi_old, pi)`` beside it, it is PPO-penalty (equation 8 there), whose beta is ``adaptive.PenaltyKL``.
    On tokens that the old policy sampled, ``rho - 1 - d`` estimates that KL with its exact expected gradient;
    ``loss.kl_penalty`` is the other way round, KL(pi, ref).

    Args:
        log_ratio: [L, T] (or any shape).
        scores: see ``Scores``.

    Returns:
        The loss; no flags.
    """
    return -scores.advantages * log_ratio.exp(), {}


@_surrogate(levels=("token",), needs=("selected",))
def kl_cov(log_ratio: Tensor, scores: Scores, *, coef: float = 1.0) -> tuple[Tensor, Flags]:
    """KL-Cov: ``-A rho``, plus ``coef |d|`` on the tokens of ``selection.select_kl_cov`` (arXiv:2505.22617, section 4).

    Args:
        log_ratio: [L, T], level "token".
        scores: with ``selected``.
        coef: 1 in the paper and in verl's docstring; 0.1 in verl's data class.

    Returns:
        The loss and the flag ``selected``.

    Raises:
        ConfigError: ``scores.selected`` is missing, or ``coef`` is below 0.
    """
    _check_at_least("kl_cov coef", coef, 0.0)
    selected = _given(scores.selected)
    penalty = torch.where(selected, coef * log_ratio.abs(), 0.0)
    return penalty - scores.advantages * log_ratio.exp(), {"selected": selected}


@_surrogate(anchor="sampler", levels=("token",), needs=("sampled_logprobs",))
def dppo(
    log_ratio: Tensor,
    scores: Scores,
    *,
    kind: Literal["tv", "kl"] = "tv",
    delta_low: float | None = None,
    delta_high: float | None = None,
    kl_tau: float = 0.0,
) -> tuple[Tensor, Flags]:
    """DPPO: ``-A rho``, dropped where the token's probability has moved too far the way A pushes (arXiv:2602.04879).

    "Too far" is a divergence between the two-way choices "this token or another" under policy and sampler. "tv":
    ``p - p_sampler > delta_high`` for A > 0, ``p_sampler - p > delta_low`` for A < 0. "kl": ``KL(sampler, policy)`` of
    that choice above delta, where p has moved in the direction of A. Ratio and divergence are taken to the *sampler*.
    prime-rl's default loss is "tv" with ``kl_tau = 1e-3``, a pull ``kl_tau d^2`` on every token, dropped ones included.

    Args:
        log_ratio: [L, T], level "token", anchor "sampler".
        scores: with ``sampled_logprobs``.
        kind: "tv" or "kl".
        delta_low: default 0.2 for "tv" (a probability), 0.05 for "kl" (nats).
        delta_high: the same.
        kl_tau: weight of ``d^2``.

    Returns:
        The loss and the flags ``low`` (A < 0, dropped), ``high`` (A > 0, dropped) and ``region`` (either).

    Raises:
        UnknownName: no such ``kind``.
        ConfigError: ``sampled_logprobs`` is missing, or a number is below 0.
    """
    usual = {"tv": 0.2, "kl": 0.05}
    if kind not in usual:
        raise UnknownName("DPPO divergence", kind, usual)
    delta_low = usual[kind] if delta_low is None else delta_low
    delta_high = usual[kind] if delta_high is None else delta_high
    _check_at_least("dppo delta_low", delta_low, 0.0)
    _check_at_least("dppo delta_high", delta_high, 0.0)
    theirs = _given(scores.sampled_logprobs)
    moved = scores.logprobs.detach().exp() - theirs.exp()
    far = moved.abs() if kind == "tv" else _binary_kl(theirs, scores.logprobs.detach())
    low = (scores.advantages < 0) & (moved < 0) & (far > delta_low)
    high = (scores.advantages > 0) & (moved > 0) & (far > delta_high)
    return _dropped(log_ratio, scores, low, high, kl_tau)


@_surrogate(anchor="sampler", levels=("token",), needs=("sampled_logprobs",))
def ipo(log_ratio: Tensor, scores: Scores, *, delta: float = 0.2, kl_tau: float = 1e-3) -> tuple[Tensor, Flags]:
    """prime-rl's IPO: ``-A rho``, dropped where ``|p - p_sampler| > delta`` for either sign of A, plus ``kl_tau d^2``.

    From prime-rl's code; not the preference loss of that name. Unlike ``dppo`` it also drops tokens on their way back.

    Args:
        log_ratio: [L, T], level "token", anchor "sampler".
        scores: with ``sampled_logprobs``.
        delta: a probability.
        kl_tau: weight of ``d^2``, on every token.

    Returns:
        The loss and the flags ``low`` (p fell, dropped), ``high`` (p rose, dropped) and ``region`` (either).

    Raises:
        ConfigError: ``sampled_logprobs`` is missing, or a number is below 0.
    """
    _check_at_least("ipo delta", delta, 0.0)
    moved = scores.logprobs.detach().exp() - _given(scores.sampled_logprobs).exp()
    return _dropped(log_ratio, scores, moved < -delta, moved > delta, kl_tau)


# -- the log-prob, weighted --------------------------------------------------------------------------------------------


@_surrogate()
def reinforce(log_ratio: Tensor, scores: Scores) -> tuple[Tensor, Flags]:
    """REINFORCE, ``-A lp`` (Williams 1992): no ratio. The loss of RAFT (arXiv:2504.11343) and GPG (arXiv:2504.02546).

    Args:
        log_ratio: [L, T] (or any shape); not used, only for the metrics.
        scores: see ``Scores``.

    Returns:
        The loss; no flags.
    """
    return -scores.advantages * scores.logprobs, {}


@_surrogate()
def cispo(
    log_ratio: Tensor, scores: Scores, *, clip_high: float = 4.0, floor: float = 0.0, absolute: bool = False
) -> tuple[Tensor, Flags]:
    """CISPO: ``-sg(clamp(rho, floor, 1 + clip_high)) A lp`` (MiniMax-M1, arXiv:2506.13585).

    No token loses its gradient; its weight is bounded. ``clip_high`` means three things in the field: the paper and
    slime write ``1 + clip_high`` (slime: 4.0), verl the same with 0.2, and TRL takes the bound itself
    (``epsilon_high = 5``), which is ``absolute``. The paper has no lower bound; verl's and slime's ``1 - clip_low`` is
    ``floor``, and with their 10 and 1.0 there is none either.

    Args:
        log_ratio: [L, T] (or any shape).
        scores: see ``Scores``.
        clip_high: upper bound of the weight, less 1.
        floor: lower bound of the weight.
        absolute: whether ``clip_high`` is the bound itself.

    Returns:
        The loss and the flags ``low``, ``high`` (weight bounded) and ``region`` (either).

    Raises:
        ConfigError: the upper bound is not above 1, or ``floor`` is not in [0, 1].
    """
    bound = clip_high if absolute else 1 + clip_high
    if bound <= 1:
        raise ConfigError(
            f"cispo: expected an upper bound of the ratio above 1, got {bound:g} (clip_high {clip_high:g}, "
            f"absolute {absolute}); an absolute bound of 5 is clip_high 4."
        )
    if not 0 <= floor <= 1:
        raise ConfigError(f"cispo floor: expected a lower bound of the ratio within [0, 1], got {floor:g}.")
    ratio = log_ratio.detach().exp()
    low, high = ratio < floor, ratio > bound
    loss = -ratio.clamp(floor, bound) * scores.advantages * scores.logprobs
    return loss, {"low": low, "high": high, "region": low | high}


@_surrogate(anchor="sampler", levels=("token",))
def rollout_is(
    log_ratio: Tensor, scores: Scores, *, clip_low: float = 0.5, clip_high: float = 1.0
) -> tuple[Tensor, Flags]:
    """GLM-5's calibrated importance sampling: ``-sg(rho 1[1 - low < rho < 1 + high]) A lp``, rho to the *sampler*.

    It needs no log-probs of the policy at the start of the step, which an asynchronous learner may not have.

    Args:
        log_ratio: [L, T], anchor "sampler".
        scores: see ``Scores``.
        clip_low: how far below 1 the ratio may fall before the token drops out; the defaults are those of the
            reference case, we know of no published ones.
        clip_high: how far above 1.

    Returns:
        The loss and the flags ``low``, ``high`` (dropped) and ``region`` (either).

    Raises:
        ConfigError: a clip is below 0.
    """
    _check_clip(clip_low, clip_high)
    ratio = log_ratio.detach().exp()
    low, high = ratio <= 1 - clip_low, ratio >= 1 + clip_high
    weight = ratio.masked_fill(low | high, 0.0)
    return -weight * scores.advantages * scores.logprobs, {"low": low, "high": high, "region": low | high}


@_surrogate()
def sapo(
    log_ratio: Tensor, scores: Scores, *, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> tuple[Tensor, Flags]:
    """SAPO: a soft gate, ``-A sigmoid(tau (rho - 1)) 4 / tau`` (arXiv:2511.20347); tau by the sign of A.

    The factor makes the slope 1 on policy, where ``sigmoid' = 1/4``.

    Args:
        log_ratio: [L, T] (or any shape).
        scores: see ``Scores``.
        tau_positive: for A > 0.
        tau_negative: for A <= 0; higher, so that pushing down fades sooner.

    Returns:
        The loss; no flags, as nothing is cut off.

    Raises:
        ConfigError: a tau is not above 0.
    """
    if min(tau_positive, tau_negative) <= 0:
        raise ConfigError(f"sapo: expected tau above 0 (1.0 and 1.05), got {tau_positive:g} and {tau_negative:g}.")
    tau = _by_sign(scores.advantages > 0, tau_positive, tau_negative, log_ratio)
    return -scores.advantages * torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau, {}


@_surrogate(levels=("token",))
def vespo(
    log_ratio: Tensor,
    scores: Scores,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> tuple[Tensor, Flags]:
    """VESPO: ``-sg(phi(w)) A lp`` with ``phi(w) = e^lambda w^k e^(-lambda w)`` and w the ratio of the whole sequence.

    ``w = exp(sum_t d)``, not length-normalised; ``phi(1) = 1``, and it falls smoothly to either side of ``k / lambda``.
    TRL multiplies w by the sampler's correction: that is anchor "sampler", and no correction beside it.

    Args:
        log_ratio: [L, T], level "token" (it is summed here).
        scores: see ``Scores``.
        k_positive: for A >= 0; the defaults are TRL's.
        lambda_positive: for A >= 0.
        k_negative: for A < 0.
        lambda_negative: for A < 0.

    Returns:
        The loss; no flags.

    Raises:
        ConfigError: a number is below 0.
    """
    for name, value in (("k", min(k_positive, k_negative)), ("lambda", min(lambda_positive, lambda_negative))):
        _check_at_least(f"vespo {name}", value, 0.0)
    log_weight = log_ratio.detach().sum(-1, keepdim=True).clamp(VESPO_MIN_LOG_WEIGHT, MAX_LOG_RATIO)
    positive = scores.advantages >= 0
    k = _by_sign(positive, k_positive, k_negative, log_ratio)
    rate = _by_sign(positive, lambda_positive, lambda_negative, log_ratio)
    phi = (rate + k * log_weight - rate * log_weight.exp()).exp()
    return -phi * scores.advantages * scores.logprobs, {}


@_surrogate(levels=("token",), needs=("baseline", "group_size"))
def gvpo(log_ratio: Tensor, scores: Scores, *, beta: float = 0.1) -> tuple[Tensor, Flags]:
    """GVPO: squared distance of implicit from actual reward, both group-centred (Zhang et al. 2025, arXiv:2504.19599).

    ``1/2 (beta (R_i - mean_G R) - A_i)^2`` with ``R_i = sum_t d`` and ``A_i = r_i - mean_G r`` (not divided by a
    standard deviation). ``mean_G R`` is detached, as in the code, and of the whole group: ``scores.baseline``. Times
    ``G / (G - 1)``, so that the mean over trajectories is the mean over groups of the unbiased ``sum_i / (G - 1)``; the
    code sums over groups, and the README leaves the ``G - 1`` out. A trajectory alone in its group has no loss.

    Args:
        log_ratio: [L, T], level "token" (it is summed here).
        scores: with ``baseline`` and ``group_size`` from ``selection.group_baseline``. A trajectory's A is the mean of
            its tokens'.
        beta: weight of the implicit reward.

    Returns:
        [L, T], a trajectory's loss at each of its tokens (aggregate with "seq-mean-token-mean"); no flags.

    Raises:
        ConfigError: ``baseline`` or ``group_size`` is missing, or ``beta`` is not above 0.
    """
    if beta <= 0:
        raise ConfigError(f"gvpo beta: expected a number above 0 (0.1), got {beta:g}.")
    size = _given(scores.group_size).to(log_ratio.dtype)
    implicit = beta * (log_ratio.sum(-1) - _given(scores.baseline).detach())
    error = implicit - _row_mean(scores.advantages, scores.mask).squeeze(-1)
    loss = torch.where(size > 1, 0.5 * error.square() * size / (size - 1).clamp(min=1), 0.0)
    return loss.unsqueeze(-1).expand_as(log_ratio), {}


# -- shared ------------------------------------------------------------------------------------------------------------


def _pessimistic(
    ratio: Tensor, bounded: Tensor, scores: Scores, clip_low: float, clip_high: float
) -> tuple[Tensor, Flags]:
    loss = torch.maximum(-scores.advantages * ratio, -scores.advantages * bounded)
    low = (scores.advantages < 0) & (ratio < 1 - clip_low)
    high = (scores.advantages > 0) & (ratio > 1 + clip_high)
    return loss, {"low": low, "high": high, "region": low | high}


def _dual(loss: Tensor, flags: Flags, ratio: Tensor, scores: Scores, dual_clip: float | None) -> tuple[Tensor, Flags]:
    if dual_clip is None:
        return loss, flags
    negative = scores.advantages < 0
    bounded = torch.where(negative, torch.minimum(loss, -scores.advantages * dual_clip), loss)
    return bounded, flags | {"dual": negative & (ratio > dual_clip)}


def _dropped(log_ratio: Tensor, scores: Scores, low: Tensor, high: Tensor, kl_tau: float) -> tuple[Tensor, Flags]:
    _check_at_least("kl_tau", kl_tau, 0.0)
    loss = (-scores.advantages * log_ratio.exp()).masked_fill(low | high, 0.0)
    if kl_tau:
        loss = loss + kl_tau * log_ratio.square()
    return loss, {"low": low, "high": high, "region": low | high}


def _binary_kl(theirs: Tensor, ours: Tensor) -> Tensor:
    """KL between "this token or another" under the sampler and under the policy, in nats."""
    p, q = theirs.exp(), ours.exp()
    return p * (theirs - ours) + (1 - p) * ((1 - p + BINARY_KL_EPS) / (1 - q + BINARY_KL_EPS)).log()


def _row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[L, 1], the mean over a trajectory's policy tokens; ``values`` are 0 elsewhere."""
    return values.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _by_sign(positive: Tensor, if_so: float, if_not: float, like: Tensor) -> Tensor:
    """One of two numbers per token, in the dtype of ``like``: torch.where alone makes float32 of Python's."""
    return torch.where(positive, like.new_tensor(if_so), like.new_tensor(if_not))


def _given(tensor: Tensor | None) -> Tensor:
    """For mypy: ``needs`` has been checked."""
    return cast(Tensor, tensor)


def _check_clip(clip_low: float, clip_high: float) -> None:
    _check_at_least("clip_low", clip_low, 0.0)
    _check_at_least("clip_high", clip_high, 0.0)


def _check_at_least(name: str, value: float, bound: float) -> None:
    if not value >= bound:
        raise ConfigError(f"{name}: expected a number of {bound:g} or above, got {value:g}.")
