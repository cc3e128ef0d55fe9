from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentrl.errors import ConfigError, TrainingError, UnknownName
from agentrl.learner.loss import (
    Aggregation,
    KLEstimator,
    Scores,
    aggregate,
    kl_penalty,
    log_ratio,
    loss_denominator,
    mask_overlong,
    surrogate_metrics,
    token_log_ratio,
    value_loss,
)
from agentrl.learner.surrogate import clip

torch.set_num_threads(1)
PROPERTY = settings(deadline=None)  # torch's first call is slow; pytest-timeout guards the whole

MODES = get_args(Aggregation)
MAX_TOKENS = 9
NAN = float("nan")


@st.composite
def batches(draw: st.DrawFn) -> Scores:
    """Random log-probs off policy by up to a few nats, with holes, padding and whole rows masked."""
    leaves, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    cells = st.lists(st.booleans(), min_size=leaves * tokens, max_size=leaves * tokens)
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    old = -torch.rand(leaves, tokens, generator=noise, dtype=torch.float64)
    mask = torch.tensor(draw(cells)).reshape(leaves, tokens)
    return Scores(
        logprobs=old + 0.5 * torch.randn(leaves, tokens, generator=noise, dtype=torch.float64),
        old_logprobs=old,
        advantages=torch.randn(leaves, 1, generator=noise, dtype=torch.float64).expand(leaves, tokens),
        mask=mask,
        turn=(torch.arange(tokens) // 2).expand(leaves, tokens).masked_fill(~mask, -1),
        sampled_logprobs=old - 0.1,
    )


# -- ratios ------------------------------------------------------------------------------------------------------------

SEGMENTS = [
    (level, reduce, gradient)
    for level in ("turn", "sequence")
    for reduce in ("mean", "sum")
    for gradient in ("token", "segment")
]


def test_token_ratio_is_to_the_anchor_and_clamped() -> None:
    scores = Scores(*(torch.tensor([[x, 0.0]]) for x in (-1.0, -30.0, 1.0)), torch.tensor([[True, False]]))
    assert log_ratio(scores).tolist() == [[20.0, 0.0]]
    assert log_ratio(replace(scores, sampled_logprobs=torch.tensor([[-3.0, NAN]])), anchor="sampler").tolist() == [
        [2.0, 0.0]
    ]


@PROPERTY
@given(batches(), st.sampled_from(SEGMENTS))
def test_segment_ratios_are_those_of_a_loop(scores: Scores, how: Any) -> None:
    level, reduce, gradient = how
    ours = log_ratio(scores, level, reduce=reduce, gradient=gradient)
    assert scores.turn is not None
    for row in range(len(scores.mask)):
        for turn in range(7):
            inside = scores.mask[row] & (scores.turn[row] == turn if level == "turn" else True)
            values = (scores.logprobs - scores.old_logprobs)[row][inside]
            expected = values.mean() if reduce == "mean" else values.sum()
            torch.testing.assert_close(ours[row][inside], expected.expand_as(values), rtol=1e-12, atol=1e-14)
    assert (ours[~scores.mask] == 0).all()


@PROPERTY
@given(batches(), st.sampled_from(["turn", "sequence"]), st.sampled_from(["token-mean", "seq-mean-token-mean"]))
def test_both_gradients_of_a_segment_agree_where_its_tokens_weigh_the_same(
    scores: Scores, level: Any, mode: Aggregation
) -> None:
    logprobs = scores.logprobs.requires_grad_()
    ratios = [log_ratio(scores, level, gradient=gradient) for gradient in ("token", "segment")]
    losses = [aggregate(-scores.advantages * ratio.exp(), scores.mask, mode) for ratio in ratios]
    ours, theirs = (torch.autograd.grad(loss, logprobs, retain_graph=True)[0] for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_gradient_of_a_segment_ratio_by_hand() -> None:
    logprobs = torch.tensor([[0.3, 0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[True, True, False]])
    scores = Scores(logprobs, old, old, mask)

    def slope(**how: Any) -> list[float]:
        first = log_ratio(scores, "sequence", **how).exp()[0, 0]
        return torch.autograd.grad(first, logprobs)[0].flatten().tolist()  # type: ignore[no-any-return]

    s = math.exp(0.2)
    assert slope() == pytest.approx([s, 0.0, 0.0])
    assert slope(gradient="segment") == pytest.approx([s / 2, s / 2, 0.0])
    assert slope(gradient="segment", reduce="sum") == pytest.approx([math.exp(0.4), math.exp(0.4), 0.0])


@pytest.mark.parametrize("how", SEGMENTS, ids=str)
def test_masked_tokens_enter_no_ratio(how: Any) -> None:
    level, reduce, gradient = how
    mask = torch.tensor([[True, False, True], [False, False, False]])
    logprobs = torch.tensor([[-0.5, NAN, -0.1], [NAN, -math.inf, NAN]], requires_grad=True)
    turn = torch.tensor([[0, -1, 0], [-1, -1, -1]])
    scores = Scores(logprobs, torch.full((2, 3), -math.inf).where(~mask, -0.2), torch.ones(2, 3), mask, turn)
    ratio = log_ratio(scores, level, reduce=reduce, gradient=gradient)
    (slope,) = torch.autograd.grad(ratio.exp().sum(), logprobs)
    assert (ratio[~mask] == 0).all()
    assert (slope[~mask] == 0).all()
    assert slope[mask].all()


def test_far_segments_are_clamped_from_above() -> None:
    far = Scores(torch.zeros(1, 2), torch.full((1, 2), -15.0), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert log_ratio(far, "sequence").tolist() == [[10.0, 10.0]]
    swapped = replace(far, logprobs=far.old_logprobs, old_logprobs=far.logprobs)
    assert log_ratio(swapped, "sequence", reduce="sum").tolist() == [[-30.0, -30.0]]


def test_impossible_ratios_are_refused() -> None:
    scores = Scores(*(torch.zeros(1, 2) for _ in range(3)), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(UnknownName, match="ratio level 'seq'"):
        log_ratio(scores, "seq")  # type: ignore[arg-type]
    for name, value in (("anchor", "new"), ("reduce", "max"), ("gradient", "none")):
        with pytest.raises(UnknownName, match=f"unknown ratio .* {value!r}"):
            log_ratio(scores, "sequence", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"expected Scores\.sampled_logprobs, got none"):
        log_ratio(scores, anchor="sampler")
    with pytest.raises(ConfigError, match=r"expected Scores\.turn, got none"):
        log_ratio(scores, "turn")
    with pytest.raises(ConfigError, match="expected a turn of 0 or above for every policy token"):
        log_ratio(replace(scores, turn=torch.tensor([[0, -1]])), "turn")
    with pytest.raises(ConfigError, match="level 'token' has no segments"):
        log_ratio(scores, gradient="segment")
    with pytest.raises(ConfigError, match="level 'token' has no segments"):
        log_ratio(scores, reduce="sum")


# -- the loss of a step ------------------------------------------------------------------------------------------------


def loss_and_gradient(scores: Scores, mode: Aggregation, denominator: float, tokens: float) -> tuple[Any, ...]:
    scores = replace(scores, logprobs=scores.logprobs.clone().requires_grad_())
    ratio = log_ratio(scores)
    per_token, flags = clip(ratio, scores, dual_clip=1.5)
    loss = aggregate(per_token, scores.mask, mode, denominator=denominator)
    (gradient,) = torch.autograd.grad(loss, scores.logprobs)
    return loss.detach(), gradient, surrogate_metrics(flags, ratio, scores.mask, tokens=tokens)


@PROPERTY
@given(batches(), st.sampled_from(MODES), st.integers(1, 4))
def test_micro_batches_sum_to_the_full_batch(scores: Scores, mode: Aggregation, size: int) -> None:
    length = MAX_TOKENS if mode == "seq-mean-token-sum-norm" else None
    whole = max(loss_denominator(scores.mask, mode, max_tokens=length), 1.0)
    tokens = max(scores.mask.sum().item(), 1)
    loss, gradient, metrics = loss_and_gradient(scores, mode, whole, tokens)
    starts = range(0, len(scores.mask), size)
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    rows = [Scores(*(getattr(scores, name)[i : i + size] for name in names)) for i in starts]
    parts = [loss_and_gradient(row, mode, whole, tokens) for row in rows]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-12, atol=0)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(part[2][name] for part in parts), value, rtol=1e-12, atol=1e-14)
    parts_denominator = sum(loss_denominator(row.mask, mode, max_tokens=length) for row in rows)
    assert parts_denominator == loss_denominator(scores.mask, mode, max_tokens=length)


# -- aggregation and KL ------------------------------------------------------------------------------------------------


def test_aggregation_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 99.0], [5.0, 99.0, 99.0], [99.0, 99.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert aggregate(values, mask, "token-mean").item() == 8 / 3
    assert aggregate(values, mask, "seq-mean-token-mean").item() == (1.5 + 5) / 2  # two rows, not three
    assert aggregate(values, mask, "seq-mean-token-sum").item() == 8 / 2
    constant = loss_denominator(mask, "seq-mean-token-sum-norm", max_tokens=10)
    assert aggregate(values, mask, "seq-mean-token-sum-norm", denominator=constant).item() == 8 / 20


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_nothing_to_learn_from_is_zero(mode: Aggregation) -> None:
    values = torch.ones(2, 3, requires_grad=True)
    loss = aggregate(values, torch.zeros(2, 3, dtype=torch.bool), mode)
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == 0
    assert not gradient.any()


def test_overlong_rows_leave_the_loss_and_its_denominator() -> None:
    values = torch.tensor([[1.0, 3.0], [100.0, 100.0]])
    mask = mask_overlong(torch.ones(2, 2, dtype=torch.bool), torch.tensor([False, True]))
    assert mask.tolist() == [[True, True], [False, False]]
    assert [aggregate(values, mask, mode).item() for mode in ("token-mean", "seq-mean-token-mean")] == [2.0, 2.0]


def test_kl_estimators_agree_in_expectation() -> None:
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy, reference = logits.log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * kl_penalty(policy, reference, estimator)).sum(), exact)
    assert (kl_penalty(policy, reference, "k3") >= 0).all()


def test_kl_gradients_on_policy_are_as_documented() -> None:
    """Expected gradient over the whole vocabulary: 0 for k1, of KL(pi, ref) for k2, of KL(ref, pi) for k3."""
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    policy, reference = logits.log_softmax(-1)[0], logits.detach().log_softmax(-1)[1]

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0][0]

    expected = {
        "k1": torch.zeros(6, dtype=torch.float64),
        "k2": gradient((policy.exp() * (policy - reference)).sum()),
        "k3": gradient((reference.exp() * (reference - policy)).sum()),
    }
    for estimator, theirs in expected.items():
        sampled = (policy.detach().exp() * kl_penalty(policy, reference, estimator)).sum()  # type: ignore[arg-type]
        torch.testing.assert_close(gradient(sampled), theirs)


