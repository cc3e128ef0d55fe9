from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from agentrl.errors import ConfigError, UnknownName
from agentrl.learner.correction import BOUNDS, CorrectionKind, opsm_mask, sampler_correction
from agentrl.learner.loss import Scores, aggregate, log_ratio
from agentrl.learner.surrogate import clip

torch.set_num_threads(1)
KINDS = get_args(CorrectionKind)
WEIGHTS = [kind for kind in KINDS if kind[-2:] not in ("k1", "k2", "k3") and kind != "geometric_mask"]
NAN = float("nan")
RATIOS = torch.tensor([[0.4, 1.5, 3.0, 1.0], [1.0, 1.1, 0.9, 1.0], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, False], [True, True, True, True], [False, False, False, False]])


def weights(kind: Any, **options: Any) -> list[list[float]]:
    rows: list[list[float]] = sampler_correction(kind, RATIOS.log(), MASK, **options)[0].tolist()
    assert rows.pop() == [0.0] * 4
    assert rows[0].pop() == 0.0
    return rows


def near(*rows: list[float]) -> list[Any]:
    return [pytest.approx(row, rel=1e-12) for row in rows]


def test_importance_weights_by_hand() -> None:
    first, second = 0.4 * 1.5 * 3.0, 1.1 * 0.9
    assert weights("token_tis") == near([0.4, 1.5, 2.0], [1.0, 1.1, 0.9, 1.0])
    assert weights("token_tis", low=0.5, high=1.2) == near([0.5, 1.2, 1.2], [1.0, 1.1, 0.9, 1.0])
    assert weights("sequence_tis", high=1.2) == near([1.2] * 3, [second] * 4)
    assert weights("sequence_tis") == near([first] * 3, [second] * 4)
    assert weights("geometric_tis", high=1.1) == near([1.1] * 3, [second**0.25] * 4)
    assert weights("token_mask") == near([0.0, 1.5, 3.0], [1.0, 1.1, 0.9, 1.0])
    assert weights("token_mask", low=0.0, high=1.05) == near([0.4, 0.0, 0.0], [1.0, 0.0, 0.9, 1.0])
    assert weights("sequence_mask") == near([first] * 3, [second] * 4)
    assert weights("sequence_mask", high=1.5) == near([0.0] * 3, [second] * 4)
    assert weights("decoupled") == near([0.4, 1.5, 3.0], [1.0, 1.1, 0.9, 1.0])
    assert weights("decoupled", high=2.0) == near([0.4, 1.5, 0.0], [1.0, 1.1, 0.9, 1.0])


def test_rejections_by_hand() -> None:
    mean = 1.8 ** (1 / 3)  # of pi_old / pi_sampler in the first row; 0.99^(1/4) in the second
    keep, drop = [1.0] * 4, [0.0] * 4
    assert weights("geometric_mask") == [drop[:3], drop]
    assert weights("geometric_mask", low=0.99, high=mean + 1e-9) == [keep[:3], keep]
    assert weights("geometric_mask", low=0.99, high=mean - 1e-9) == [drop[:3], keep]
    # k1 has its bounds on the reciprocal
    assert weights("seq_mean_k1", low=1 / mean + 1e-9, high=1.01) == [drop[:3], keep]
    assert weights("seq_mean_k1", low=1 / mean - 1e-9, high=1.01) == [keep[:3], keep]
    assert weights("token_k1", low=0.5, high=2.0) == [[0.0, 1.0, 0.0], keep]
    assert weights("token_k1", high=2.0) == weights("token_k1", low=0.5, high=2.0)
    assert weights("seq_sum_k1", low=0.5, high=2.0) == [keep[:3], keep]  # 1 / 1.8
    assert weights("seq_sum_k1", low=0.6, high=2.0) == [drop[:3], keep]
    k2 = [0.5 * math.log(r) ** 2 for r in (0.4, 1.5, 3.0)]
    k3 = [r - 1 - math.log(r) for r in (0.4, 1.5, 3.0)]
    for name, values in (("k2", k2), ("k3", k3)):
        assert weights(f"token_{name}", high=values[0]) == [
            [1.0, 1.0, 0.0] if values[2] > values[0] else [1.0, 1.0, 1.0],
            keep,
        ]
        for level, value in (("sum", sum(values)), ("mean", sum(values) / 3), ("max", max(values))):
            assert weights(f"seq_{level}_{name}", high=value + 1e-9) == [keep[:3], keep]
            assert weights(f"seq_{level}_{name}", high=value - 1e-9) == [drop[:3], keep]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_corrected_where_sampler_and_learner_agree(kind: Any) -> None:
    options = {} if kind in BOUNDS else {"high": 2.0}
    corrected, flags = sampler_correction(kind, torch.zeros(3, 4), MASK, **options)
    assert torch.equal(corrected, MASK.float())
    assert not any(flag.any() for flag in flags.values())


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_have_no_part_in_it(kind: Any) -> None:
    options = {} if kind in BOUNDS else {"high": 2.0}
    dirty = RATIOS.log().masked_fill(~MASK, NAN).requires_grad_()
    ours, flags = sampler_correction(kind, dirty, MASK, **options)
    theirs, _ = sampler_correction(kind, RATIOS.log(), MASK, **options)
    assert torch.equal(ours, theirs)
    assert not ours.requires_grad
    assert not any((flag & ~MASK).any() for flag in flags.values())


