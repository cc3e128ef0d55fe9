"""Advantages: one number per leaf, from the rewards of the leaves that share a task.

Index names: ``L`` leaves of a batch. ``group[L]`` says which task a leaf belongs to; any integers do, and leaves of a
group need not be neighbours. Every function is pure and keeps the dtype of ``rewards``, so a float64 reward stays one.

**Groups that say nothing.** A group whose rewards are all equal gets exactly 0 from every estimator that compares the
leaves of a group, also where rounding puts the mean beside the rewards. A group of one is such a group: a leaf alone
has no relative merit. (verl and the code derived from it take mean 0 and std 1 there, so that the raw reward becomes
the advantage and a lone success is pushed up at full strength; that is deliberately not followed.) ``raft_advantages``
and ``remax_advantages`` compare no leaves, so that a group of one is nothing special to them.

What differs between the tokens of a leaf is in ``credit.py``.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from agentrl.errors import ConfigError, NonFiniteError, UnknownName

GPGValid = Literal["informative", "nonzero"]


def group_advantages(rewards: Tensor, group: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """How much better a leaf did than its siblings, ``(r - mean) / (std + eps)`` within its group.

    GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2). Without ``normalize_std`` it is ``r - mean``, Dr.GRPO
    (Liu et al. 2025, arXiv:2503.20783), which does not weigh up tasks that are nearly solved or nearly hopeless.

    Args:
        rewards: [L] finite.
        group: [L] int64.
        normalize_std: divide by the standard deviation (unbiased, n - 1, as verl and TRL do).
        eps: added to the standard deviation; verl has 1e-6, TRL 1e-4.

    Returns:
        [L], summing to 0 in each group; 0 for a group of one.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    informative, index, size = _groups(rewards, group)
    advantages = rewards - _group_mean(rewards, index, size)
    if normalize_std:
        advantages = advantages / (_group_std(rewards, index, size) + eps)
    return torch.where(informative, advantages, 0.0)


def batch_normalized_advantages(rewards: Tensor, group: Tensor, *, eps: float = 1e-4) -> Tensor:
    """The group's mean but the batch's spread, ``(r - mean of the group) / (std of all rewards + eps)``.

    TRL's ``scale_rewards="batch"``, after Liu et al. 2025 (arXiv:2508.08221): a group that is nearly solved is not
    weighed up by its own small deviation. The deviation is that of the raw rewards (unbiased) over the ``L`` leaves
    passed, so pass those of the whole step.

    Args:
        rewards: [L] finite.
        group: [L] int64.
        eps: added to the standard deviation; TRL has 1e-4.

    Returns:
        [L], summing to 0 in each group; 0 for a group of one.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    informative, index, size = _groups(rewards, group)
    whole = torch.zeros_like(index)
    std = _group_std(rewards, whole, torch.full_like(rewards[:1], len(rewards)))
    return torch.where(informative, (rewards - _group_mean(rewards, index, size)) / (std + eps), 0.0)


def leave_one_out_advantages(rewards: Tensor, group: Tensor) -> Tensor:
    """The reward against the mean of the *other* leaves, ``r - mean of the others = n / (n - 1) * (r - mean)``.

    RLOO (Ahmadian et al. 2024, arXiv:2402.14740): the baseline does not depend on the leaf itself, so the gradient is
    unbiased. verl gives a group of one its raw reward in ``rloo`` and 0 in ``rloo_vectorized``; here it is 0.

    Args:
        rewards: [L] finite.
        group: [L] int64.

    Returns:
        [L], summing to 0 in each group; 0 for a group of one.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    informative, index, size = _groups(rewards, group)
    scale = (size / (size - 1).clamp(min=1))[index]
    return torch.where(informative, scale * (rewards - _group_mean(rewards, index, size)), 0.0)


