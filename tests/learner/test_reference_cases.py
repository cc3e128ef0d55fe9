"""Our formulas against numbers made by the reference implementations (verl, TRL, slime, Minimal-RL).

A case is matched, or differs on purpose (``DELIBERATE`` says why, and the test asserts that it does), or is not covered
yet; a function or parameter that is in no list fails. ``AGENTRL_REFERENCE_CASES`` names another file of the same form.
The counts are printed at the end of the run by ``conftest.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agentrl.learner.advantage import group_advantages
from agentrl.learner.loss import Aggregation, aggregate, kl_penalty, policy_loss

RTOL = {torch.float64: 1e-10, torch.float32: 1e-6}
ATOL = {torch.float64: 1e-14, torch.float32: 1e-7}
VERL_EPS = 1e-8

DELIBERATE = {
    "group of one": "verl takes mean 0 and std 1, so that the raw reward becomes the advantage; a leaf alone "
    "has no relative merit, so ours is 0",
}

NOT_COVERED = {
    # other estimators and losses
    "_calc_entropy/ln(vocab)",
    "_extract_content",
    "adv_estimator='tree'",
    "adv_estimator='tree_2norm'",
    "compute_cispo_loss",
    "compute_gae_advantage_return",
    "compute_gigpo_outcome_advantage",
    "compute_gpg_outcome_advantage",
    "compute_grpo_passk_outcome_advantage",
    "compute_maxrl_advantage",
    "compute_opo_outcome_advantage",
    "compute_policy_loss_cispo",
    "compute_policy_loss_clip_cov",
    "compute_policy_loss_entropy_balanced_clipping",
    "compute_policy_loss_geo_mean",
    "compute_policy_loss_gpg",
    "compute_policy_loss_gspo",
    "compute_policy_loss_gvpo",
    "compute_policy_loss_kl_cov",
    "compute_policy_loss_reinforce",
    "compute_policy_loss_sapo",
    "compute_policy_loss_turn",
    "compute_raft_outcome_advantage",
    "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "compute_reinforce_plus_plus_outcome_advantage",
    "compute_reinforce_rej_outcome_advantage",
    "compute_remax_outcome_advantage",
    "compute_rloo_outcome_advantage",
    "compute_rloo_vectorized_outcome_advantage",
    "compute_value_loss",
    # sampler corrections
    "compute_opsm_mask",
    "compute_rollout_correction_weights",
    "compute_rollout_rejection_mask",
    "default_loss_fn",
    "dppo_policy_loss",
    "icepop_function",
    "ipo_loss_fn",
    "ppo_actor_loss_fn",
    "rollout_is_policy_loss",
    # rewards of particular environments
    "compute_score",
    "compute_score_em",
}


TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
TRL_NEUTRAL = {
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_bias_correction_kl": False,
}


@dataclass(frozen=True)
class Case:
    id: str
    fn: str
    source: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    grad: Any

    def tensor(self, name: str) -> Tensor:
        return as_tensor(self.inputs[name])

    def mask(self, name: str = "response_mask") -> Tensor:
        return self.tensor(name).bool()

    def only(self, *known: str) -> None:
        """Fails on a parameter that the adapter does not read, so that none is ignored."""
        assert not set(self.params) - set(known), (
            f"{self.fn} has parameters unknown here: {set(self.params) - set(known)}"
        )


@dataclass(frozen=True)
class Pair:
    """One number or tensor of ours and theirs; entries under ``differs`` must differ, for the reason given."""

    ours: Tensor
    theirs: Tensor
    differs: Tensor | None = None
    reason: str = ""


Result = dict[str, Pair]


def as_tensor(record: Any) -> Tensor:
    if isinstance(record, (int, float)):
        return torch.tensor(record, dtype=torch.float64)
    return torch.tensor(record["data"], dtype=getattr(torch, record["dtype"])).reshape(record["shape"])


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


def verl_aggregate(case: Case, values: Tensor, mask: Tensor, *, token_mean_eps: bool = False) -> Tensor:
    """verl's ``agg_loss``: adds 1e-8 to a trajectory's length, and its default constant is the padded length."""
    mode = case.params.get("loss_agg_mode", "token-mean")
    if mode == "seq-mean-token-mean":
        values = values * with_verl_eps(mask.sum(-1, keepdim=True))
    if mode == "token-mean" and token_mean_eps:
        values = values * with_verl_eps(mask.sum())
    constant = case.params.get("loss_scale_factor") or mask.shape[-1]
    return aggregate(values, mask, mode, denominator=constant if mode == "seq-mean-token-sum-norm" else None)


def with_verl_eps(count: Tensor) -> Tensor:
    """Turns a mean over ``count`` into verl's ``masked_mean``, which divides by ``count + 1e-8``."""
    return count.double() / (count.double() + VERL_EPS)


