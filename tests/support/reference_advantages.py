"""Adapters of the advantage estimators' reference cases: one function per ``fn`` of a case.

Advantages are compared on policy tokens: elsewhere the references leave whatever their loops end with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from reference_harness import Adapter, Case, Pair, Result, as_tensor, with_verl_eps
from torch import Tensor

from agentrl.learner.advantage import (
    best_of_group_advantages,
    gpg_advantages,
    group_advantages,
    informative_groups,
    leave_one_out_advantages,
    maxrl_advantages,
    opo_advantages,
    raft_advantages,
    reinforce_rej_advantages,
    remax_advantages,
    tree_advantages,
    tree_renormalized_advantages,
)
from agentrl.learner.credit import (
    EpisodeStatistic,
    anchor_ids,
    gae,
    gigpo,
    reinforce_pp,
    reinforce_pp_baseline,
    returns_to_go,
    whiten,
)

DELIBERATE = {
    "group of one": "the reference takes mean 0 and std 1, so that the raw reward becomes the advantage; a leaf alone "
    "has no relative merit, so ours is 0",
    "return stops at a tool result": "verl resets the return at each masked token, the paper's return crosses it",
    "episode statistics over turns": "the code lets long trajectories weigh more, the paper's equation 3 does not",
    "valid leaves by reward": "verl counts rewards that are not 0, the paper the leaves that have a gradient",
}


def numbered(names: Sequence[Any]) -> Tensor:
    return torch.tensor([names.index(name) for name in names])


def rewards_of(case: Case) -> Tensor:
    return case.tensor("token_level_rewards").sum(-1)


def on_tokens(ours: Tensor, theirs: Any, mask: Tensor, differs: Tensor | None = None, reason: str = "") -> Pair:
    """Policy tokens of [L] or [L, T] ``ours`` against [L, T] ``theirs``; ``differs`` is [L] or [L, T]."""
    wide = [x if x is None or x.dim() == 2 else x.unsqueeze(-1).expand(mask.shape) for x in (ours, differs)]
    return Pair(wide[0][mask], as_tensor(theirs)[mask], None if wide[1] is None else wide[1][mask], reason)


def by_group(*known: str) -> Callable[[Callable[[Case, Tensor, Tensor], Tensor]], Adapter]:
    """For an estimator over groups whose reference differs where a group has one leaf."""

    def wrap(ours: Callable[[Case, Tensor, Tensor], Tensor]) -> Adapter:
        def adapter(case: Case) -> Result:
            case.only(*known)
            names = case.inputs["index"]
            advantages = ours(case, rewards_of(case), numbered(names))
            alone = torch.tensor([names.count(name) == 1 for name in names])
            assert (advantages[alone] == 0).all()
            theirs = case.outputs["advantages"]
            differs = alone.unsqueeze(-1) & (as_tensor(theirs).abs() > 1e-9)
            return {"advantages": on_tokens(advantages, theirs, case.mask(), differs, "group of one")}

        return adapter

    return wrap


@by_group("norm_adv_by_std_in_grpo", "epsilon")
def grpo(case: Case, rewards: Tensor, group: Tensor) -> Tensor:
    normalize_std = case.params.get("norm_adv_by_std_in_grpo", True)
    return group_advantages(rewards, group, normalize_std=normalize_std, eps=case.params.get("epsilon", 1e-6))


@by_group()
def rloo(case: Case, rewards: Tensor, group: Tensor) -> Tensor:
    return leave_one_out_advantages(rewards, group)


@by_group()
def opo(case: Case, rewards: Tensor, group: Tensor) -> Tensor:
    return opo_advantages(rewards, case.mask().sum(-1), group)


@by_group("epsilon")
def maxrl(case: Case, rewards: Tensor, group: Tensor) -> Tensor:
    return maxrl_advantages(rewards, group, eps=case.params.get("epsilon", 1e-6))


@by_group("norm_adv_by_std_in_grpo", "epsilon")
def pass_at_k(case: Case, rewards: Tensor, group: Tensor) -> Tensor:
    normalize_std = case.params.get("norm_adv_by_std_in_grpo", True)
    return best_of_group_advantages(rewards, group, normalize_std=normalize_std, eps=case.params.get("epsilon", 1e-6))


@by_group()
def reinforce_rej(case: Case, rewards: Tensor, group: Tensor) -> Tensor:
    return reinforce_rej_advantages(rewards, group)


@by_group("f_norm")
def gpg_as_in_verl(case: Case, rewards: Tensor, group: Tensor) -> Tensor:
    return gpg_advantages(rewards, group, f_norm=case.params.get("f_norm", 1.0), valid="nonzero")


def gpg(case: Case) -> Result:
    """Our default counts by the paper, and differs by the ratio of the two counts wherever the advantage is not 0."""
    rewards, group = rewards_of(case), numbered(case.inputs["index"])
    ours = gpg_advantages(rewards, group, f_norm=case.params.get("f_norm", 1.0))
    theirs, mask = as_tensor(case.outputs["advantages"]), case.mask()
    same_count = informative_groups(rewards, group).sum() == rewards.count_nonzero()
    differs = (theirs.abs() > 1e-9) & (~same_count | (ours == 0).unsqueeze(-1))
    by_paper = on_tokens(ours, case.outputs["advantages"], mask, differs, "valid leaves by reward")
    return gpg_as_in_verl(case) | {"advantages, paper": by_paper}


def raft(case: Case) -> Result:
    case.only()
    return {"advantages": on_tokens(raft_advantages(rewards_of(case)), case.outputs["advantages"], case.mask())}


def remax(case: Case) -> Result:
    case.only()
    ours = remax_advantages(rewards_of(case), case.tensor("reward_baselines"))
    return {"advantages": on_tokens(ours, case.outputs["advantages"], case.mask())}


def verl_whitened(whitened: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Turns our whitening of ``values`` into verl's, whose mean and variance divide by ``n + 1e-8``."""
    share = with_verl_eps(mask.sum())
    variance, mean = torch.var_mean(values[mask])
    return (whitened / share.sqrt() + mean * (1 - share) / variance.sqrt()) * mask


