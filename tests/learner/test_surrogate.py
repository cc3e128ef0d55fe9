from __future__ import annotations

import inspect
import math
from dataclasses import fields, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentrl import config
from agentrl.errors import ConfigError, UnknownName
from agentrl.learner.loss import Aggregation, Level, Scores, aggregate, log_ratio, loss_denominator, surrogate_metrics
from agentrl.learner.selection import group_baseline, select_clip_cov, select_kl_cov
from agentrl.learner.surrogate import (
    SURROGATES,
    aepo,
    cispo,
    clip,
    clip_cov,
    dppo,
    find_surrogate,
    gmpo,
    gvpo,
    ipo,
    kl_cov,
    reinforce,
    rollout_is,
    sapo,
    unclipped,
    vespo,
)

torch.set_num_threads(1)
NAN = float("nan")
GROUP = torch.tensor([0, 0, 1, 1, 1, 2])

VARIANTS: list[tuple[str, Level, dict[str, Any]]] = [
    *((name, level, {}) for name, surrogate in SURROGATES.items() for level in surrogate.levels),
    ("clip", "token", {"clip_high": 0.28, "dual_clip": 3.0}),
    ("clip", "sequence", {"clip_low": 3e-4, "clip_high": 4e-4}),
    ("cispo", "token", {"clip_high": 1.2, "absolute": True, "floor": 0.9}),
    ("dppo", "token", {"kind": "kl", "kl_tau": 1e-3}),
]
IDS = [f"{name}-{level}{'-' if options else ''}{'-'.join(options)}" for name, level, options in VARIANTS]


def batch(seed: int = 0, *, moved: float = 0.5) -> Scores:
    """Six trajectories in three groups, with tool results within, padding and one row that is all masked."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    lengths = torch.tensor([7, 5, 6, 3, 0, 4])
    mask = (torch.arange(7) < lengths[:, None]) & (torch.rand(6, 7, generator=noise) > 0.2)
    old = -normal(6, 7).abs() - 0.05
    scores = Scores(
        logprobs=old + moved * normal(6, 7),
        old_logprobs=old,
        advantages=normal(6, 1).expand(6, 7),
        mask=mask,
        turn=(torch.arange(7) // 3).expand(6, 7).masked_fill(~mask, -1),
        entropies=normal(6, 7).abs(),
        sampled_logprobs=old + 0.3 * moved * normal(6, 7),
        selected=torch.rand(6, 7, generator=noise) < 0.3,
    )
    baseline, size = group_baseline(log_ratio(scores), mask, GROUP)
    return replace(scores, baseline=baseline, group_size=size)


def rows(scores: Scores, start: int, stop: int) -> Scores:
    parts = {field.name: getattr(scores, field.name) for field in fields(scores)}
    return Scores(**{name: value if value is None else value[start:stop] for name, value in parts.items()})


def evaluate(
    name: str, level: Level, options: dict[str, Any], scores: Scores, mode: Aggregation, denominator: float
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Loss per token, aggregated loss, its gradient, flags."""
    scores = replace(scores, logprobs=scores.logprobs.clone().requires_grad_())
    surrogate = SURROGATES[name]
    ratio = log_ratio(scores, level, anchor=surrogate.anchor)
    loss, flags = surrogate.function(ratio, scores, **options)
    total = aggregate(loss, scores.mask, mode, denominator=denominator)
    (gradient,) = torch.autograd.grad(total, scores.logprobs)
    return loss.detach(), total.detach(), gradient, flags


@pytest.mark.parametrize(("name", "level", "options"), VARIANTS, ids=IDS)
def test_masked_tokens_have_no_part_in_anything(name: str, level: Level, options: dict[str, Any]) -> None:
    scores = batch()
    masked = ~scores.mask
    clean = evaluate(name, level, options, scores, "seq-mean-token-mean", 5.0)
    holes = {
        field: getattr(scores, field).masked_fill(masked, NAN)
        for field in ("logprobs", "advantages", "entropies", "sampled_logprobs")
    }
    holes["old_logprobs"] = scores.old_logprobs.masked_fill(masked, -math.inf)
    loss, total, gradient, flags = evaluate(name, level, options, replace(scores, **holes), "seq-mean-token-mean", 5.0)
    assert (loss[masked] == 0).all()
    assert (gradient[masked] == 0).all()
    assert torch.equal(loss, clean[0])
    assert total == clean[1]
    assert torch.equal(gradient, clean[2])
    assert gradient[scores.mask].any()
    assert not any(flag[masked].any() for flag in flags.values())


