from __future__ import annotations

import statistics
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentrl.errors import ConfigError, NonFiniteError, UnknownName
from agentrl.learner.advantage import (
    batch_normalized_advantages,
    best_of_group_advantages,
    gpg_advantages,
    group_advantages,
    group_std,
    informative_groups,
    leave_one_out_advantages,
    maxrl_advantages,
    opo_advantages,
    raft_advantages,
    reinforce_rej_advantages,
    remax_advantages,
    soft_overlong_penalty,
    tree_advantages,
    tree_renormalized_advantages,
)

torch.set_num_threads(1)
PROPERTY = settings(deadline=None)  # torch's first call is slow; pytest-timeout guards the whole

Rewarded = list[tuple[int, float]]
"""(group, reward) of each leaf."""
Estimator = Callable[[Tensor, Tensor], Tensor]

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


GROUPED: dict[str, Estimator] = {
    "grpo": group_advantages,
    "dr_grpo": lambda r, g: group_advantages(r, g, normalize_std=False),
    "batch": batch_normalized_advantages,
    "rloo": leave_one_out_advantages,
    "opo": lambda r, g: opo_advantages(r, torch.ones_like(g), g),
    "gpg": gpg_advantages,
    "pass@k": best_of_group_advantages,
    "pass@k, std": lambda r, g: best_of_group_advantages(r, g, normalize_std=True),
    "tree": lambda r, g: tree_advantages(r, g, g),
    "tree, twice": lambda r, g: tree_renormalized_advantages(r, g, g),
}
"""Estimators that compare the leaves of a group and do not change when all rewards are shifted."""
COMPARING: dict[str, Estimator] = GROUPED | {"maxrl": maxrl_advantages, "reinforce-rej": reinforce_rej_advantages}


@pytest.mark.parametrize("name", COMPARING)
def test_groups_that_say_nothing_get_exactly_zero_beside_one_that_says_something(name: str) -> None:
    rewards = torch.tensor([0.1, 1.0, 0.1, 0.7, 0.1, 0.25], dtype=torch.float64)
    group = torch.tensor([5, 1, 5, 3, 5, 1])  # 5: three times 0.1; 3: a leaf alone
    advantages = COMPARING[name](rewards, group)
    assert advantages[[0, 2, 3, 4]].tolist() == [0.0] * 4
    assert advantages[1] > 0


@PROPERTY
@given(REWARDED, st.sampled_from(sorted(GROUPED)), st.randoms(use_true_random=False))
def test_estimators_are_finite_blind_to_order_and_to_a_shift(leaves: Rewarded, name: str, random: Random) -> None:
    rewards, group = split(leaves)
    rewards = (rewards * 8).round() / 8  # so that a shift loses no digit and equal stays equal
    advantages = GROUPED[name](rewards, group)
    assert advantages.isfinite().all()
    torch.testing.assert_close(GROUPED[name](rewards + 3, group), advantages, rtol=1e-9, atol=1e-9)
    order = torch.tensor(random.sample(range(len(leaves)), len(leaves)))
    torch.testing.assert_close(GROUPED[name](rewards[order], group[order]), advantages[order], rtol=1e-9, atol=1e-9)
    if not name.startswith("pass@k"):
        sums = torch.zeros(5, dtype=torch.float64).index_add(0, group + 2, advantages)
        assert sums.abs().max() <= 1e-9 * (1 + advantages.abs().sum())


@PROPERTY
@given(REWARDED)
def test_leave_one_out_and_best_of_group_are_what_a_leaf_adds(leaves: Rewarded) -> None:
    rewards, group = split(leaves)
    left_out, best = leave_one_out_advantages(rewards, group), best_of_group_advantages(rewards, group)
    for i, (name, reward) in enumerate(leaves):
        others = [r for j, (g, r) in enumerate(leaves) if g == name and j != i]
        loo = reward - sum(others) / len(others) if others else 0.0
        assert left_out[i].item() == pytest.approx(loo, rel=1e-9, abs=1e-9)
        assert best[i].item() == (max(reward, *others) - max(others) if others else 0.0)


@PROPERTY
@given(REWARDED)
def test_group_std_is_the_unbiased_deviation(leaves: Rewarded) -> None:
    rewards, group = split(leaves)
    for (name, _), found in zip(leaves, group_std(rewards, group).tolist(), strict=True):
        own = [r for g, r in leaves if g == name]
        assert found == pytest.approx(statistics.stdev(own) if len(own) > 1 else 0.0, rel=1e-9, abs=1e-12)
        assert (found == 0) == (len(set(own)) == 1)


def test_a_shared_best_earns_nothing() -> None:
    group = torch.zeros(3, dtype=torch.int64)
    assert best_of_group_advantages(torch.tensor([1.0, 1.0, 0.0]), group).tolist() == [0, 0, 0]
    assert best_of_group_advantages(torch.tensor([1.0, 0.0, 0.0]), group).tolist() == [1, 0, 0]
    scaled = best_of_group_advantages(torch.tensor([1.0, 0.0, 0.0]), group, normalize_std=True, eps=0.0)
    torch.testing.assert_close(scaled, torch.tensor([3**0.5, 0.0, 0.0]))