def test_flags_tell_which_bound_was_crossed() -> None:
    _, flags = sampler_correction("token_mask", RATIOS.log(), MASK, low=0.5, high=2.0)
    assert flags["low"].nonzero().tolist() == [[0, 0]]
    assert flags["high"].nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_normalized_weights_have_mean_one(kind: Any) -> None:
    options = {} if kind in BOUNDS else {"high": 2.0}
    raw, _ = sampler_correction(kind, RATIOS.log(), MASK, **options)
    scaled, _ = sampler_correction(kind, RATIOS.log(), MASK, normalize=True, **options)
    mode = "token-mean" if kind.startswith(("token", "decoupled")) else "seq-mean-token-mean"
    assert aggregate(scaled, MASK, mode).item() == pytest.approx(1.0, rel=1e-12)
    torch.testing.assert_close(scaled / scaled[1, 0], raw / raw[1, 0])


def test_far_gaps_stay_finite() -> None:
    far = torch.tensor([[-900.0, 900.0], [900.0, 900.0]])
    for kind in KINDS:
        corrected, _ = sampler_correction(kind, far, torch.ones(2, 2, dtype=torch.bool), high=math.inf)
        assert corrected.isfinite().all(), kind


def test_decoupled_ppo_has_the_denominator_of_the_original_mask() -> None:
    """AReaL: -w min(rho A, clip(rho) A) with rho = pi / pi_proximal and w = pi_proximal / pi_sampler."""
    proximal = torch.full((1, 4), -1.0, dtype=torch.float64)
    scores = Scores(proximal + 0.1, proximal, torch.full((1, 4), 2.0, dtype=torch.float64), MASK[1:2])
    loss, _ = clip(log_ratio(scores), scores)
    gap = torch.tensor([[1.1, 3.0, 0.9, 1.0]], dtype=torch.float64).log()
    corrected, _ = sampler_correction("decoupled", gap, scores.mask, high=2.0)
    total = aggregate(loss * corrected, scores.mask, "token-mean")
    assert total.item() == pytest.approx(-2 * math.exp(0.1) * (1.1 + 0.0 + 0.9 + 1.0) / 4, rel=1e-12)
    again, _ = clip(log_ratio(scores), replace(scores, advantages=scores.advantages * 3.0 / 4.0))
    assert aggregate(again, scores.mask, "token-mean").item() == pytest.approx(total.item())


def test_opsm_drops_bad_answers_that_the_policy_has_left() -> None:
    gap = torch.tensor([[-0.3, -0.1, NAN], [-0.3, -0.1, NAN], [-0.1, -0.1, NAN], [0.9, 0.9, NAN]])
    mask = torch.tensor([[True, True, False]]).expand(4, 3)
    advantages = torch.tensor([[-1.0], [1.0], [-1.0], [-1.0]]).expand(4, 3)
    assert opsm_mask(gap, advantages, mask, delta=0.15).tolist() == [
        [0.0, 0.0, 0.0],
        [1.0, 1.0, 0.0],
        [1.0, 1.0, 0.0],
        [1.0, 1.0, 0.0],
    ]
    with pytest.raises(ConfigError, match="opsm delta"):
        opsm_mask(gap, advantages, mask, delta=-1.0)


def test_contradictions_are_refused() -> None:
    d, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(UnknownName, match="unknown sampler correction 'token_ti': did you mean 'token_tis'"):
        sampler_correction("token_ti", d, mask)  # type: ignore[arg-type]
    for kind in ("geometric_mask", "seq_mean_k3"):
        with pytest.raises(ConfigError, match="expected normalize False"):
            sampler_correction(kind, d, mask, normalize=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no published bounds: expected high"):
        sampler_correction("token_k2", d, mask)
    with pytest.raises(ConfigError, match="has an upper bound only"):
        sampler_correction("seq_max_k3", d, mask, low=0.1, high=0.2)
    for low, high in ((2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (0.5, NAN)):
        with pytest.raises(ConfigError, match="expected 0 <= low < high"):
            sampler_correction("token_tis", d, mask, low=low, high=high)