@pytest.mark.parametrize(("name", "level", "options"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_sum_to_the_full_batch(name: str, level: Level, options: dict[str, Any], size: int) -> None:
    scores, mode = batch(), "seq-mean-token-mean"
    denominator = loss_denominator(scores.mask, mode)
    _, total, gradient, flags = evaluate(name, level, options, scores, mode, denominator)
    parts = [
        evaluate(name, level, options, rows(scores, start, start + size), mode, denominator)
        for start in range(0, len(scores.mask), size)
    ]
    torch.testing.assert_close(sum(part[1] for part in parts), total, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), gradient, rtol=1e-12, atol=1e-16)
    for flag in flags:
        assert torch.equal(torch.cat([part[3][flag] for part in parts]), flags[flag])


@pytest.mark.parametrize(("name", "level", "options"), VARIANTS, ids=IDS)
def test_on_policy_the_gradient_is_that_of_reinforce(name: str, level: Level, options: dict[str, Any]) -> None:
    scores = batch(moved=0.0)
    scores = replace(scores, selected=torch.zeros_like(scores.mask) if name == "clip_cov" else scores.selected)
    _, _, gradient, flags = evaluate(name, level, options, scores, "seq-mean-token-mean", 5.0)
    lengths = scores.mask.sum(-1, keepdim=True).clamp(min=1)
    expected = (-scores.advantages / lengths / 5.0) * scores.mask
    if name == "gvpo":  # a loss of the trajectory: not divided by its length, but by its group's
        size = scores.group_size.unsqueeze(-1)
        expected = torch.where(size > 1, expected * lengths * 0.1 * size / (size - 1).clamp(min=1), 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-16)
    assert not any(flag.any() for name, flag in flags.items() if name != "selected")


@pytest.mark.parametrize(("name", "level", "options"), VARIANTS, ids=IDS)
def test_float32_stays_and_far_ratios_are_finite(name: str, level: Level, options: dict[str, Any]) -> None:
    scores = batch()
    single = {f: getattr(scores, f).float() for f in ("advantages", "entropies", "baseline")}
    far = torch.where(torch.arange(7) % 2 == 0, -0.01, -500.0).expand(6, 7)
    near = torch.where(torch.arange(7) % 3 == 0, -0.01, -500.0).expand(6, 7)
    scores = replace(scores, **single, logprobs=far, old_logprobs=near, sampled_logprobs=near)
    loss, _, gradient, _ = evaluate(name, level, options, scores, "seq-mean-token-mean", 5.0)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


# -- one by one --------------------------------------------------------------------------------------------------------


def tokens(ratio: Any, advantages: Any, **more: Tensor) -> tuple[Tensor, Scores]:
    """One trajectory per row with these ratios; the policy's own log-prob is log(0.3 ratio)."""
    old = torch.full_like(torch.tensor(ratio, dtype=torch.float64), 0.3).log()
    logprobs = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    spread = torch.tensor(advantages, dtype=torch.float64).expand_as(old)
    scores = Scores(logprobs, old, spread, torch.ones_like(old, dtype=torch.bool), sampled_logprobs=old, **more)
    return log_ratio(scores), scores


def per_token_gradient(loss: Tensor, scores: Scores) -> list[float]:
    (gradient,) = torch.autograd.grad(loss.sum(), scores.logprobs, retain_graph=True)
    return [float(x) for x in gradient.flatten()]


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
    d, scores = tokens([[ratio]], advantage)
    ours, _ = clip(d, scores, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    assert ours.item() == pytest.approx(loss, rel=1e-12)
    assert per_token_gradient(ours, scores) == [pytest.approx(-advantage * ratio if has_gradient else 0.0, rel=1e-12)]


def test_clip_metrics_by_hand() -> None:
    d, scores = tokens([[0.5, 1.5, 5.0, 1.0], [0.5, 4.0, 1.2, 9.0]], [[-1.0], [1.0]])
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    _, flags = clip(d, replace(scores, mask=mask), clip_high=0.28, dual_clip=3.0)
    metrics = surrogate_metrics(flags, d.detach(), mask)
    shares = {name: round(value.item() * 7, 9) for name, value in metrics.items() if name != "approx_kl"}
    assert shares == {
        "clip_ratio/low_mean": 1,
        "clip_ratio/high_mean": 1,
        "clip_ratio/region_mean": 2,
        "clip_ratio/dual_mean": 1,
    }
    assert metrics["approx_kl"].item() == pytest.approx(-d[mask].mean().item())
    _, without = clip(d, scores)
    assert set(without) == {"low", "high", "region"}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_packed_tokens_give_the_same_losses(seed: int) -> None:
    scores = batch(seed)
    loss, flags = clip(log_ratio(scores), scores, clip_high=0.28, dual_clip=3.0)
    mask = scores.mask
    everything = torch.ones(int(mask.sum()), dtype=torch.bool)
    packed = Scores(scores.logprobs[mask], scores.old_logprobs[mask], scores.advantages[mask], everything)
    packed_loss, packed_flags = clip(log_ratio(packed), packed, clip_high=0.28, dual_clip=3.0)
    assert torch.equal(packed_loss, loss[mask])
    assert all(torch.equal(packed_flags[name], flags[name][mask]) for name in flags)


def test_aepo_has_the_value_of_the_clip_and_keeps_the_gradient_above_it() -> None:
    d, scores = tokens([[0.5, 1.1, 1.5, 4.0], [0.5, 1.1, 1.5, 4.0]], [[2.0], [-2.0]])
    ours, _ = aepo(d, scores, clip_high=0.28)
    theirs, _ = clip(d, scores, clip_high=0.28, dual_clip=3.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    expected = per_token_gradient(theirs, scores)
    assert expected[2] == expected[3] == 0.0
    expected[2] = expected[3] = -2.0 * 1.28
    assert per_token_gradient(ours, scores) == pytest.approx(expected, rel=1e-12)


def test_gmpo_is_the_geometric_mean_of_one_sided_clips() -> None:
    d, scores = tokens([[0.5, 1.1, 2.0], [0.5, 1.1, 2.0]], [[2.0], [-2.0]])
    loss, flags = gmpo(d, scores)
    up = (0.5 * 1.1 * math.exp(0.4)) ** (1 / 3)
    down = (math.exp(-0.4) * 1.1 * 2.0) ** (1 / 3)
    assert loss[:, 0].tolist() == pytest.approx([-2 * up, 2 * down], rel=1e-12)
    assert (loss == loss[:, :1]).all()
    means = loss.mean(-1)  # as "seq-mean-token-mean" takes them
    assert per_token_gradient(means, scores) == pytest.approx(
        [-2 * up / 3, -2 * up / 3, 0.0, 0.0, 2 * down / 3, 2 * down / 3], rel=1e-12
    )
    assert flags["region"].tolist() == [[False, False, True], [True, False, False]]


def test_cispo_bounds_the_weight_and_never_the_gradient() -> None:
    d, scores = tokens([[0.05, 1.0, 3.0, 9.0]], 2.0)
    for options in ({"clip_high": 4.0}, {"clip_high": 5.0, "absolute": True}):
        loss, flags = cispo(d, scores, floor=0.1, **options)
        assert per_token_gradient(loss, scores) == pytest.approx([-0.2, -2.0, -6.0, -10.0], rel=1e-12)
        assert flags["region"].tolist() == [[True, False, False, True]]


def test_rollout_is_drops_what_cispo_bounds() -> None:
    d, scores = tokens([[0.4, 0.6, 1.9, 2.1]], 2.0)
    loss, flags = rollout_is(d, scores)
    assert per_token_gradient(loss, scores) == pytest.approx([0.0, -1.2, -3.8, 0.0], rel=1e-12)
    assert flags["low"].tolist() == [[True, False, False, False]]
    assert flags["high"].tolist() == [[False, False, False, True]]


def test_reinforce_looks_at_no_ratio() -> None:
    d, scores = tokens([[0.4, 2.1]], 2.0)
    loss, flags = reinforce(d, scores)
    assert per_token_gradient(loss, scores) == [-2.0, -2.0]
    assert torch.equal(loss, -2.0 * scores.logprobs)
    assert not flags


def test_sapo_fades_by_the_sign_of_the_advantage() -> None:
    d, scores = tokens([[3.0], [3.0]], [[1.0], [-1.0]])
    loss, _ = sapo(d, scores, tau_positive=1.0, tau_negative=2.0)
    up, down = 4 / (1 + math.exp(-2.0)), 2 / (1 + math.exp(-4.0))
    assert loss.flatten().tolist() == pytest.approx([-up, down], rel=1e-12)


def test_unclipped_is_never_cut_off() -> None:
    d, scores = tokens([[0.1, 9.0], [0.1, 9.0]], [[2.0], [-2.0]])
    loss, flags = unclipped(d, scores)
    assert per_token_gradient(loss, scores) == pytest.approx([-0.2, -18.0, 0.2, 18.0], rel=1e-12)
    assert not flags


@pytest.mark.parametrize(
    ("kind", "ratio", "advantage", "dropped"),
    [
        ("tv", 1.6, 1.0, False),  # 0.48 - 0.30 = 0.18
        ("tv", 1.7, 1.0, True),  # 0.21
        ("tv", 1.7, -1.0, False),  # a bad token that became likely is still pushed down
        ("tv", 0.3, -1.0, True),
        ("tv", 0.3, 1.0, False),
        ("kl", 1.4, 1.0, False),  # 0.0322 nats
        ("kl", 1.6, 1.0, True),  # 0.0694
        ("kl", 1.6, -1.0, False),
        ("kl", 0.3, -1.0, True),
    ],
)
def test_dppo_drops_what_moved_far_the_way_it_is_pushed(
    kind: Any, ratio: float, advantage: float, dropped: bool
) -> None:
    d, scores = tokens([[ratio]], advantage)
    loss, flags = dppo(d, scores, kind=kind)
    assert loss.item() == pytest.approx(0.0 if dropped else -advantage * ratio, rel=1e-12)
    assert flags["region"].item() is dropped
    pulled, _ = dppo(d, scores, kind=kind, kl_tau=0.1)
    assert pulled.item() == pytest.approx(loss.item() + 0.1 * math.log(ratio) ** 2, rel=1e-12)


def test_ipo_drops_in_both_directions() -> None:
    d, scores = tokens([[1.7, 0.3, 1.1]], -1.0)
    loss, flags = ipo(d, scores, kl_tau=0.0)
    assert loss.flatten().tolist() == pytest.approx([0.0, 0.0, 1.1], rel=1e-12)
    assert [flags[name].tolist() for name in ("low", "high")] == [[[False, True, False]], [[True, False, False]]]


def test_vespo_weighs_by_the_ratio_of_the_sequence() -> None:
    d, scores = tokens([[1.5, 0.8], [1.5, 0.8]], [[2.0], [-2.0]])
    loss, _ = vespo(d, scores)
    w = 1.5 * 0.8
    up, down = math.exp(3 - 3 * w) * w**2, math.exp(2 - 2 * w) * w**3
    assert per_token_gradient(loss, scores) == pytest.approx([-2 * up, -2 * up, 2 * down, 2 * down], rel=1e-12)


def test_gvpo_by_hand() -> None:
    d, scores = tokens([[1.5, 0.8], [1.2, 1.1], [2.0, 2.0]], [[0.5], [-0.5], [3.0]])
    baseline, size = group_baseline(d, scores.mask, torch.tensor([7, 7, 4]))
    loss, _ = gvpo(d, replace(scores, baseline=baseline, group_size=size), beta=0.5)
    implicit = [math.log(1.5 * 0.8), math.log(1.2 * 1.1)]
    error = [0.5 * (r - sum(implicit) / 2) - a for r, a in zip(implicit, (0.5, -0.5), strict=True)]
    expected = [0.5 * e * e * 2 for e in error]
    assert loss[:, 0].tolist() == pytest.approx([*expected, 0.0], rel=1e-12)  # alone in its group: no loss
    slopes = [e * 0.5 * 2 for e in error for _ in range(2)]
    assert per_token_gradient(loss.mean(-1), scores) == pytest.approx([*slopes, 0.0, 0.0], rel=1e-12)


def test_covariance_surrogates_act_on_selected_tokens_alone() -> None:
    selected = torch.tensor([[True, False, True]])
    d, scores = tokens([[1.1, 1.1, 3.0]], 2.0, selected=selected)
    loss, flags = clip_cov(d, scores)
    assert loss.flatten().tolist() == pytest.approx([0.0, -2.2, 0.0])
    assert torch.equal(flags["selected"], selected)
    loss, _ = kl_cov(d, scores, coef=0.5)
    assert loss.flatten().tolist() == pytest.approx([-2.2 + 0.5 * math.log(1.1), -2.2, -6 + 0.5 * math.log(3.0)])


def test_selection_is_ready_for_the_surrogates() -> None:
    scores = replace(batch(), selected=None)
    ratio = log_ratio(scores)
    chosen = select_clip_cov(ratio, scores, fraction=0.2, low=0.0, generator=torch.Generator().manual_seed(0))
    for function, selected in ((clip_cov, chosen), (kl_cov, select_kl_cov(scores, fraction=0.2))):
        _, flags = function(ratio, replace(scores, selected=selected))
        assert torch.equal(flags["selected"], selected)
        assert selected.any()


# -- the registry, and bad input ---------------------------------------------------------------------------------------


def test_the_configuration_offers_exactly_these() -> None:
    assert set(SURROGATES) == set(get_args(config.Surrogate))


@pytest.mark.parametrize("name", SURROGATES)
def test_options_are_keywords_with_defaults(name: str) -> None:
    log_ratio_, scores, *options = inspect.signature(SURROGATES[name].function).parameters.values()
    assert (log_ratio_.name, scores.name) == ("log_ratio", "scores")
    for option in options:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.default is not inspect.Parameter.empty


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'cispo'"):
        find_surrogate("cispoo")
    assert find_surrogate("cispo").function is cispo
    d, scores = tokens([[1.0]], 1.0)
    with pytest.raises(UnknownName, match="DPPO divergence 'js'"):
        dppo(d, scores, kind="js")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, surrogate in SURROGATES.items() if surrogate.needs])
def test_what_is_needed_and_missing_is_named(name: str) -> None:
    surrogate, scores = SURROGATES[name], batch()
    for field in surrogate.needs:
        with pytest.raises(ConfigError, match=f"'{name}': expected Scores.{field}, got none"):
            surrogate.function(log_ratio(scores), replace(scores, **{field: None}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip", {"dual_clip": 1.0}, "dual_clip: expected a ratio above 1"),
        ("aepo", {"dual_clip": 0.5}, "dual_clip: expected a ratio above 1"),
        ("clip", {"clip_low": -0.1}, "clip_low: expected a number of 0 or above"),
        ("gmpo", {"clip_high": NAN}, "clip_high: expected a number of 0 or above, got nan"),
        ("clip_cov", {"clip_low": -1.0}, "clip_low"),
        ("rollout_is", {"clip_low": -1.0}, "clip_low"),
        ("cispo", {"clip_high": 0.2, "absolute": True}, "upper bound of the ratio above 1, got 0.2"),
        ("cispo", {"floor": -9.0}, r"floor: expected a lower bound of the ratio within \[0, 1\]"),
        ("sapo", {"tau_negative": 0.0}, "sapo: expected tau above 0"),
        ("vespo", {"k_negative": -1.0}, "vespo k: expected"),
        ("vespo", {"lambda_positive": -1.0}, "vespo lambda: expected"),
        ("gvpo", {"beta": 0.0}, "gvpo beta: expected a number above 0"),
        ("kl_cov", {"coef": -1.0}, "kl_cov coef"),
        ("dppo", {"delta_low": -1.0}, "dppo delta_low"),
        ("dppo", {"delta_high": -1.0}, "dppo delta_high"),
        ("dppo", {"kl_tau": -1.0}, "kl_tau"),
        ("ipo", {"delta": -1.0}, "ipo delta"),
    ],
)
def test_wrong_numbers_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    scores = batch()
    with pytest.raises(ConfigError, match=message):
        SURROGATES[name].function(log_ratio(scores), scores, **options)