def reinforce_plus_plus(case: Case) -> Result:
    case.only("gamma")
    gamma, mask, rewards = case.params["gamma"], case.mask(), case.tensor("token_level_rewards")
    theirs = case.outputs
    returns = returns_to_go(rewards, mask, gamma=gamma, cross_holes=False)
    advantages = reinforce_pp(rewards, mask, gamma=gamma, cross_holes=False)
    crossing = returns_to_go(rewards, mask, gamma=gamma)
    after = mask.flip(-1).cumsum(-1).flip(-1)
    rewarded = rewards_of(case).unsqueeze(-1) != 0
    hole_ahead = mask & rewarded & (~mask & (after > 0)).flip(-1).cumsum(-1).flip(-1).bool()
    return {
        "returns": on_tokens(returns, theirs["returns"], mask),
        "advantages": on_tokens(verl_whitened(advantages, returns, mask), theirs["advantages"], mask),
        "returns, paper": on_tokens(crossing, theirs["returns"], mask, hole_ahead, "return stops at a tool result"),
    }


def reinforce_plus_plus_baseline(case: Case) -> Result:
    """verl's is ours where a lone leaf of reward r is given a sibling of reward -r that has no tokens."""
    case.only()
    names, mask, rewards = case.inputs["index"], case.mask(), rewards_of(case)
    group = numbered(names)
    alone = torch.tensor([names.count(name) == 1 for name in names])
    twin_rewards = torch.cat([rewards, -rewards[alone]])
    twin_group = torch.cat([group, group[alone]])
    twin_mask = torch.cat([mask, torch.zeros_like(mask[alone])])
    twinned = reinforce_pp_baseline(twin_rewards, twin_group, twin_mask)[: len(rewards)]
    raw = torch.where(alone, rewards, group_advantages(rewards, group, normalize_std=False))
    verls = verl_whitened(twinned, raw.unsqueeze(-1).expand(mask.shape), mask)
    plain = reinforce_pp_baseline(rewards, group, mask)
    differs = mask if rewards[alone].any() else None  # the raw reward moves the whitening of all
    return {
        "advantages, with twins": on_tokens(verls, case.outputs["advantages"], mask),
        "advantages": on_tokens(plain, case.outputs["advantages"], mask, differs, "group of one"),
    }


def generalised_advantage(case: Case) -> Result:
    case.only("gamma", "lam")
    mask = case.mask()
    rewards, values = case.tensor("token_level_rewards"), case.tensor("values")
    advantages, returns = gae(rewards, values, mask, gamma=case.params["gamma"], lam=case.params["lam"])
    whitened = verl_whitened(whiten(advantages, mask), advantages, mask)
    return {
        "advantages": on_tokens(whitened, case.outputs["advantages"], mask),
        "returns": on_tokens(returns, case.outputs["returns"], mask),
    }


def tree(case: Case) -> Result:
    case.only("epsilon", "M", "N", "L", "K")
    ours = tree_inputs(case)
    eps = case.params["epsilon"]
    return {
        "inter": on_tokens(tree_advantages(*ours, intra=False, eps=eps), case.outputs["inter"], case.mask("mask")),
        "intra": on_tokens(tree_advantages(*ours, inter=False, eps=eps), case.outputs["intra"], case.mask("mask")),
        "advantages": on_tokens(tree_advantages(*ours, eps=eps), case.outputs["advantages"], case.mask("mask")),
    }


