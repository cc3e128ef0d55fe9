"""Adapters of the losses' and sampler corrections' reference cases: one function per ``fn`` of a case."""

from __future__ import annotations

import torch
from reference_harness import Adapter, Case, Pair, Result, as_tensor, gradient, verl_aggregate, with_verl_eps

from agentrl.learner.loss import Aggregation, aggregate, kl_penalty, policy_loss

DELIBERATE: dict[str, str] = {}

TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
TRL_NEUTRAL = {
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_bias_correction_kl": False,
}


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


ADAPTERS: dict[str, Adapter] = {
    "GRPOTrainer._compute_loss": trl_loss,
    "agg_loss": agg_loss,
    "compute_policy_loss": ppo_loss,
    "compute_policy_loss_vanilla": verl_policy_loss,
    "kl_penalty": kl,
}


def is_covered(case: Case) -> bool:
    """Whether the adapter knows the parameters of the case."""
    if case.fn == "compute_policy_loss_vanilla" and "Minimal-RL" in case.source:
        return False  # RAFT's plain -A log pi under verl's name
    if case.fn == "GRPOTrainer._compute_loss":
        neutral = all(case.params.get(name, value) == value for name, value in TRL_NEUTRAL.items())
        return neutral and case.params["loss_type"] in TRL_LOSS_TYPES
    return True