def test_k3_of_a_far_token_is_bounded() -> None:
    far = torch.tensor([-50.0, 50.0], dtype=torch.float64)
    assert kl_penalty(far, torch.zeros(2, dtype=torch.float64), "k3").tolist() == [10.0, 10.0]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_straight_through_estimators_have_the_gradient_of_k2(estimator: Any) -> None:
    policy = torch.tensor([-1.0, -2.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.7, -1.0], dtype=torch.float64)
    through = kl_penalty(policy, reference, f"{estimator}+")  # type: ignore[arg-type]
    assert torch.equal(through, kl_penalty(policy, reference, estimator))
    slopes = [torch.autograd.grad(x.sum(), policy)[0] for x in (through, kl_penalty(policy, reference, "k2"))]
    assert torch.equal(*slopes)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_bias_correction_makes_value_and_gradient_those_of_the_policy(estimator: Any) -> None:
    """Over the whole vocabulary, sampled by another policy: exactly KL(pi, ref) and its gradient."""
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = logits[0].clone().requires_grad_()
    policy, sampler, reference = raw.log_softmax(-1), logits[1].log_softmax(-1), logits[2].log_softmax(-1)
    everything = torch.ones(6, dtype=torch.bool)
    ratio = token_log_ratio(policy, sampler, everything)
    ours = (sampler.exp() * kl_penalty(policy, reference, estimator, log_ratio=ratio)).sum()
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(*(torch.autograd.grad(x, raw, retain_graph=True)[0] for x in (ours, exact)))


