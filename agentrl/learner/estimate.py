"""From an experience to advantages, as the configuration chooses.

Every estimator here is a thin function ``(rewarded, *, options) -> [L] or [L, T]`` over the formula it is named after
in ``advantage`` (one number per leaf) or ``credit`` (one per token); its keyword arguments are what
``algorithm.estimator_options`` may set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agentrl.config import RunConfig
from agentrl.errors import ConfigError
from agentrl.learner import advantage, credit
from agentrl.learner.credit import EpisodeStatistic
from agentrl.learner.experience import Experience, experience
from agentrl.learner.loss import mask_overlong
from agentrl.learner.node_value import node_advantages
from agentrl.learner.options import checked_options
from agentrl.types import Leaf, Node, Outcome, RolloutTree, Task


@dataclass(frozen=True, slots=True)
class Rewarded:
    """What an estimator reads.

    Attributes:
        flat: the experience.
        rewards: [L] float64, with the overlong penalty and, where it belongs there, the KL.
        kl: [L, T] what each token pays for the KL, or None.
        values: [L, T] the critic's, or None.
        normalize_std: divide by the standard deviation of the group.
        batch_std: divide by that of all rewards.
    """

    flat: Experience
    rewards: Tensor
    kl: Tensor | None = None
    values: Tensor | None = None
    normalize_std: bool = True
    batch_std: bool = False

    def token_rewards(self) -> Tensor:
        """[L, T] the reward on the last policy token, less the KL of each."""
        return credit.token_rewards(self.rewards, self.flat.mask, kl=self.kl, beta=0.0 if self.kl is None else 1.0)

    def leaf_rewards(self) -> Tensor:
        """[L] the same, summed over the path."""
        return self.rewards if self.kl is None else self.rewards - self.kl.masked_fill(~self.flat.mask, 0.0).sum(-1)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Advantages, and what else follows from the rewards.

    Attributes:
        advantages: [L, T] float32.
        mask: [L, T] bool, the policy tokens that are learnt from, after the filters.
        returns: [L, T] float32, what a critic is fitted to; None without one.
    """

    advantages: Tensor
    mask: Tensor
    returns: Tensor | None