def agg_loss(case: Case) -> Result:
    case.only("loss_agg_mode", "loss_scale_factor")
    loss = verl_aggregate(case, case.tensor("loss_mat"), case.mask("loss_mask"))
    return {"loss": Pair(loss, as_tensor(case.outputs["loss"]))}


def kl(case: Case) -> Result:
    case.only("kl_penalty")
    logprobs = case.tensor("logprob").requires_grad_()
    name = case.params["kl_penalty"]
    estimator = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(name, name)
    ours = kl_penalty(logprobs, case.tensor("ref_logprob"), estimator)
    return {"kl": Pair(ours, as_tensor(case.outputs["kl"]))} | gradient(case, ours.sum(), logprobs)


def verl_policy_loss(case: Case) -> Result:
    clip = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c")
    case.only(*clip, "loss_agg_mode", "loss_scale_factor")
    both = case.params.get("clip_ratio", 0.2)
    logprobs, mask = case.tensor("log_prob").requires_grad_(), case.mask()
    per_token, metrics = policy_loss(
        logprobs,
        case.tensor("old_log_prob"),
        case.tensor("advantages"),
        mask,
        clip_low=case.params.get("clip_ratio_low", both),
        clip_high=case.params.get("clip_ratio_high", both),
        dual_clip=case.params.get("clip_ratio_c", 3.0),
    )
    if "rollout_is_weights" in case.inputs:
        per_token = per_token * case.tensor("rollout_is_weights")
    loss = verl_aggregate(case, per_token, mask)
    names = {
        "actor/pg_clipfrac": "clip_ratio/region_mean",
        "actor/pg_clipfrac_lower": "clip_ratio/dual_mean",
        "actor/ppo_kl": "approx_kl",
    }
    scale = with_verl_eps(mask.sum())
    compared = {
        theirs: Pair(metrics[names[theirs]] * scale, as_tensor(value))
        for theirs, value in case.outputs["metrics"].items()
    }
    return {"loss": Pair(loss, as_tensor(case.outputs["loss"]))} | gradient(case, loss, logprobs) | compared


def ppo_loss(case: Case) -> Result:
    return slime_loss(case) if "ppo_kl" in case.inputs else minimal_rl_loss(case)


def slime_loss(case: Case) -> Result:
    """slime passes ``ppo_kl = log pi_old - log pi`` and gives unreduced losses."""
    case.only("eps_clip", "eps_clip_high", "eps_clip_c")
    logprobs = -case.tensor("ppo_kl")
    ours, metrics = policy_loss(
        logprobs,
        torch.zeros_like(logprobs),
        case.tensor("advantages"),
        torch.ones_like(logprobs, dtype=torch.bool),
        clip_low=case.params["eps_clip"],
        clip_high=case.params["eps_clip_high"],
        dual_clip=case.params.get("eps_clip_c"),
    )
    share = as_tensor(case.outputs["clipfrac"]).double().mean()
    return {
        "pg_losses": Pair(ours, as_tensor(case.outputs["pg_losses"])),
        "clipfrac": Pair(metrics["clip_ratio/region_mean"], share),
    }


def minimal_rl_loss(case: Case) -> Result:
    """RAFT++'s loss: PPO with dual clip 3, and the old verl's token mean."""
    case.only("cliprange")
    clip = case.params["cliprange"]
    logprobs, mask = case.tensor("log_prob").requires_grad_(), case.mask()
    old, advantages = case.tensor("old_log_prob"), case.tensor("advantages")
    per_token, _ = policy_loss(logprobs, old, advantages, mask, clip_low=clip, clip_high=clip, dual_clip=3.0)
    loss = verl_aggregate(case, per_token, mask, token_mean_eps=True)
    return {"loss": Pair(loss, as_tensor(case.outputs["loss"]))} | gradient(case, loss, logprobs)