def opo_advantages(rewards: Tensor, lengths: Tensor, group: Tensor) -> Tensor:
    """The reward against the group's length-weighted mean, ``r - sum(length * r) / sum(length)``.

    OPO (Hao et al. 2025, arXiv:2505.23585): the baseline of least variance if the squared gradient of an answer grows
    with its length. Derived for exactly on-policy training.

    Args:
        rewards: [L] finite.
        lengths: [L] policy tokens of each leaf, whole numbers from 0.
        group: [L] int64.

    Returns:
        [L]; ``lengths * advantages`` sums to 0 in each group. 0 for a group of one, or without a policy token.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    informative, index, size = _groups(rewards, group)
    weights = lengths.to(rewards.dtype)
    total = _group_sum(weights, index, size)
    baseline = _group_sum(weights * rewards, index, size) / total.clamp(min=1)
    return torch.where(informative & (total > 0)[index], rewards - baseline[index], 0.0)


def maxrl_advantages(rewards: Tensor, group: Tensor, *, eps: float = 0.0) -> Tensor:
    """The centred reward relative to the success rate, ``(r - mean) / (mean + eps)`` within a group.

    MaxRL (Tajwar et al. 2026, arXiv:2602.02710): with rewards of 0 and 1 the gradient of a large group is that of the
    log-likelihood of success. Needs no ``eps``, since a group of mean 0 has equal rewards; SkyRL adds 1e-6.

    Args:
        rewards: [L] finite and not negative: below 0 the mean could be 0, or turn the sign.
        group: [L] int64.
        eps: added to the mean.

    Returns:
        [L], summing to 0 in each group; 0 for a group of one.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
        ConfigError: a reward is negative.
    """
    informative, index, size = _groups(rewards, group)
    if (rewards < 0).any():
        raise ConfigError(
            f"maxrl divides by the mean reward: expected rewards of 0 and above, got {rewards.min().item()}; shift the "
            "reward or choose another estimator."
        )
    mean = _group_mean(rewards, index, size)
    return torch.where(informative, (rewards - mean) / torch.where(informative, mean + eps, 1.0), 0.0)


def gpg_advantages(rewards: Tensor, group: Tensor, *, f_norm: float = 1.0, valid: GPGValid = "informative") -> Tensor:
    """The centred reward, weighed up for the leaves without gradient, ``alpha * (r - mean) / f_norm``.

    GPG (Chu et al. 2025, arXiv:2504.02546): ``alpha = leaves / valid leaves`` makes up for groups of equal rewards,
    which add to the denominator of the loss and not to the gradient. verl counts leaves whose *reward* is not 0
    instead, so that alpha depends on what the reward calls 0; ``valid="nonzero"`` is that. Counted over the ``L``
    leaves passed, so pass those of the whole step.

    Args:
        rewards: [L] finite.
        group: [L] int64.
        f_norm: a constant, not 0; 1 in verl.
        valid: "informative" (leaves of groups whose rewards differ; the paper) or "nonzero" (verl).

    Returns:
        [L], summing to 0 in each group; 0 for a group of one.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
        UnknownName: no such ``valid``.
    """
    if valid not in get_args(GPGValid):
        raise UnknownName("way to count valid leaves", valid, get_args(GPGValid))
    informative, index, size = _groups(rewards, group)
    counted = informative if valid == "informative" else rewards != 0
    alpha = len(rewards) / counted.sum().clamp(min=1).to(rewards.dtype)
    return torch.where(informative, alpha * (rewards - _group_mean(rewards, index, size)) / f_norm, 0.0)


def best_of_group_advantages(
    rewards: Tensor, group: Tensor, *, normalize_std: bool = False, eps: float = 1e-6
) -> Tensor:
    """What a leaf adds to the best of its group, ``max(r) - max(r of the others)``: 0 for all but a lone best.

    Pass@k training (Tang et al. 2025, arXiv:2503.19595): the leave-one-out estimate of the gradient of E[max of the
    group]. Two equal best leaves get 0, as either alone would do. verl's ``grpo_passk`` also divides by the group's
    standard deviation (``normalize_std``) and refuses a group of one.

    Args:
        rewards: [L] finite.
        group: [L] int64.
        normalize_std: divide by the unbiased standard deviation plus ``eps``.
        eps: see ``normalize_std``; verl has 1e-6.

    Returns:
        [L], not negative, with at most one entry above 0 in each group; 0 for a group of one.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    informative, index, size = _groups(rewards, group)
    best = rewards == _group_extreme(rewards, index, size, "amax")[index]
    alone = best & (_group_sum(best.to(rewards.dtype), index, size) == 1)[index]
    second = _group_extreme(rewards.masked_fill(best, -torch.inf), index, size, "amax")[index]
    advantages = torch.where(informative & alone, rewards - second, 0.0)
    return advantages / (_group_std(rewards, index, size) + eps) if normalize_std else advantages