class Estimator:
    """The configured estimator with its filters.

    Args:
        config: the run's configuration.

    Raises:
        ConfigError: choices that contradict one another, or an option of the wrong type.
        UnknownName: an option that the estimator does not have.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.algorithm = config, config.algorithm
        name = self.algorithm.estimator
        self.options = checked_options(
            "algorithm.estimator_options", ESTIMATORS[name], self.algorithm.estimator_options
        )
        allowed = NORMALIZES.get(name, ("none",))
        if self.algorithm.normalize not in allowed:
            raise ConfigError(
                f"algorithm.normalize is {self.algorithm.normalize!r}, but the estimator {name!r} takes "
                f"{' or '.join(map(repr, allowed))}; set it, or choose a preset with algorithm.name."
            )
        if config.rollout.group == 1 and name in NEEDS_GROUP:
            raise ConfigError(
                f"rollout.group is 1, but the estimator {name!r} compares the answers to a task: expected at least 2, "
                "or an estimator without a group, as in reinforce_pp and ppo."
            )
        within_trees = name == "tree" and (not self.options["inter"] or self.options["renormalize"])
        if within_trees and config.rollout.policy == "group":
            raise ConfigError(
                "algorithm.estimator 'tree' is to compare the leaves of a tree only, and with rollout.policy 'group' a "
                "tree has one leaf, so that nothing would be learnt: expected 'expand_tree' or another policy that "
                "branches."
            )
        nothing = torch.zeros(2, 2)  # options out of range are refused by the formulas: now, and not after a rollout
        self(experience([REHEARSAL]), kl=nothing, values=nothing)

    @property
    def has_critic(self) -> bool:
        """Whether the estimator needs values."""
        return self.algorithm.estimator == "gae"

    def __call__(self, flat: Experience, *, kl: Tensor | None = None, values: Tensor | None = None) -> Estimate:
        """Advantages of a whole step; statistics of the batch are those of ``flat``.

        Args:
            flat: L leaves.
            kl: [L, T] what each token pays, where the KL belongs to the reward.
            values: [L, T], where the estimator needs a critic.

        Raises:
            NonFiniteError: a reward, a value or a KL is NaN or infinite.
        """
        algorithm, rewards = self.algorithm, flat.rewards
        if algorithm.overlong_buffer:
            budget = self.config.rollout.max_tokens
            rewards = rewards + advantage.soft_overlong_penalty(flat.mask.sum(-1), budget, algorithm.overlong_buffer)
        standard = algorithm.normalize
        rewarded = Rewarded(flat, rewards, kl, values, standard == "group", standard == "batch")
        found, returns = ESTIMATORS[algorithm.estimator](rewarded, **self.options), None
        if isinstance(found, tuple):
            found, returns = found
        advantages = found if found.dim() == 2 else found.unsqueeze(-1).expand(flat.mask.shape)
        mask = self._learnt(flat, found)
        if algorithm.credit == "hard":  # of the leaves that are learnt from, as the soft form's sum is
            advantages = credit.shared_mean(advantages, flat.token.masked_fill(~mask, -1))
        elif algorithm.credit == "entropy":
            advantages = credit.entropy_scaled(advantages, flat.entropies.to(advantages.dtype), flat.mask)
        return Estimate(
            advantages.masked_fill(~flat.mask, 0.0).float(),
            mask,
            None if returns is None else returns.float(),
        )

    def _learnt(self, flat: Experience, found: Tensor) -> Tensor:
        """The policy tokens left by the filters."""
        mask = mask_overlong(flat.mask, flat.truncated) if self.algorithm.overlong_filter else flat.mask
        if self.algorithm.min_reward_std:
            enough = advantage.group_std(flat.rewards, flat.group) > self.algorithm.min_reward_std
            mask = mask & enough.unsqueeze(-1)
        if not self.options.get("keep_all", True):  # those whose papers average over what they learn from
            rejects = self.algorithm.estimator == "reinforce_rej"
            kept = advantage.informative_groups(flat.rewards, flat.group) if rejects else found != 0
            mask = mask & kept.unsqueeze(-1)
        return mask


# -- the estimators ---------------------------------------------------------------------------------------------------


def _group(x: Rewarded, *, eps: float = 1e-6) -> Tensor:
    if x.batch_std:
        return advantage.batch_normalized_advantages(x.leaf_rewards(), x.flat.group, eps=eps)
    return advantage.group_advantages(x.leaf_rewards(), x.flat.group, normalize_std=x.normalize_std, eps=eps)


def _leave_one_out(x: Rewarded) -> Tensor:
    return advantage.leave_one_out_advantages(x.leaf_rewards(), x.flat.group)


def _opo(x: Rewarded) -> Tensor:
    return advantage.opo_advantages(x.leaf_rewards(), x.flat.mask.sum(-1), x.flat.group)


def _maxrl(x: Rewarded, *, eps: float = 0.0) -> Tensor:
    return advantage.maxrl_advantages(x.leaf_rewards(), x.flat.group, eps=eps)


def _gpg(x: Rewarded, *, f_norm: float = 1.0, valid: advantage.GPGValid = "informative") -> Tensor:
    return advantage.gpg_advantages(x.leaf_rewards(), x.flat.group, f_norm=f_norm, valid=valid)


def _best_of_group(x: Rewarded, *, eps: float = 1e-6) -> Tensor:
    return advantage.best_of_group_advantages(x.leaf_rewards(), x.flat.group, normalize_std=x.normalize_std, eps=eps)


def _raft(x: Rewarded, *, keep_all: bool = False) -> Tensor:
    return advantage.raft_advantages(x.leaf_rewards())


def _reinforce_rej(x: Rewarded, *, keep_all: bool = False) -> Tensor:
    return advantage.reinforce_rej_advantages(x.leaf_rewards(), x.flat.group)


def _reinforce_pp(x: Rewarded, *, gamma: float = 1.0, cross_holes: bool = True) -> Tensor:
    return credit.reinforce_pp(x.token_rewards(), x.flat.mask, gamma=gamma, cross_holes=cross_holes)


def _reinforce_pp_baseline(x: Rewarded) -> Tensor:
    return credit.reinforce_pp_baseline(x.leaf_rewards(), x.flat.group, x.flat.mask)


def _gigpo(
    x: Rewarded,
    *,
    gamma: float = 0.95,
    step_weight: float = 1.0,
    statistic: EpisodeStatistic = "trajectories",
    similarity: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The step of a turn is rewarded where the environment is: at the end of the path."""
    rewards, turn = x.leaf_rewards(), x.flat.turn
    anchors = credit.anchor_ids(x.flat.observations, x.flat.group.tolist(), similarity=similarity)
    last = turn.amax(-1, keepdim=True)
    step_rewards = torch.where(torch.arange(anchors.shape[1]) == last, rewards.unsqueeze(-1), 0.0)
    return credit.gigpo(
        rewards,
        x.flat.group,
        turn,
        anchors,
        step_rewards,
        gamma=gamma,
        step_weight=step_weight,
        normalize_std=x.normalize_std,
        statistic=statistic,
        eps=eps,
    )