@pytest.mark.parametrize("estimator", get_args(KLEstimator))
def test_masked_tokens_have_no_kl(estimator: Any) -> None:
    logprobs = torch.tensor([-1.0, NAN, -math.inf], requires_grad=True)
    reference, mask = torch.tensor([-2.0, -1.0, NAN]), torch.tensor([True, False, False])
    ratio = token_log_ratio(logprobs, torch.full((3,), -1.5), mask)
    value = kl_penalty(logprobs, reference, estimator, mask=mask, log_ratio=ratio)
    (slope,) = torch.autograd.grad(value.sum(), logprobs)
    assert value[1:].tolist() == slope[1:].tolist() == [0.0, 0.0]
    assert value[0] != 0
    assert slope[0] != 0


def test_value_loss_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0, NAN]], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([[0.8, 1.0, NAN]]).double(), torch.tensor([[2.0, 4.0, NAN]]).double()
    mask = torch.tensor([[True, True, False]])
    loss, flags = value_loss(values, old, returns, mask, clip=0.5)
    assert loss.tolist() == [[0.5, 0.5 * 2.5**2, 0.0]]  # the second is clipped to 1.5, further from 4
    assert flags["clip"].tolist() == [[False, True, False]]
    assert torch.autograd.grad(loss.sum(), values)[0].tolist() == [[-1.0, 0.0, 0.0]]
    loss, flags = value_loss(values, old, returns, mask)
    assert loss.tolist() == [[0.5, 0.5, 0.0]]
    assert not flags["clip"].any()
    with pytest.raises(ConfigError, match="value clip: expected a distance above 0"):
        value_loss(values, old, returns, mask, clip=0.0)


