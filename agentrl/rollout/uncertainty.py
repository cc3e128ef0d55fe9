"""How much less certain the policy is after a tool result: ARPO's signal for where to branch.

Dong et al. 2025 (arXiv:2507.19849, section 3.1): a trajectory branches after a tool result where
``alpha + beta * entropy_change > tau``, with alpha 0.5, beta 0.2, tau 0.5: that is, where the change is above 0.
Divided by ln|V| each token's share lies in [-1, 1], whatever the vocabulary; the paper divides by |V|, which leaves
of the signal not much more than its sign.
The paper and the released code measure different things, and there is a function for each. Index names: ``T`` tokens of
one segment, ``K`` alternatives returned for a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from agentrl.errors import ConfigError

FIRST_TOKENS = 20
"""How many tokens of a segment are looked at: the released code's number, within the paper's 10 to 50."""


def entropy_change(
    entropies: Sequence[float], initial: Sequence[float], scale: float, *, first_tokens: int = FIRST_TOKENS
) -> float:
    """The paper's signal, ``sum_t (H_t - H_initial,t) / scale`` over the first k tokens *after* a tool result.

    Where a segment is shorter than k, as many tokens of both are compared as both have: the sum would otherwise call a
    short segment certain.

    Args:
        entropies: [T] in nats, of the full distributions that sampled the tokens after the tool result.
        initial: [T] in nats, of the trajectory's first tokens, before any tool call.
        scale: in nats; ln|V|, or the paper's |V|.
        first_tokens: k.

    Returns:
        Above 0 where the policy has become less certain; 0 where either segment is empty.

    Raises:
        ConfigError: ``scale`` not above 0 or ``first_tokens`` below 1.
    """
    if not scale > 0:
        raise ConfigError(f"scale: expected ln|V| or |V| of a policy that knows at least 2 tokens, got {scale}.")
    _check_tokens(first_tokens)
    pairs = list(zip(entropies, initial, strict=False))[:first_tokens]
    return math.fsum(now - before for now, before in pairs) / scale


def released_entropy(
    top_logprobs: Sequence[Sequence[float]], vocab_size: int, *, first_tokens: int = FIRST_TOKENS
) -> float:
    """The released code's uncertainty of a segment, ``-sum_t sum_v p log p / ln |V|`` over its first tokens.

    The code subtracts from it the value of the trajectory's first segment, and takes the segment that *ends* with the
    tool call, so that the tool's result has no influence on whether to branch there, and the first call's change is
    always 0. The sum runs over the alternatives that were returned (10, or 11 with the sampled token) without
    renormalising them, and over tokens without dividing by their number, so that short segments look certain.

    Args:
        top_logprobs: [T][K] natural logs.
        vocab_size: |V|.
        first_tokens: tokens of the segment that are looked at, 20.

    Returns:
        At least 0, and for K above 2 at most ``first_tokens * ln K / ln |V|``; 0 for an empty segment.

    Raises:
        ConfigError: ``vocab_size`` below 2 or ``first_tokens`` below 1.
    """
    if vocab_size < 2:
        raise ConfigError(f"vocab_size: expected the number of tokens the policy knows, at least 2, got {vocab_size}.")
    _check_tokens(first_tokens)
    terms = (_surprise(logprob) for token in top_logprobs[:first_tokens] for logprob in token)
    return math.fsum(terms) / math.log(vocab_size)


def _surprise(logprob: float) -> float:
    """``-p log p``, 0 in the limit of p = 0."""
    return -math.exp(logprob) * logprob if logprob > -math.inf else 0.0


def _check_tokens(first_tokens: int) -> None:
    if first_tokens < 1:
        raise ConfigError(f"first_tokens: expected at least 1 token to look at, got {first_tokens}.")