def _tree(
    x: Rewarded, *, inter: bool = True, intra: bool = True, renormalize: bool = False, eps: float = 1e-6
) -> Tensor:
    """``renormalize``: the variant ``tree_2norm`` of the released code."""
    rewards, group, subtree = x.leaf_rewards(), x.flat.group, x.flat.subtree
    if renormalize:
        return advantage.tree_renormalized_advantages(rewards, group, subtree, eps=eps)
    return advantage.tree_advantages(
        rewards, group, subtree, inter=inter, intra=intra, normalize_std=x.normalize_std, eps=eps
    )


def _node_value(x: Rewarded, *, eps: float = 1e-6) -> Tensor:
    flat = x.flat
    return node_advantages(x.leaf_rewards(), flat.token, flat.group, normalize_std=x.normalize_std, eps=eps)


def _gae(
    x: Rewarded,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    whiten: bool = True,
    critic_lr: float = 1e-5,
    value_clip: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """``critic_lr`` and ``value_clip`` are the learner's: peak rate of the critic, and its loss's clip, 0 for none."""
    assert x.values is not None
    if not (critic_lr > 0 and value_clip >= 0):
        raise ConfigError(
            f"algorithm.estimator_options: expected critic_lr above 0 and value_clip of 0 or above, got {critic_lr:g} "
            f"and {value_clip:g}."
        )
    advantages, returns = credit.gae(x.token_rewards(), x.values.to(x.rewards.dtype), x.flat.mask, gamma=gamma, lam=lam)
    return (credit.whiten(advantages, x.flat.mask) if whiten else advantages), returns


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "group": _group,
    "leave_one_out": _leave_one_out,
    "opo": _opo,
    "maxrl": _maxrl,
    "gpg": _gpg,
    "best_of_group": _best_of_group,
    "raft": _raft,
    "reinforce_rej": _reinforce_rej,
    "reinforce_pp": _reinforce_pp,
    "reinforce_pp_baseline": _reinforce_pp_baseline,
    "gigpo": _gigpo,
    "tree": _tree,
    "node_value": _node_value,
    "gae": _gae,
}

REHEARSAL = RolloutTree(
    Task("rehearsal"),
    (Node(-1, "prompt", (0,)), *(Node(0, "policy", (answer,), (-1.0,), (1.0,)) for answer in (1, 2))),
    (Leaf(1, 1.0, Outcome.ANSWERED), Leaf(2, 0.0, Outcome.ANSWERED)),
)
"""Two answers of one token, to try an estimator on."""

NORMALIZES = {
    "group": ("none", "group", "batch"),
    "best_of_group": ("none", "group"),
    "gigpo": ("none", "group"),
    "tree": ("none", "group"),
    "node_value": ("none", "group"),
}
"""What ``algorithm.normalize`` may be; "none" for the other estimators, which have no such choice."""

NEEDS_GROUP = ESTIMATORS.keys() - {"raft", "reinforce_pp", "gae"}
"""Estimators that say nothing about a task's only leaf."""