def raft_advantages(rewards: Tensor) -> Tensor:
    """Learn from successes only, ``max(r, 0)``.

    RAFT and RAFT++ as in Xiong et al. 2025 (arXiv:2504.11343). The paper fine-tunes on the accepted answers alone; the
    released code also counts the tokens of rejected ones in the loss's denominator. To follow the paper, leave leaves
    of advantage 0 out of the batch. A wrong answer must have a reward of 0 or below.

    Args:
        rewards: [L] finite.

    Returns:
        [L], not negative.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    require_finite("rewards", rewards)
    return rewards.clamp(min=0)


def reinforce_rej_advantages(rewards: Tensor, group: Tensor) -> Tensor:
    """The raw reward, without a baseline, in groups whose rewards differ; 0 elsewhere.

    Reinforce-Rej (Xiong et al. 2025, arXiv:2504.11343): tasks that are all solved or all failed are left out. The paper
    has rewards of 1 and -1. The released code keeps a group of one; here it is 0.

    Args:
        rewards: [L] finite.
        group: [L] int64.

    Returns:
        [L].

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    return torch.where(informative_groups(rewards, group), rewards, 0.0)


def remax_advantages(rewards: Tensor, baselines: Tensor) -> Tensor:
    """The reward against that of the greedy answer to the same task, ``r - b``.

    ReMax (Li et al. 2023, arXiv:2310.10505). The greedy answer is sampled for its reward only and is no leaf.

    Args:
        rewards: [L] finite.
        baselines: [L] finite, the reward of the greedy answer to each leaf's task.

    Returns:
        [L].

    Raises:
        NonFiniteError: a reward or a baseline is NaN or infinite.
    """
    require_finite("rewards", rewards)
    require_finite("baselines", baselines)
    return rewards - baselines


