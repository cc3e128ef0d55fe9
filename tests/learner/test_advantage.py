from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentrl.errors import ConfigError, NonFiniteError
from agentrl.learner.advantage import group_advantages, informative_groups, soft_overlong_penalty

torch.set_num_threads(1)
PROPERTY = settings(deadline=None)  # torch's first call is slow; pytest-timeout guards the whole

Rewarded = list[tuple[int, float]]
"""(group, reward) of each leaf."""

REWARDED = st.lists(st.tuples(st.integers(-2, 2), st.floats(-10, 10, width=32)), min_size=1, max_size=20)


def split(leaves: Rewarded) -> tuple[Tensor, Tensor]:
    group, rewards = zip(*leaves, strict=True)
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(group)


def test_grpo_by_hand() -> None:
    # group 7: mean 0.25, unbiased std 0.5; its leaves are not neighbours
    rewards = torch.tensor([1.0, 0.0, 3.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    group = torch.tensor([7, 7, 2, 7, 7, 2])
    expected = torch.tensor([0.75 / 0.5, -0.5, -1 / 2**0.5, -0.5, -0.5, 1 / 2**0.5], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, group, eps=0.0), expected)
    centered = torch.tensor([0.75, -0.25, -1.0, -0.25, -0.25, 1.0], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, group, normalize_std=False), centered)


@pytest.mark.parametrize("normalize_std", [True, False])
def test_equal_rewards_give_exactly_zero(normalize_std: bool) -> None:
    # (0.1 + 0.1 + 0.1) / 3 is not 0.1, and what is left must not be divided by eps
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert (
        group_advantages(rewards, torch.zeros(3, dtype=torch.int64), normalize_std=normalize_std).tolist() == [0.0] * 3
    )


def test_group_of_one_has_no_advantage() -> None:
    assert group_advantages(torch.tensor([1.0]), torch.tensor([0])).tolist() == [0.0]


@PROPERTY
@given(REWARDED, st.booleans())
def test_advantages_sum_to_zero_in_each_group(leaves: Rewarded, normalize_std: bool) -> None:
    rewards, group = split(leaves)
    advantages = group_advantages(rewards, group, normalize_std=normalize_std)
    assert advantages.isfinite().all()
    scale = advantages.abs().max().item() + 1e-9
    for name in {name for name, _ in leaves}:
        assert abs(advantages[group == name].sum().item()) <= 1e-7 * scale


@PROPERTY
@given(REWARDED)
def test_a_group_is_informative_iff_its_rewards_differ(leaves: Rewarded) -> None:
    rewards, group = split(leaves)
    expected = [len({r for g, r in leaves if g == own}) > 1 for own, _ in leaves]
    assert informative_groups(rewards, group).tolist() == expected


@PROPERTY
@given(REWARDED, st.randoms(use_true_random=False))
def test_order_of_leaves_does_not_matter(leaves: Rewarded, random: Random) -> None:
    rewards, group = split(leaves)
    order = torch.tensor(random.sample(range(len(leaves)), len(leaves)))
    shuffled = group_advantages(rewards[order], group[order])
    torch.testing.assert_close(shuffled, group_advantages(rewards, group)[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    assert group_advantages(torch.tensor([0, 1], dtype=dtype), torch.tensor([0, 0])).dtype == dtype


@pytest.mark.parametrize("function", [group_advantages, informative_groups])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_reward_is_refused_by_position(function: Callable[[Tensor, Tensor], Tensor], bad: float) -> None:
    with pytest.raises(NonFiniteError, match="at leaf 1"):
        function(torch.tensor([0.0, bad]), torch.tensor([0, 0]))


def test_overlong_penalty_is_linear_within_the_buffer() -> None:
    lengths = torch.tensor([0, 80, 85, 90, 100, 101, 1000])
    assert soft_overlong_penalty(lengths, 100, 20).tolist() == [0, 0, -0.25, -0.5, -1, -1, -1]


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_overlong_buffer_out_of_range_is_refused(buffer: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to max_tokens = 100"):
        soft_overlong_penalty(torch.tensor([1]), 100, buffer)