def trl_loss(case: Case) -> Result:
    p = case.params
    ours = ("loss_type", "beta", "epsilon_low", "epsilon_high", "delta", "max_completion_length")
    case.only(*ours, "vllm_is_correction", "num_items_in_batch", *TRL_NEUTRAL)
    logprobs, mask = case.tensor("per_token_logps").requires_grad_(), case.mask("mask")
    old, advantages = case.tensor("old_per_token_logps"), case.tensor("advantages")
    clip = {"clip_low": p["epsilon_low"], "clip_high": p["epsilon_high"], "dual_clip": p["delta"]}
    per_token, _ = policy_loss(logprobs, old, advantages, mask, **clip)
    if p["vllm_is_correction"]:
        per_token = per_token * case.tensor("importance_sampling_ratio")
    if p["beta"]:
        per_token = per_token + p["beta"] * kl_penalty(logprobs, case.tensor("ref_per_token_logps"), "k3")
    rows = float(len(mask))
    reductions: dict[str, tuple[Aggregation, float | None]] = {
        "grpo": ("seq-mean-token-mean", rows),
        "bnpo": ("token-mean", None),
        "dr_grpo": ("seq-mean-token-sum-norm", rows * p["max_completion_length"]),
        "dapo": ("token-mean", p["num_items_in_batch"]),
    }
    mode, denominator = reductions[p["loss_type"]]
    loss = aggregate(per_token, mask, mode, denominator=denominator)
    return {"loss": Pair(loss, as_tensor(case.outputs["loss"]))} | gradient(case, loss, logprobs)


def gradient(case: Case, loss: Tensor, logprobs: Tensor) -> Result:
    if case.grad is None:
        return {}
    (ours,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    return {"gradient": Pair(ours, as_tensor(case.grad))}


ADAPTERS: dict[str, Callable[[Case], Result]] = {
    "GRPOTrainer._compute_loss": trl_loss,
    "agg_loss": agg_loss,
    "compute_grpo_outcome_advantage": grpo_advantage,
    "compute_policy_loss": ppo_loss,
    "compute_policy_loss_vanilla": verl_policy_loss,
    "kl_penalty": kl,
}


def load() -> list[Case]:
    bundled = Path(__file__).parents[1] / "data" / "reference_cases.json"
    path = Path(os.environ.get("AGENTRL_REFERENCE_CASES") or bundled)
    return [
        Case(
            id=c["id"],
            fn=c["fn"],
            source=c["source"],
            params=c["params"],
            inputs=c["inputs"],
            outputs=c["outputs"],
            grad=c.get("grad_wrt_log_prob"),
        )
        for c in json.loads(path.read_text())["cases"]
    ]


def is_covered(case: Case) -> bool:
    """Whether the project has something to compare with the case, going by its function and parameters."""
    if case.fn == "compute_policy_loss_vanilla" and "Minimal-RL" in case.source:
        return False  # RAFT's plain -A log pi under verl's name
    if case.fn == "GRPOTrainer._compute_loss":
        neutral = all(case.params.get(name, value) == value for name, value in TRL_NEUTRAL.items())
        return neutral and case.params["loss_type"] in TRL_LOSS_TYPES
    return case.fn in ADAPTERS


CASES = load()


def test_every_case_has_an_adapter_or_is_listed(record_property: Callable[[str, object], None]) -> None:
    unknown = sorted({case.fn for case in CASES} - ADAPTERS.keys() - NOT_COVERED)
    assert not unknown, f"functions with neither an adapter nor an entry in NOT_COVERED: {unknown}"
    assert not ADAPTERS.keys() & NOT_COVERED
    for _ in (case for case in CASES if not is_covered(case)):
        record_property("reference_case", "not covered")


@pytest.mark.parametrize("case", [case for case in CASES if is_covered(case)], ids=lambda case: case.id)
def test_case(case: Case, record_property: Callable[[str, object], None]) -> None:
    outcome = "FAILED"
    try:
        different = [check(name, pair) for name, pair in ADAPTERS[case.fn](case).items()]
        outcome = "deliberately different" if any(different) else "matched"
    finally:
        record_property("reference_case", outcome)


def check(name: str, pair: Pair) -> bool:
    """Asserts agreement, and disagreement where it is meant; returns whether there is any of the latter."""
    theirs = pair.theirs
    rtol, atol = RTOL[theirs.dtype], ATOL[theirs.dtype]
    ours = pair.ours.detach().to(theirs.dtype)
    differs = torch.zeros_like(theirs, dtype=torch.bool) if pair.differs is None else pair.differs
    torch.testing.assert_close(
        ours[~differs], theirs[~differs], rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )
    if not differs.any():
        return False
    assert pair.reason in DELIBERATE
    assert not torch.isclose(ours[differs], theirs[differs], rtol=rtol, atol=atol).any(), name
    return True
