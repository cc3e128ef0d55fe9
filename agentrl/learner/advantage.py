"""Advantages: one number per leaf, from the rewards of the leaves that share a task.

Index names: ``L`` leaves of a batch. ``group[L]`` says which task a leaf belongs to; any integers do, and leaves of a
group need not be neighbours. Every function is pure and keeps the dtype of ``rewards``, so a float64 reward stays one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentrl.errors import ConfigError, NonFiniteError


def group_advantages(rewards: Tensor, group: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """How much better a leaf did than its siblings, ``(r - mean) / (std + eps)`` within its group.

    GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2). Without ``normalize_std`` it is ``r - mean``, Dr.GRPO
    (Liu et al. 2025, arXiv:2503.20783), which does not weigh up tasks that are nearly solved or nearly hopeless.

    A group whose rewards are all equal gets exactly 0, also where rounding puts the mean beside them. A group of one is
    such a group: it says nothing about relative merit. (verl takes mean 0 and std 1 there, so that the raw reward
    becomes the advantage and a lone success is pushed up at full strength; that is deliberately not followed.)

    Args:
        rewards: [L] finite.
        group: [L] int64.
        normalize_std: divide by the standard deviation (unbiased, n - 1, as verl and TRL do).
        eps: added to the standard deviation; verl has 1e-6, TRL 1e-4.

    Returns:
        [L], summing to 0 in each group.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    informative = informative_groups(rewards, group)
    index, size = _members(group, rewards)
    advantages = rewards - (_group_sum(rewards, index, size) / size)[index]
    if normalize_std:
        variance = _group_sum(advantages.square(), index, size) / (size - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + eps)[index]
    return torch.where(informative, advantages, 0.0)


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
    _require_finite(rewards)
    index, size = _members(group, rewards)
    lowest = torch.empty_like(size).scatter_reduce(0, index, rewards, "amin", include_self=False)
    highest = torch.empty_like(size).scatter_reduce(0, index, rewards, "amax", include_self=False)
    return (lowest != highest)[index]


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


def _members(group: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers the groups from 0: ``index[L]`` of each leaf, and ``size`` of each group in the dtype of ``rewards``."""
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    return index, count.to(rewards.dtype)


def _group_sum(values: Tensor, index: Tensor, size: Tensor) -> Tensor:
    return torch.zeros_like(size).index_add(0, index, values)


def _require_finite(rewards: Tensor) -> None:
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"rewards: expected finite numbers, got {rewards[bad[0]].item()} at leaf {bad[0]} ({len(bad)} in all); "
            "leave unscored leaves out of the batch."
        )