def test_reference_and_old_policy_get_no_gradient() -> None:
    fixed = torch.zeros(1, 2, requires_grad=True)
    moving = torch.zeros(1, 2, requires_grad=True)
    scores = Scores(moving, fixed, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    per_token, _ = clip(log_ratio(scores), scores)
    loss = (per_token + kl_penalty(moving, fixed, "k2")).sum()
    reached, unreached = torch.autograd.grad(loss, (moving, fixed), allow_unused=True)
    assert reached is not None
    assert unreached is None


def test_wrong_names_and_numbers_are_refused() -> None:
    values, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for denominator in (None, 1.0):
        with pytest.raises(UnknownName, match="did you mean 'token-mean'"):
            aggregate(values, mask, "token_mean", denominator=denominator)  # type: ignore[arg-type]
    for wrong in ("k4", "k2+"):
        with pytest.raises(UnknownName, match="unknown KL estimator 'k"):
            kl_penalty(values, values, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected max_tokens"):
        aggregate(values, mask, "seq-mean-token-sum-norm")
    with pytest.raises(TrainingError, match="above 0, got 0"):
        aggregate(values, mask, "token-mean", denominator=0.0)
    with pytest.raises(ConfigError, match="dual_clip: expected a ratio above 1"):
        clip(values, Scores(values, values, values, mask), dual_clip=1.0)
