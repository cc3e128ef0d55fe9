from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentrl.errors import ConfigError, TrainingError, UnknownName
from agentrl.learner.loss import (
    Aggregation,
    aggregate,
    clipped_surrogate,
    kl_penalty,
    loss_denominator,
    mask_overlong,
    policy_loss,
    token_log_ratio,
)

torch.set_num_threads(1)
PROPERTY = settings(deadline=None)  # torch's first call is slow; pytest-timeout guards the whole

MODES = get_args(Aggregation)
MAX_TOKENS = 9


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Tensor]:
    """Random log-probs off policy by up to a few nats, with holes, padding and whole rows masked."""
    leaves, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    cells = st.lists(st.booleans(), min_size=leaves * tokens, max_size=leaves * tokens)
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    old = -torch.rand(leaves, tokens, generator=noise, dtype=torch.float64)
    return {
        "old_logprobs": old,
        "logprobs": old + 0.5 * torch.randn(leaves, tokens, generator=noise, dtype=torch.float64),
        "advantages": torch.randn(leaves, generator=noise, dtype=torch.float64),
        "mask": torch.tensor(draw(cells)).reshape(leaves, tokens),
    }


def loss_and_gradient(
    batch: dict[str, Tensor], mode: Aggregation, denominator: float, **clip: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logprobs = batch["logprobs"].clone().requires_grad_()
    per_token, metrics = policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], batch["mask"], **clip)
    loss = aggregate(per_token, batch["mask"], mode, denominator=denominator)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient, metrics


@PROPERTY
@given(batches(), st.sampled_from(MODES), st.integers(1, 4))
def test_micro_batches_sum_to_the_full_batch(batch: dict[str, Tensor], mode: Aggregation, size: int) -> None:
    length = MAX_TOKENS if mode == "seq-mean-token-sum-norm" else None
    whole = max(loss_denominator(batch["mask"], mode, max_tokens=length), 1.0)
    tokens = max(batch["mask"].sum().item(), 1)
    loss, gradient, metrics = loss_and_gradient(batch, mode, whole, tokens=tokens)
    starts = range(0, len(batch["mask"]), size)
    rows = [{name: tensor[i : i + size] for name, tensor in batch.items()} for i in starts]
    parts = [loss_and_gradient(row, mode, whole, tokens=tokens) for row in rows]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-12, atol=0)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(part[2][name] for part in parts), value, rtol=1e-12, atol=1e-14)
    parts_denominator = sum(loss_denominator(row["mask"], mode, max_tokens=length) for row in rows)
    assert parts_denominator == loss_denominator(batch["mask"], mode, max_tokens=length)


@PROPERTY
@given(batches())
def test_loss_and_log_ratio_are_zero_where_masked(batch: dict[str, Tensor]) -> None:
    masked = ~batch["mask"]
    log_ratio = token_log_ratio(batch["logprobs"], batch["old_logprobs"], batch["mask"])
    per_token, _ = policy_loss(batch["logprobs"], batch["old_logprobs"], batch["advantages"], batch["mask"])
    assert not log_ratio[masked].any()
    assert not per_token[masked].any()


@PROPERTY
@given(batches(), st.sampled_from(MODES), st.sampled_from([None, 1.5]))
def test_masked_tokens_have_no_part_in_anything(
    batch: dict[str, Tensor], mode: Aggregation, dual_clip: float | None
) -> None:
    clean = loss_and_gradient(batch, mode, 3.0, dual_clip=dual_clip)
    masked = ~batch["mask"]
    rubbish = batch | {
        "logprobs": batch["logprobs"].masked_fill(masked, float("nan")),
        "old_logprobs": batch["old_logprobs"].masked_fill(masked, float("-inf")),
    }
    loss, gradient, metrics = loss_and_gradient(rubbish, mode, 3.0, dual_clip=dual_clip)
    assert loss == clean[0]
    assert (gradient[masked] == 0).all()
    assert torch.equal(gradient, clean[1])
    assert metrics == clean[2]


