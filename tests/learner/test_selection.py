from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentrl.errors import ConfigError
from agentrl.learner.loss import Scores, log_ratio
from agentrl.learner.selection import group_baseline, select_clip_cov, select_kl_cov, top_entropy_mask

torch.set_num_threads(1)
NAN = float("nan")


def batch(seed: int = 0) -> Scores:
    noise = torch.Generator().manual_seed(seed)
    old = -torch.rand(5, 8, generator=noise, dtype=torch.float64)
    moved = 0.3 * torch.randn(5, 8, generator=noise, dtype=torch.float64)
    advantages = torch.randn(5, 1, generator=noise, dtype=torch.float64).expand(5, 8)
    return Scores(old + moved, old, advantages, torch.rand(5, 8, generator=noise) > 0.3)


def covariance(scores: Scores) -> Tensor:
    """The textbook's, without any of our helpers."""
    a, b = scores.advantages[scores.mask], scores.logprobs[scores.mask]
    return (scores.advantages - a.mean()) * (scores.logprobs - b.mean())


def test_clip_cov_draws_its_share_from_unclipped_tokens_within_the_bounds() -> None:
    scores = batch()
    drawn = torch.zeros_like(scores.mask)
    for seed in range(200):
        selected = select_clip_cov(
            log_ratio(scores),
            scores,
            fraction=0.1,
            low=0.02,
            high=0.4,
            generator=torch.Generator().manual_seed(seed),
        )
        assert selected.sum() == int(0.1 * scores.mask.sum())
        drawn |= selected
    ratio = (scores.logprobs - scores.old_logprobs).exp()
    clipped = ((scores.advantages > 0) & (ratio > 1.2)) | ((scores.advantages < 0) & (ratio < 0.8))
    candidates = scores.mask & ~clipped & (covariance(scores) > 0.02) & (covariance(scores) < 0.4)
    assert torch.equal(drawn, candidates)  # every candidate is drawn sooner or later, and nothing else
    assert candidates.sum() > 4


def test_clip_cov_takes_what_there_is() -> None:
    scores = batch()
    assert not select_clip_cov(log_ratio(scores), scores, low=1e3, high=1e4).any()
    assert select_clip_cov(log_ratio(scores), scores, fraction=1e-9, low=-1e3, high=1e4).sum() == 1
    nothing = replace(scores, mask=torch.zeros_like(scores.mask))
    assert not select_clip_cov(log_ratio(nothing), nothing).any()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(1e-4, 1.0))
def test_kl_cov_takes_the_largest(seed: int, fraction: float) -> None:
    scores = batch(seed)
    selected = select_kl_cov(scores, fraction=fraction)
    assert selected.sum() == max(1, int(scores.mask.sum().item() * fraction))
    assert not (selected & ~scores.mask).any()
    rest = scores.mask & ~selected
    if rest.any():
        assert covariance(scores)[selected].min() >= covariance(scores)[rest].max()
    nothing = replace(scores, mask=torch.zeros_like(scores.mask))
    assert not select_kl_cov(nothing).any()


def test_selections_do_not_look_at_masked_tokens() -> None:
    scores = batch()
    holes = {name: getattr(scores, name).masked_fill(~scores.mask, NAN) for name in ("logprobs", "advantages")}
    dirty = replace(scores, **holes)
    assert torch.equal(select_kl_cov(dirty, fraction=0.2), select_kl_cov(scores, fraction=0.2))
    both = [
        select_clip_cov(log_ratio(x), x, fraction=0.2, low=0.0, generator=torch.Generator().manual_seed(1))
        for x in (dirty, scores)
    ]
    assert torch.equal(*both)
    assert both[0].any()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from([0.05, 0.2, 0.25, 0.5, 1.0]), st.booleans())
def test_top_entropy_is_at_or_above_the_quantile(seed: int, fraction: float, ties: bool) -> None:
    scores = batch(seed)
    entropies = scores.logprobs.neg()
    entropies = entropies.round(decimals=1) if ties else entropies
    kept = top_entropy_mask(entropies.masked_fill(~scores.mask, NAN), scores.mask, fraction=fraction)
    threshold = torch.quantile(entropies[scores.mask], 1 - fraction)
    assert torch.equal(kept, scores.mask & (entropies >= threshold - 1e-12))


def test_top_entropy_of_nothing_is_nothing() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert torch.equal(top_entropy_mask(torch.ones(2, 3), nothing), nothing)


def test_group_baseline_is_the_mean_of_the_whole_group() -> None:
    ratio = torch.tensor([[1.0, 2.0], [4.0, NAN], [5.0, 6.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    baseline, size = group_baseline(ratio, mask, torch.tensor([9, 2, 9]))
    assert baseline.tolist() == [7.0, 4.0, 7.0]
    assert size.tolist() == [2, 1, 2]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, NAN])
def test_wrong_shares_are_refused(fraction: float) -> None:
    scores = batch()
    with pytest.raises(ConfigError, match="clip_cov fraction: expected a share"):
        select_clip_cov(log_ratio(scores), scores, fraction=fraction)
    with pytest.raises(ConfigError, match="kl_cov fraction: expected a share"):
        select_kl_cov(scores, fraction=fraction)
    with pytest.raises(ConfigError, match="top_entropy fraction: expected a share"):
        top_entropy_mask(scores.logprobs, scores.mask, fraction=fraction)
    with pytest.raises(ConfigError, match="expected low below high"):
        select_clip_cov(log_ratio(scores), scores, low=2.0, high=2.0)
