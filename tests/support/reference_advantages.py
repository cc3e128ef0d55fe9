"""Adapters of the advantage estimators' reference cases: one function per ``fn`` of a case."""

from __future__ import annotations

import torch
from reference_harness import Adapter, Case, Pair, Result, as_tensor

from agentrl.learner.advantage import group_advantages

DELIBERATE = {
    "group of one": "verl takes mean 0 and std 1, so that the raw reward becomes the advantage; a leaf alone "
    "has no relative merit, so ours is 0",
}


def grpo_advantage(case: Case) -> Result:
    case.only("norm_adv_by_std_in_grpo", "epsilon")
    names = case.inputs["index"]
    group = torch.tensor([names.index(name) for name in names])
    ours = group_advantages(
        case.tensor("token_level_rewards").sum(-1),
        group,
        normalize_std=case.params.get("norm_adv_by_std_in_grpo", True),
        eps=case.params.get("epsilon", 1e-6),
    )
    mask, theirs = case.mask(), as_tensor(case.outputs["advantages"])
    alone = torch.tensor([names.count(name) == 1 for name in names])
    assert (ours[alone] == 0).all()
    differs = alone.unsqueeze(-1) & (theirs != 0)
    return {"advantages": Pair(ours.unsqueeze(-1) * mask, theirs, differs, "group of one")}


ADAPTERS: dict[str, Adapter] = {
    "compute_grpo_outcome_advantage": grpo_advantage,
}