def test_batch_spread_is_that_of_all_rewards() -> None:
    # a nearly solved group and an even one; the unbiased deviation of 1, 1, 1, 0, 1, 0 is sqrt(4/15)
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    expected = torch.tensor([0.25, 0.25, 0.25, -0.75, 0.5, -0.5], dtype=torch.float64) / (4 / 15) ** 0.5
    torch.testing.assert_close(batch_normalized_advantages(rewards, group, eps=0.0), expected)


@PROPERTY
@given(REWARDED, st.data())
def test_opo_baseline_weighs_by_length(leaves: Rewarded, data: st.DataObject) -> None:
    rewards, group = split(leaves)
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=len(leaves), max_size=len(leaves))))
    advantages = opo_advantages(rewards, lengths, group)
    assert advantages.isfinite().all()
    for name in {name for name, _ in leaves}:
        assert abs((lengths * advantages)[group == name].sum().item()) <= 1e-9
    by_hand = opo_advantages(torch.tensor([1.0, 0.0]), torch.tensor([1, 3]), torch.tensor([0, 0]))
    assert by_hand.tolist() == [0.75, -0.25]


def test_a_group_without_a_token_has_no_opo_advantage() -> None:
    zero = torch.zeros(2, dtype=torch.int64)
    assert opo_advantages(torch.tensor([1.0, 0.0]), zero, zero).tolist() == [0, 0]


def test_maxrl_weighs_by_the_success_rate() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    assert maxrl_advantages(rewards, group).tolist() == [3, -1, -1, -1, 1, -1]
    with pytest.raises(ConfigError, match=r"expected rewards of 0 and above, got -0\.5"):
        maxrl_advantages(torch.tensor([1.0, -0.5]), torch.tensor([0, 0]))


def test_gpg_counts_leaves_with_gradient_or_verls_rewards() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # 2 of 6 leaves have a gradient, 1 of 6 a reward
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    assert gpg_advantages(rewards, group).tolist() == [1.5, -1.5, 0, 0, 0, 0]
    assert gpg_advantages(rewards, group, valid="nonzero", f_norm=2.0).tolist() == [1.5, -1.5, 0, 0, 0, 0]
    assert gpg_advantages(rewards, group, valid="nonzero").tolist() == [3, -3, 0, 0, 0, 0]
    with pytest.raises(UnknownName, match="informative"):
        gpg_advantages(rewards, group, valid="informativ")  # type: ignore[arg-type]


def test_estimators_without_a_group_baseline() -> None:
    rewards = torch.tensor([1.0, -1.0, 0.5])
    assert raft_advantages(rewards).tolist() == [1, 0, 0.5]
    assert reinforce_rej_advantages(rewards, torch.tensor([0, 0, 1])).tolist() == [1, -1, 0]
    assert remax_advantages(rewards, torch.tensor([1.0, 0.0, -0.5])).tolist() == [0, -1, 1]


def test_tree_adds_the_comparison_over_the_task_and_within_the_tree() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 4.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 0, 1])
    subtree = torch.tensor([0, 0, 1, 1, 0])  # tree 0 of task 1 is another tree
    inter = tree_advantages(rewards, group, subtree, intra=False, normalize_std=False)
    intra = tree_advantages(rewards, group, subtree, inter=False, normalize_std=False)
    assert inter.tolist() == [0.25, -0.75, 0.25, 0.25, 0]
    assert intra.tolist() == [0.5, -0.5, 0, 0, 0]
    both = tree_advantages(rewards, group, subtree, normalize_std=False)
    assert both.tolist() == (inter + intra).tolist()
    with pytest.raises(ConfigError, match="expected inter, intra or both"):
        tree_advantages(rewards, group, subtree, inter=False, intra=False)


@PROPERTY
@given(REWARDED, st.data())
def test_normalising_twice_is_normalising_within_the_tree(leaves: Rewarded, data: st.DataObject) -> None:
    rewards, group = split(leaves)
    subtree = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(leaves), max_size=len(leaves))))
    rewards = (rewards * 8).round() / 8
    twice = tree_renormalized_advantages(rewards, group, subtree, eps=0.0)
    torch.testing.assert_close(
        twice, tree_advantages(rewards, group, subtree, inter=False, eps=0.0), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("name", [*COMPARING, "raft", "remax"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_every_estimator_refuses_a_reward_that_is_no_number(name: str, bad: float) -> None:
    every = COMPARING | {"raft": lambda r, _: raft_advantages(r), "remax": lambda r, g: remax_advantages(r, g.double())}
    with pytest.raises(NonFiniteError, match="at leaf 1"):
        every[name](torch.tensor([0.0, bad]), torch.tensor([0, 0]))
