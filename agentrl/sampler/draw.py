"""From logits to tokens: temperature, nucleus, exact entropy, and random numbers that depend on seed and position."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Draw(NamedTuple):
    """One token a row; all [B]."""

    token_ids: Tensor
    logprobs: Tensor
    entropies: Tensor


def uniforms(seeds: list[int], positions: list[int]) -> Tensor:
    """[B] numbers in [0, 1), a pure function of (seed, position), by the mixer of Steele et al. 2014 (SplitMix)."""
    with np.errstate(over="ignore"):
        x = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
        x = _mix(x + np.uint64(0x9E3779B97F4A7C15))
        x = _mix(x ^ (np.array(positions, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Draw:
    """Sample one token per row by inverting the cumulative distribution.

    Args:
        logits: [B, V], fp32.
        temperature: [B]; 0 is greedy, with log-probs and entropy of the untempered softmax.
        top_p: [B] nucleus mass in (0, 1].
        uniform: [B] in [0, 1), float64.

    Returns:
        Token ids; log-probs under the sampling distribution (tempered, renormalised over the nucleus); entropies in
        nats of the tempered distribution before the nucleus cut.
    """
    greedy = temperature == 0
    if not bool((temperature == 1).all()):
        logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
    logp = torch.log_softmax(logits, dim=-1)
    probs = logp.exp()
    entropies = -(probs * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1)  # 0 log 0 is 0
    cut = (top_p < 1) & ~greedy
    if bool(cut.any()):
        kept = torch.where(cut[:, None], _nucleus(probs, top_p), True)
        logp = torch.log_softmax(logits.masked_fill(~kept, float("-inf")), dim=-1)
        probs = logp.exp()
    cdf = probs.double().cumsum(-1)
    token_ids = torch.searchsorted(cdf, uniform.to(cdf.device)[:, None] * cdf[:, -1:], right=True)[:, 0]
    token_ids = torch.where(greedy, logits.argmax(-1), token_ids.clamp_max(logits.shape[-1] - 1))
    return Draw(token_ids, logp.gather(1, token_ids[:, None])[:, 0], entropies)


def _nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """[B, V] the smallest set of likeliest tokens whose mass reaches ``top_p`` (Holtzman et al. 2020)."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    keep = before < top_p[:, None]
    return torch.zeros_like(keep).scatter(1, order, keep)


def _mix(x: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