def tree_2norm(case: Case) -> Result:
    case.only("epsilon")
    ours = tree_renormalized_advantages(*tree_inputs(case), eps=case.params["epsilon"])
    return {"advantages": on_tokens(ours, case.outputs["advantages"], case.mask("mask"))}


def tree_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """In the case's float32: one leaf lies on its tree's mean, and what is left of it is rounding."""
    return rewards_of(case), numbered(case.inputs["uid"]), numbered(case.inputs["tree_uid"])


def gigpo_adapter(case: Case) -> Result:
    """A row of the case is a turn; here it is the only token of its turn, and the rows of a trajectory are a leaf."""
    p = case.params
    case.only("gamma", "step_advantage_w", "epsilon", "mode")
    names = list(dict.fromkeys(case.inputs["traj_index"]))
    rows = [[i for i, name in enumerate(case.inputs["traj_index"]) if name == own] for own in names]
    first = torch.tensor([row[0] for row in rows])
    group = numbered(case.inputs["index"])[first]
    width = max(map(len, rows))
    turn = torch.tensor([[*range(len(row)), *[-1] * (width - len(row))] for row in rows])
    anchor = anchor_ids([[case.inputs["anchor_obs"][i] for i in row] for row in rows], group.tolist())
    step_rewards = [[case.inputs["step_rewards"][i] for i in row] + [0.0] * (width - len(row)) for row in rows]
    steps = torch.tensor(step_rewards, dtype=torch.float64)
    leaf, own_turn = torch.tensor([[r, u] for r, row in enumerate(rows) for u in range(len(row))]).T
    back = torch.tensor([i for row in rows for i in row]).argsort()  # from leaf by leaf to the rows of the case
    rewards, mask = rewards_of(case).double()[first], case.mask()

    def per_row(statistic: EpisodeStatistic, step_weight: float, episode: float = 1.0) -> Tensor:
        found = gigpo(
            rewards * episode,
            group,
            turn,
            anchor,
            steps,
            gamma=p["gamma"],
            step_weight=step_weight,
            normalize_std=p["mode"] == "mean_std_norm",
            statistic=statistic,
            eps=p["epsilon"],
        )
        return found[leaf, own_turn][back]

    theirs, weight = case.outputs, p["step_advantage_w"]
    returns = returns_to_go(steps, turn >= 0, gamma=p["gamma"])[leaf, own_turn][back]
    lengths = {len(row) for row in rows}
    differs = torch.full_like(mask, len(lengths) > 1)
    return {
        "returns": Pair(returns, as_tensor(theirs["discounted_returns"])),
        "step groups": Pair(anchor[leaf, own_turn][back], torch.tensor(theirs["step_group"], dtype=torch.float64)),
        "step": on_tokens(per_row("steps", 1.0, episode=0.0), theirs["step_adv"], mask),
        "episode, turns": on_tokens(per_row("steps", 0.0), theirs["episode_adv"], mask),
        "episode, trajectories": on_tokens(
            per_row("trajectories", 0.0), theirs["episode_adv_per_trajectory_stats"], mask
        ),
        "advantages": on_tokens(per_row("steps", weight), theirs["advantages"], mask),
        "advantages, paper": on_tokens(
            per_row("trajectories", weight), theirs["advantages"], mask, differs, "episode statistics over turns"
        ),
    }


ADAPTERS: dict[str, Adapter] = {
    "adv_estimator='tree'": tree,
    "adv_estimator='tree_2norm'": tree_2norm,
    "compute_gae_advantage_return": generalised_advantage,
    "compute_gigpo_outcome_advantage": gigpo_adapter,
    "compute_gpg_outcome_advantage": gpg,
    "compute_grpo_outcome_advantage": grpo,
    "compute_grpo_passk_outcome_advantage": pass_at_k,
    "compute_maxrl_advantage": maxrl,
    "compute_opo_outcome_advantage": opo,
    "compute_raft_outcome_advantage": raft,
    "compute_reinforce_plus_plus_baseline_outcome_advantage": reinforce_plus_plus_baseline,
    "compute_reinforce_plus_plus_outcome_advantage": reinforce_plus_plus,
    "compute_reinforce_rej_outcome_advantage": reinforce_rej,
    "compute_remax_outcome_advantage": remax,
    "compute_rloo_outcome_advantage": rloo,
    "compute_rloo_vectorized_outcome_advantage": rloo,
}
