"""What each branch of a rollout tree was worth: child mean minus parent mean.

Index names as in ``credit``: ``L`` leaves, ``T`` tokens of the longest path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentrl.learner.advantage import group_std, require_finite


def node_advantages(
    rewards: Tensor, token: Tensor, group: Tensor, *, normalize_std: bool = False, eps: float = 1e-6
) -> Tensor:
    """The value of a token's span less that of the span above it.

    A span is what lies between two branchings, and its value is the mean reward of the leaves below it. Its tokens get
    ``V(span) - V(parent)``; what lies on top of a tree has the task's mean for a parent. Along a path these add up to
    the leaf's reward less the task's mean, so credit is only moved: to the branch that made the difference. Where
    nothing branches but the prompt this is GRPO's advantage without its division.

    The local part of TreeRL's advantage (Hou et al. 2025, arXiv:2506.11902), without a weight for the number of leaves:
    here a shared token stands in every leaf's row, and so counts once for each already.

    Args:
        rewards: [L] finite.
        token: [L, T] int64; equal numbers are the same token of a rollout tree, -1 in the padding.
        group: [L] int64, the task.
        normalize_std: divide by the standard deviation of the task's rewards; 0 where they are equal.
        eps: added to it.

    Returns:
        [L, T] in the dtype of ``rewards``, 0 in the padding.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    require_finite("rewards", rewards)
    there = token >= 0
    of = rewards[:, None].expand(token.shape)[there]
    _, index, count = torch.unique(token[there], return_inverse=True, return_counts=True)
    mean = of.new_zeros(len(count)).index_add(0, index, of) / count
    value = of.new_zeros(token.shape).masked_scatter(there, mean[index])
    leaves = torch.zeros_like(token).masked_scatter(there, count[index])
    # A path loses leaves where it branches, and nowhere else.
    begins = torch.zeros_like(there)
    begins[:, 1:] = leaves[:, 1:] != leaves[:, :-1]
    start = torch.where(begins, torch.arange(token.shape[1], device=token.device), 0).cummax(-1).values
    above = torch.where(start > 0, value.gather(1, (start - 1).clamp(min=0)), _group_mean(rewards, group)[:, None])
    found = (value - above).masked_fill(~there, 0.0)
    if normalize_std:
        spread = group_std(rewards, group)
        found = torch.where(spread[:, None] > 0, found / (spread[:, None] + eps), 0.0)
    return found


def _group_mean(rewards: Tensor, group: Tensor) -> Tensor:
    """[L] the mean reward of each leaf's task."""
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    mean: Tensor = rewards.new_zeros(len(count)).index_add(0, index, rewards) / count
    return mean[index]