@PROPERTY
@given(batches())
def test_packed_tokens_give_the_same_losses(batch: dict[str, Tensor]) -> None:
    logprobs, old, advantages, mask = (batch[n] for n in ("logprobs", "old_logprobs", "advantages", "mask"))
    per_token, metrics = policy_loss(logprobs, old, advantages, mask, clip_high=0.28, dual_clip=3.0)
    leaf = mask.nonzero()[:, 0]
    everything = torch.ones_like(leaf, dtype=torch.bool)
    packed, packed_metrics = policy_loss(
        logprobs[mask], old[mask], advantages[leaf], everything, clip_high=0.28, dual_clip=3.0
    )
    assert torch.equal(packed, per_token[mask])
    torch.testing.assert_close(packed_metrics, metrics)


@PROPERTY
@given(batches())
def test_on_policy_the_gradient_is_that_of_reinforce(batch: dict[str, Tensor]) -> None:
    on_policy = batch | {"logprobs": batch["old_logprobs"]}
    _, gradient, metrics = loss_and_gradient(on_policy, "token-mean", 1.0, dual_clip=3.0)
    torch.testing.assert_close(gradient, -batch["advantages"].unsqueeze(-1) * batch["mask"], rtol=1e-12, atol=0)
    assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "has_gradient"),
    [
        (2.0, 1.1, -2.2, True),
        (2.0, 1.27, -2.54, True),  # inside only because of clip-higher
        (2.0, 1.5, -2.56, False),
        (2.0, 0.5, -1.0, True),  # a good token that became unlikely is always pushed back up
        (-2.0, 0.9, 1.8, True),
        (-2.0, 0.5, 1.6, False),
        (-2.0, 2.0, 4.0, True),  # a bad token that became likely, likewise down
        (-2.0, 5.0, 6.0, False),  # until dual clip
    ],
)
def test_clip_by_hand(advantage: float, ratio: float, loss: float, has_gradient: bool) -> None:
    log_ratio = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor(advantage, dtype=torch.float64)
    ours = clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    assert ours.item() == pytest.approx(loss, rel=1e-12)
    (gradient,) = torch.autograd.grad(ours, log_ratio)
    assert gradient.item() == pytest.approx(-advantage * ratio if has_gradient else 0.0, rel=1e-12)


def test_clip_metrics_by_hand() -> None:
    ratio = torch.tensor([[0.5, 1.5, 5.0, 1.0], [0.5, 4.0, 1.2, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    advantages = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    _, metrics = policy_loss(ratio.log(), torch.zeros_like(ratio), advantages, mask, clip_high=0.28, dual_clip=3.0)
    shares = {name: round(value.item() * 7, 9) for name, value in metrics.items() if name != "approx_kl"}
    assert shares == {
        "clip_ratio/low_mean": 1,
        "clip_ratio/high_mean": 1,
        "clip_ratio/region_mean": 2,
        "clip_ratio/dual_mean": 1,
    }
    assert metrics["approx_kl"].item() == pytest.approx(-ratio.log()[mask].mean().item())


def test_extreme_ratio_stays_finite() -> None:
    logprobs = torch.tensor([[0.0, -1000.0]], dtype=torch.float64)
    per_token, _ = policy_loss(logprobs, -1000 - logprobs, torch.tensor([-1.0]), torch.ones(1, 2, dtype=torch.bool))
    assert per_token.isfinite().all()


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


def test_reference_and_old_policy_get_no_gradient() -> None:
    fixed = torch.zeros(1, 2, requires_grad=True)
    moving = torch.zeros(1, 2, requires_grad=True)
    per_token, _ = policy_loss(moving, fixed, torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
    loss = (per_token + kl_penalty(moving, fixed, "k2")).sum()
    reached, unreached = torch.autograd.grad(loss, (moving, fixed), allow_unused=True)
    assert reached is not None
    assert unreached is None


def test_wrong_names_and_numbers_are_refused() -> None:
    values, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for denominator in (None, 1.0):
        with pytest.raises(UnknownName, match="did you mean 'token-mean'"):
            aggregate(values, mask, "token_mean", denominator=denominator)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="unknown KL estimator 'k4'"):
        kl_penalty(values, values, "k4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected max_tokens"):
        aggregate(values, mask, "seq-mean-token-sum-norm")
    with pytest.raises(TrainingError, match="above 0, got 0"):
        aggregate(values, mask, "token-mean", denominator=0.0)
    with pytest.raises(ConfigError, match="dual_clip: expected a ratio above 1"):
        policy_loss(values, values, torch.ones(1), mask, dual_clip=1.0)
