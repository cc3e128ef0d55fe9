"""From logits to tokens: temperature, nucleus, exact entropy, and random numbers that depend on seed and position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Draw(NamedTuple):
    """One token a row; all [B]."""

    token_ids: Tensor
    logprobs: Tensor
    entropies: Tensor


@dataclass(frozen=True, slots=True)
class Manner:
    """How the rows of a batch are drawn; made once for many tokens, since most of it does not change with them.

    Attributes:
        divisor: [B, 1] temperatures, 1 where greedy; None where all are 1.
        greedy: [B] bool; None where no row is.
        top_p: [B] nucleus mass, 1 where greedy; None where all are 1.
    """

    divisor: Tensor | None
    greedy: Tensor | None
    top_p: Tensor | None

    @classmethod
    def of(cls, temperatures: Sequence[float], top_ps: Sequence[float], device: torch.device | str = "cpu") -> Manner:
        """Of rows with these settings; a temperature of 0 is greedy."""
        greedy = [temperature == 0 for temperature in temperatures]
        divisors = [temperature or 1.0 for temperature in temperatures]
        masses = [1.0 if sure else mass for sure, mass in zip(greedy, top_ps, strict=True)]
        return cls(
            torch.tensor(divisors, device=device)[:, None] if any(each != 1 for each in divisors) else None,
            torch.tensor(greedy, device=device) if any(greedy) else None,
            torch.tensor(masses, device=device) if any(each < 1 for each in masses) else None,
        )


def streams(seeds: Sequence[int]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """[B] where the random numbers of each seed begin."""
    with np.errstate(over="ignore"):
        x = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
        return _mix(x + np.uint64(0x9E3779B97F4A7C15))


def uniforms(streams: np.ndarray[Any, np.dtype[np.uint64]], positions: Sequence[int]) -> Tensor:
    """[B] numbers in [0, 1), a pure function of (seed, position), by the mixer of Steele et al. 2014 (SplitMix)."""
    with np.errstate(over="ignore"):
        x = _mix(streams ^ (np.array(positions, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def draw(logits: Tensor, manner: Manner, uniform: Tensor) -> Draw:
    """Sample one token per row by inverting the cumulative distribution.

    Args:
        logits: [B, V], fp32.
        manner: of the rows; greedy ones have log-probs and entropy of the untempered softmax.
        uniform: [B] in [0, 1), float64.

    Returns:
        Token ids; log-probs under the sampling distribution (tempered, renormalised over the nucleus); entropies in
        nats of the tempered distribution before the nucleus cut.
    """
    if manner.divisor is not None:
        logits = logits / manner.divisor
    logp = torch.log_softmax(logits, dim=-1)
    probs = logp.exp()
    entropies = -(probs * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1)  # 0 log 0 is 0
    if manner.top_p is not None:
        kept = torch.where((manner.top_p < 1)[:, None], _nucleus(probs, manner.top_p), True)
        logp = torch.log_softmax(logits.masked_fill(~kept, float("-inf")), dim=-1)
        probs = logp.exp()
    cdf = probs.cumsum(-1, dtype=torch.float64)
    token_ids = torch.searchsorted(cdf, uniform.to(cdf.device)[:, None] * cdf[:, -1:], right=True)
    token_ids = token_ids.clamp_max(logits.shape[-1] - 1)
    if manner.greedy is not None:
        token_ids = torch.where(manner.greedy[:, None], logits.argmax(-1, keepdim=True), token_ids)
    return Draw(token_ids[:, 0], logp.gather(1, token_ids)[:, 0], entropies)


def _nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """[B, V] the smallest set of likeliest tokens whose mass reaches ``top_p`` (Holtzman et al. 2020)."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    keep = before < top_p[:, None]
    return torch.zeros_like(keep).scatter(1, order, keep)


def _mix(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