def tree_advantages(
    rewards: Tensor,
    group: Tensor,
    subtree: Tensor,
    *,
    inter: bool = True,
    intra: bool = True,
    normalize_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """The sum of GRPO's advantage among all leaves of a task and that among the leaves of the same tree.

    Tree-GRPO (Ji et al. 2025, arXiv:2509.21240): ``A = A_inter + A_intra``. The intra term compares leaves that share a
    beginning, and so judges the steps after it; alone it collapses training in the paper's ablation. The released code
    gives the only leaf of a tree its raw reward as intra term; here that term is 0.

    Args:
        rewards: [L] finite.
        group: [L] int64.
        subtree: [L] int64, which of its task's trees a leaf is in; numbers may be used again in other tasks.
        inter: include the comparison over the task.
        intra: include the comparison within the tree.
        normalize_std: see ``group_advantages``, for both.
        eps: see ``group_advantages``, for both.

    Returns:
        [L], summing to 0 in each group.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
        ConfigError: neither ``inter`` nor ``intra``.
    """
    if not (inter or intra):
        raise ConfigError("tree advantages: expected inter, intra or both, got neither; every advantage would be 0.")
    levels = [group] * inter + [within(group, subtree)] * intra
    parts = [group_advantages(rewards, level, normalize_std=normalize_std, eps=eps) for level in levels]
    return torch.stack(parts).sum(0)


def tree_renormalized_advantages(rewards: Tensor, group: Tensor, subtree: Tensor, *, eps: float = 1e-6) -> Tensor:
    """GRPO's advantage over the task, normalised once more within each tree.

    ``tree_2norm`` in the code of Tree-GRPO (arXiv:2509.21240), not in the paper. Up to ``eps`` it is the intra term
    of ``tree_advantages`` alone, as normalising takes away what the first pass did.

    Args:
        rewards: [L] finite.
        group: [L] int64.
        subtree: [L] int64, see ``tree_advantages``.
        eps: added to the standard deviation in both passes.

    Returns:
        [L], summing to 0 in each tree; 0 for a tree of one leaf, where the code keeps the task's advantage.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    return group_advantages(group_advantages(rewards, group, eps=eps), within(group, subtree), eps=eps)


def informative_groups(rewards: Tensor, group: Tensor) -> Tensor:
    """Whether a leaf's group has two different rewards; the others carry no gradient.

    The filter of DAPO's dynamic sampling (Yu et al. 2025, arXiv:2503.14476, section 3.2). DAPO filters on correctness:
    pass the rewards *before* ``soft_overlong_penalty`` is added, or wrong answers of different lengths are kept.

    Args:
        rewards: [L] finite.
        group: [L] int64.

    Returns:
        [L] bool, the same for all leaves of a group; False for a group of one.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    return _groups(rewards, group)[0]


def group_std(rewards: Tensor, group: Tensor) -> Tensor:
    """How far the rewards of a leaf's group are spread: their unbiased standard deviation.

    Args:
        rewards: [L] finite.
        group: [L] int64.

    Returns:
        [L], the same for all leaves of a group; exactly 0 where all rewards are equal and for a group of one.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    informative, index, size = _groups(rewards, group)
    return torch.where(informative, _group_std(rewards, index, size), 0.0)


def soft_overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """What DAPO adds to the reward of a long answer, from 0 down to -1 (arXiv:2503.14476, equation 13).

    0 up to ``max_tokens - buffer``, then falling linearly, -1 at ``max_tokens`` and beyond. The paper's values are
    ``max_tokens`` 20,480 and ``buffer`` 4,096.

    Args:
        lengths: [L] policy tokens of each leaf.
        max_tokens: the length that costs the whole point, in tokens.
        buffer: over how many tokens the penalty grows, in (0, max_tokens].

    Returns:
        [L] float64 in [-1, 0], to be added to the rewards.

    Raises:
        ConfigError: ``buffer`` is out of range.
    """
    if not 0 < buffer <= max_tokens:
        raise ConfigError(f"overlong buffer: expected 1 to max_tokens = {max_tokens} tokens, got {buffer}; change one.")
    return ((max_tokens - buffer - lengths.double()) / buffer).clamp(-1.0, 0.0)


def within(group: Tensor, part: Tensor) -> Tensor:
    """Numbers the pairs of ``group`` and ``part`` [N]: the groups that arise when each group is split by ``part``."""
    index: Tensor = torch.unique(torch.stack([group, part]), dim=1, return_inverse=True)[1]
    return index


def require_finite(name: str, values: Tensor, column: str = "token") -> None:
    """Refuses a NaN or infinity by position.

    Args:
        name: what the message calls ``values``.
        values: [L], or [L, T] with ``column`` as the name of the second index.
        column: "token" or "turn".

    Raises:
        NonFiniteError: there is one.
    """
    bad = (~values.isfinite()).nonzero().tolist()
    if bad:
        where = ", ".join(f"{axis} {i}" for axis, i in zip(("leaf", column), bad[0], strict=False))
        raise NonFiniteError(
            f"{name}: expected finite numbers, got {values[tuple(bad[0])].item()} at {where} ({len(bad)} in all); "
            "leave such leaves out of the batch, or mask such tokens."
        )


def _groups(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers the groups from 0.

    Returns:
        [L] bool, whether a leaf's group has two different rewards; [L] the number of its group; and the size of each
        group, in the dtype of ``rewards``.
    """
    require_finite("rewards", rewards)
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    size = count.to(rewards.dtype)
    lowest, highest = (_group_extreme(rewards, index, size, which) for which in ("amin", "amax"))
    return (lowest != highest)[index], index, size


def _group_sum(values: Tensor, index: Tensor, size: Tensor) -> Tensor:
    return torch.zeros_like(size).index_add(0, index, values)


def _group_extreme(values: Tensor, index: Tensor, size: Tensor, which: str) -> Tensor:
    return torch.empty_like(size).scatter_reduce(0, index, values, which, include_self=False)


def _group_mean(values: Tensor, index: Tensor, size: Tensor) -> Tensor:
    """The mean of a leaf's group, [L]."""
    return (_group_sum(values, index, size) / size)[index]


def _group_std(values: Tensor, index: Tensor, size: Tensor) -> Tensor:
    """The unbiased standard deviation of a leaf's group, [L]; 0 for a group of one."""
    squares = (values - _group_mean(values, index, size)).square()
    return (_group_sum(squares, index, size) / (size - 1).clamp(min=1)).sqrt()[index]
