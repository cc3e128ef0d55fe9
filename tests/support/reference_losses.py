"""Adapters of the losses' and sampler corrections' reference cases: one function per ``fn`` of a case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from reference_harness import Adapter, Case, Pair, Result, as_tensor, gradient, verl_aggregate, with_verl_eps
from torch import Tensor

from agentrl.learner.correction import opsm_mask, sampler_correction
from agentrl.learner.credit import entropy_scaled
from agentrl.learner.loss import (
    Aggregation,
    Scores,
    aggregate,
    kl_penalty,
    log_ratio,
    surrogate_metrics,
    value_loss,
)
from agentrl.learner.selection import group_baseline, select_clip_cov, select_kl_cov, top_entropy_mask
from agentrl.learner.surrogate import (
    aepo,
    cispo,
    clip,
    clip_cov,
    dppo,
    gmpo,
    gvpo,
    ipo,
    kl_cov,
    reinforce,
    rollout_is,
    sapo,
    vespo,
)

GMPO_BOTH_SIDES = "verl counts GMPO's clip on both sides of either sign of A, also where the loss is not clipped"
OPSM_MASKED_TOKENS = "slime counts the masked tokens of a dropped sequence too, so that its share exceeds 1"
DELIBERATE: dict[str, str] = {
    GMPO_BOTH_SIDES: "a clip fraction counts the tokens whose gradient the clip takes",
    OPSM_MASKED_TOKENS: "masked tokens enter no metric",
}

CLIP_KEYS = ("clip_ratio", "clip_ratio_low", "clip_ratio_high")
AGGREGATION_KEYS = ("loss_agg_mode", "loss_scale_factor")
COV_KEYS = ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "torch_manual_seed")
METRICS = {
    "actor/pg_clipfrac": "clip_ratio/region_mean",
    "actor/pg_clipfrac_lower": "clip_ratio/dual_mean",
    "actor/ppo_kl": "approx_kl",
}
LEVEL = {"token": {}, "sequence": {"level": "sequence", "gradient": "segment"}}
TRL_MODES: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "vespo": "token-mean",
    "luspo": "seq-mean-token-sum",
}


# -- verl --------------------------------------------------------------------------------------------------------------


def agg_loss(case: Case) -> Result:
    case.only(*AGGREGATION_KEYS)
    loss = verl_aggregate(case, case.tensor("loss_mat"), case.mask("loss_mask"))
    return {"loss": Pair(loss, as_tensor(case.outputs["loss"]))}


def kl(case: Case) -> Result:
    case.only("kl_penalty")
    logprobs = case.tensor("logprob").requires_grad_()
    name = case.params["kl_penalty"]
    estimator = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(name, name)
    ours = kl_penalty(logprobs, case.tensor("ref_logprob"), estimator)
    return {"kl": Pair(ours, as_tensor(case.outputs["kl"]))} | gradient(case, ours.sum(), logprobs)


def verl_value_loss(case: Case) -> Result:
    case.only("cliprange_value", *AGGREGATION_KEYS)
    mask = case.mask()
    values = (case.tensor("vpreds"), case.tensor("values"), case.tensor("returns"))
    loss, flags = value_loss(*values, mask, clip=case.params["cliprange_value"])
    share = aggregate(flags["clip"].double(), mask, "token-mean") * with_verl_eps(mask.sum())
    return {
        "vf_loss": Pair(verl_aggregate(case, loss, mask), as_tensor(case.outputs["vf_loss"])),
        "vf_clipfrac": Pair(share, as_tensor(case.outputs["vf_clipfrac"])),
    }


def verl_scores(case: Case, old: str = "old_log_prob") -> Scores:
    logprobs = case.tensor("log_prob").requires_grad_()
    return Scores(logprobs, case.tensor(old), case.tensor("advantages"), case.mask())


def verl_clip(case: Case) -> dict[str, float]:
    both = case.params.get("clip_ratio", 0.2)
    low, high = case.params.get("clip_ratio_low", both), case.params.get("clip_ratio_high", both)
    return {"clip_low": low, "clip_high": high}


def verl_result(case: Case, scores: Scores, loss: Tensor, flags: dict[str, Tensor], **overrides: Pair) -> Result:
    """``loss`` weighed and aggregated as the case asks, its gradient, and every metric of the case."""
    if "rollout_is_weights" in case.inputs:
        loss = loss * case.tensor("rollout_is_weights")
    total = verl_aggregate(case, loss, scores.mask)
    metrics = surrogate_metrics(flags, log_ratio(scores).detach(), scores.mask)
    compared = {"loss": Pair(total, as_tensor(case.outputs["loss"]))} | gradient(case, total, scores.logprobs)
    for name, value in case.outputs["metrics"].items():
        ours = metrics.get(METRICS[name], torch.zeros(())) * with_verl_eps(scores.mask.sum())
        compared[name] = overrides.get(name.removeprefix("actor/"), Pair(ours, as_tensor(value)))
    return compared


def verl_vanilla(case: Case) -> Result:
    if "cliprange" in case.params:
        return raft_loss(case)
    case.only(*CLIP_KEYS, "clip_ratio_c", *AGGREGATION_KEYS)
    scores = verl_scores(case)
    dual_clip = case.params.get("clip_ratio_c", 3.0)
    return verl_result(case, scores, *clip(log_ratio(scores), scores, dual_clip=dual_clip, **verl_clip(case)))


def verl_gspo(case: Case) -> Result:
    """verl averages over sequences whatever the mode asked for."""
    case.only(*CLIP_KEYS, *AGGREGATION_KEYS)
    scores = verl_scores(case)
    loss, flags = clip(log_ratio(scores, "sequence"), scores, **verl_clip(case))
    forced = replace(case, params=case.params | {"loss_agg_mode": "seq-mean-token-mean"})
    return verl_result(forced, scores, loss, flags)


def verl_gmpo(case: Case) -> Result:
    """verl takes a plain mean over sequences, and adds 1e-8 to the lengths under A and under the exponent.

    Weights of the sampler multiply a sequence's loss by their geometric mean, with 1e-10 under the logarithm.
    """
    case.only(*CLIP_KEYS, *AGGREGATION_KEYS)
    scores = verl_scores(case)
    loss, flags = gmpo(log_ratio(scores), scores, **verl_clip(case))
    lengths = scores.mask.sum(-1)
    advantages, eps = scores.advantages[:, 0], with_verl_eps(lengths)
    ratio = -loss.sum(-1) / lengths / advantages
    rows = -advantages * eps * ratio**eps
    if "rollout_is_weights" in case.inputs:
        weights = ((case.tensor("rollout_is_weights") + 1e-10).log() * scores.mask).sum(-1) / lengths * eps
        rows = rows * weights.exp()
    total = rows.mean()
    sides, outside = scores.advantages * scores.mask, log_ratio(scores).detach()
    outside = (outside < -verl_clip(case)["clip_low"]) | (outside > verl_clip(case)["clip_high"])
    shares = {
        "actor/pg_clipfrac": (flags["high"], outside & (sides > 0)),
        "actor/pg_clipfrac_lower": (flags["low"], outside & (sides < 0)),
    }
    eps_tokens = with_verl_eps(scores.mask.sum())
    compared = {"loss": Pair(total, as_tensor(case.outputs["loss"]))} | gradient(case, total, scores.logprobs)
    metrics = surrogate_metrics({}, log_ratio(scores).detach(), scores.mask)
    for name, value in case.outputs["metrics"].items():
        if name not in shares:
            compared[name] = Pair(metrics[METRICS[name]] * eps_tokens, as_tensor(value))
            continue
        ours, both = (aggregate(s.double(), scores.mask, "token-mean") * eps_tokens for s in shares[name])
        compared[name] = Pair(ours, as_tensor(value), ours != both, GMPO_BOTH_SIDES)
    return compared


def verl_cispo(case: Case) -> Result:
    case.only(*CLIP_KEYS, *AGGREGATION_KEYS)
    scores, bounds = verl_scores(case), verl_clip(case)
    floor = max(1 - bounds["clip_low"], 0.0)
    return verl_result(case, scores, *cispo(log_ratio(scores), scores, clip_high=bounds["clip_high"], floor=floor))


def verl_sapo(case: Case) -> Result:
    """verl averages over sequences whatever the mode asked for."""
    case.only(*AGGREGATION_KEYS)
    scores = verl_scores(case)
    forced = replace(case, params=case.params | {"loss_agg_mode": "seq-mean-token-mean"})
    return verl_result(forced, scores, *sapo(log_ratio(scores), scores))


def verl_gpg(case: Case) -> Result:
    case.only(*AGGREGATION_KEYS)
    scores = verl_scores(case)
    return verl_result(case, scores, *reinforce(log_ratio(scores), scores))


def verl_reinforce(case: Case) -> Result:
    case.only(*AGGREGATION_KEYS)
    scores = verl_scores(case, old="rollout_log_prob")
    return verl_result(case, scores, *reinforce(log_ratio(scores), scores))


def verl_clip_cov(case: Case) -> Result:
    case.only(*CLIP_KEYS, *COV_KEYS, *AGGREGATION_KEYS)
    scores, p = verl_scores(case), case.params
    selected = select_clip_cov(
        log_ratio(scores),
        scores,
        fraction=p["clip_cov_ratio"],
        low=p["clip_cov_lb"],
        high=p["clip_cov_ub"],
        generator=torch.Generator().manual_seed(p["torch_manual_seed"]),
        **verl_clip(case),
    )
    loss, flags = clip_cov(log_ratio(scores), replace(scores, selected=selected), **verl_clip(case))
    return verl_result(case, scores, loss, {"region": flags["selected"]})


def verl_kl_cov(case: Case) -> Result:
    """verl's ``ppo_kl`` is the mean of ``|log rho|`` here."""
    case.only(*CLIP_KEYS, *COV_KEYS, *AGGREGATION_KEYS)
    scores = verl_scores(case)
    selected = select_kl_cov(scores, fraction=case.params["kl_cov_ratio"])
    ratio = log_ratio(scores)
    loss, flags = kl_cov(ratio, replace(scores, selected=selected), coef=case.params["ppo_kl_coef"])
    size = aggregate(ratio.detach().abs(), scores.mask, "token-mean") * with_verl_eps(scores.mask.sum())
    theirs = as_tensor(case.outputs["metrics"]["actor/ppo_kl"])
    return verl_result(case, scores, loss, flags, ppo_kl=Pair(size, theirs))


# -- forks of verl -----------------------------------------------------------------------------------------------------


def fork_result(case: Case, scores: Scores, loss: Tensor, *, eps: bool = True) -> Result:
    """The forks' token mean; in most over the number of tokens plus 1e-8."""
    total = verl_aggregate(case, loss, scores.mask, token_mean_eps=eps)
    return {"loss": Pair(total, as_tensor(case.outputs["loss"]))} | gradient(case, total, scores.logprobs)


def raft_loss(case: Case) -> Result:
    """RAFT's plain ``-A log pi``, under verl's name for PPO's loss."""
    case.only("cliprange")
    scores = verl_scores(case)
    return fork_result(case, scores, reinforce(log_ratio(scores), scores)[0])


def raft_pp_loss(case: Case) -> Result:
    """RAFT++: PPO with dual clip 3."""
    case.only("cliprange")
    scores, bound = verl_scores(case), case.params["cliprange"]
    return fork_result(case, scores, clip(log_ratio(scores), scores, clip_low=bound, clip_high=bound, dual_clip=3.0)[0])


def fork_metrics(case: Case, metrics: dict[str, Tensor], mask: Tensor, *, eps: bool = True) -> Result:
    names = {"clipfrac": "clip_ratio/region_mean", "clipfrac_lower": "clip_ratio/dual_mean", "kl": "approx_kl"}
    scale = with_verl_eps(mask.sum()) if eps else torch.ones(())
    return {theirs: Pair(metrics[ours] * scale, as_tensor(case.outputs[theirs])) for theirs, ours in names.items()}


def tree_grpo_turn(case: Case) -> Result:
    """Turns count from 1. Policy tokens outside any, which we refuse, have ratio 0 in the loss of the code.

    They have log-ratio 0 in its KL, which is a mean over all positions, masked ones included.
    """
    case.only("cliprange", "clip_ratio_c", "loss_agg_mode")
    turns, bound = case.tensor("turns_mask"), case.params["cliprange"]
    scores = replace(verl_scores(case), turn=turns - 1)
    ratio = log_ratio(replace(scores, mask=scores.mask & (turns > 0)), "turn", gradient="segment")
    outside = ratio.masked_fill(turns == 0, -torch.inf)
    loss, flags = clip(outside, scores, clip_low=bound, clip_high=bound, dual_clip=case.params["clip_ratio_c"])
    metrics = surrogate_metrics(flags, ratio.detach(), scores.mask)
    metrics["approx_kl"] = metrics["approx_kl"] * scores.mask.double().mean()
    return fork_result(case, scores, loss, eps=False) | fork_metrics(case, metrics, scores.mask, eps=False)


def aepo_loss(case: Case) -> Result:
    case.only("cliprange", "entropy_balanced_clipping", "entropy_balanced_advantage")
    scores, bound = verl_scores(case), case.params["cliprange"]
    if case.params["entropy_balanced_advantage"]:
        scaled = entropy_scaled(scores.advantages, case.tensor("entropy"), scores.mask)
        scores = replace(scores, advantages=scaled)
    surrogate = aepo if case.params["entropy_balanced_clipping"] else clip
    loss, flags = surrogate(log_ratio(scores), scores, clip_low=bound, clip_high=bound, dual_clip=3.0)
    metrics = surrogate_metrics(flags, log_ratio(scores).detach(), scores.mask)
    return fork_result(case, scores, loss) | fork_metrics(case, metrics, scores.mask)


def gvpo_loss(case: Case) -> Result:
    """The code sums over groups; ours is their mean, for groups of one size."""
    case.only("beta", "n")
    scores = verl_scores(case)
    baseline, size = group_baseline(log_ratio(scores), scores.mask, case.tensor("uid"))
    assert (size == case.params["n"]).all()
    per_token, _ = gvpo(
        log_ratio(scores), replace(scores, baseline=baseline, group_size=size), beta=case.params["beta"]
    )
    loss = aggregate(per_token, scores.mask, "seq-mean-token-mean", denominator=case.params["n"])
    return {"loss": Pair(loss, as_tensor(case.outputs["loss"]))} | gradient(case, loss, scores.logprobs)


# -- slime -------------------------------------------------------------------------------------------------------------


def ppo_loss(case: Case) -> Result:
    return slime_ppo(case) if "ppo_kl" in case.inputs else raft_pp_loss(case)


def slime_ppo(case: Case) -> Result:
    """slime passes ``ppo_kl = log pi_old - log pi`` and gives unreduced losses."""
    case.only("eps_clip", "eps_clip_high", "eps_clip_c")
    scores, p = unmasked(-case.tensor("ppo_kl"), case), case.params
    clips = {"clip_low": p["eps_clip"], "clip_high": p["eps_clip_high"], "dual_clip": p.get("eps_clip_c")}
    return slime_result(case, *clip(log_ratio(scores), scores, **clips))


def slime_cispo(case: Case) -> Result:
    case.only("eps_clip", "eps_clip_high")
    logprobs, p = case.tensor("log_probs"), case.params
    scores = replace(unmasked(logprobs, case), old_logprobs=logprobs + case.tensor("ppo_kl"))
    return slime_result(case, *cispo(log_ratio(scores), scores, clip_high=p["eps_clip_high"], floor=1 - p["eps_clip"]))


def unmasked(logprobs: Tensor, case: Case) -> Scores:
    everything = torch.ones_like(logprobs, dtype=torch.bool)
    return Scores(logprobs, torch.zeros_like(logprobs), case.tensor("advantages"), everything)


def slime_result(case: Case, loss: Tensor, flags: dict[str, Tensor]) -> Result:
    return {
        "pg_losses": Pair(loss, as_tensor(case.outputs["pg_losses"])),
        "clipfrac": Pair(flags["region"].float(), as_tensor(case.outputs["clipfrac"])),
    }


def slime_opsm(case: Case) -> Result:
    """Masked tokens have weight 1 or 0 in slime, and 0 here; the loss does not see them."""
    case.only("opsm_delta")
    mask, gap = case.mask("mask"), case.tensor("log_probs") - case.tensor("old_log_probs")
    weights = opsm_mask(gap, case.tensor("advantages"), mask, delta=case.params["opsm_delta"])
    shares = 1 - aggregate_rows(weights, mask)
    dropped, with_masked = shares.sum(), (shares * mask.shape[-1] / mask.sum(-1)).sum()
    return {
        "mask": Pair(weights[mask], as_tensor(case.outputs["mask"]).reshape(mask.shape)[mask]),
        "clipfrac": Pair(dropped, as_tensor(case.outputs["clipfrac"]), dropped != with_masked, OPSM_MASKED_TOKENS),
    }


def aggregate_rows(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1)


def slime_icepop(case: Case) -> Result:
    case.only("tis_clip_low", "tis_clip")
    gap = case.tensor("train_log_probs") - case.tensor("rollout_log_probs")
    everything = torch.ones_like(gap, dtype=torch.bool)
    bounds = {"low": case.params["tis_clip_low"], "high": case.params["tis_clip"]}
    weights, flags = sampler_correction("token_mask", gap, everything, **bounds)
    raw, _ = sampler_correction("decoupled", gap, everything)
    metrics = {name: as_tensor(value) for name, value in case.outputs["metrics"].items()}
    ours = {
        "tis": raw,
        "tis_clipfrac": (flags["low"] | flags["high"]).double(),
        "tis_abs": (raw - 1).abs(),
    }
    assert metrics.keys() <= ours.keys(), metrics.keys()
    compared = {name: Pair(ours[name].flatten(), value) for name, value in metrics.items()}
    loss = (case.tensor("pg_loss") * weights).flatten()
    return compared | {"pg_loss": Pair(loss, as_tensor(case.outputs["pg_loss"]))}


# -- TRL ---------------------------------------------------------------------------------------------------------------


def trl_loss(case: Case) -> Result:
    """TRL counts all rows, also empty ones, and its LUSPO mean has the sequence's own value per row."""
    p = case.params
    known = ("loss_type", "importance_sampling_level", "beta", "epsilon_low", "epsilon_high", "delta")
    case.only(
        *known, "top_entropy_quantile", "off_policy_mask_threshold", "use_bias_correction_kl",
        "vllm_is_correction", "max_completion_length", "num_items_in_batch",
    )  # fmt: skip
    logprobs, mask = case.tensor("per_token_logps").requires_grad_(), case.mask("mask")
    advantages = case.tensor("advantages").unsqueeze(-1).expand_as(mask)
    scores = Scores(logprobs, case.tensor("old_per_token_logps"), advantages, mask)
    ratio = log_ratio(scores, **LEVEL[p["importance_sampling_level"]])
    if p["loss_type"] == "cispo":
        loss, _ = cispo(ratio, scores, clip_high=p["epsilon_high"], absolute=True)
    elif p["loss_type"] == "sapo":
        loss, _ = sapo(ratio, scores, tau_negative=torch.tensor(1.05).item())  # float32 in TRL
    elif p["loss_type"] == "vespo":
        gap = case.tensor("importance_sampling_ratio").log() if p["vllm_is_correction"] else 0.0
        loss, _ = vespo(ratio.detach() + gap, scores)
    else:
        clips = {"clip_low": p["epsilon_low"], "clip_high": p["epsilon_high"], "dual_clip": p["delta"]}
        loss, _ = clip(ratio, scores, **clips)
    if p["off_policy_mask_threshold"] is not None:
        gap = logprobs.detach() - case.tensor("sampling_per_token_logps")
        loss = loss * opsm_mask(gap, advantages, mask, delta=p["off_policy_mask_threshold"])
    if p["top_entropy_quantile"] < 1:
        loss = loss * top_entropy_mask(case.tensor("entropies"), mask, fraction=p["top_entropy_quantile"])
    if p["vllm_is_correction"] and p["loss_type"] != "vespo":
        loss = loss * case.tensor("importance_sampling_ratio")
    if p["beta"]:
        corrected = ratio if p.get("use_bias_correction_kl") else None
        reference = case.tensor("ref_per_token_logps")
        loss = loss + p["beta"] * kl_penalty(logprobs, reference, "k3", mask=mask, log_ratio=corrected)
    rows = float(len(mask))
    mode = TRL_MODES[p["loss_type"]]
    if mode == "token-mean":
        denominator = None if p["loss_type"] == "bnpo" else p["num_items_in_batch"]
    else:
        denominator = rows * p["max_completion_length"] if p["loss_type"] == "dr_grpo" else rows
    total = aggregate(loss, mask, mode, denominator=denominator)
    return {"loss": Pair(total, as_tensor(case.outputs["loss"]))} | gradient(case, total, logprobs)


# -- SkyRL, prime-rl, AReaL --------------------------------------------------------------------------------------------


def sampler_scores(case: Case, ours: str, theirs: str, mask: str = "loss_mask") -> Scores:
    logprobs, sampled = case.tensor(ours).requires_grad_(), case.tensor(theirs)
    return Scores(logprobs, sampled, case.tensor("advantages"), case.mask(mask), sampled_logprobs=sampled)


def summed(case: Case, scores: Scores, loss: Tensor) -> Result:
    """SkyRL and prime-rl scale beforehand or afterwards: the loss itself is a sum over tokens."""
    total = aggregate(loss, scores.mask, "token-mean", denominator=1.0)
    return {"loss": Pair(total, as_tensor(case.outputs["loss"]))} | gradient(case, total, scores.logprobs)


def skyrl_dppo(case: Case) -> Result:
    case.only("dppo", "off_policy_correction")
    assert case.params["off_policy_correction"] is None
    options = dict(case.params["dppo"])
    kind = options.pop("dppo_type").removeprefix("binary_")
    scores = sampler_scores(case, "log_probs", "rollout_logprobs")
    return summed(case, scores, dppo(log_ratio(scores, anchor="sampler"), scores, kind=kind, **options)[0])


def skyrl_rollout_is(case: Case) -> Result:
    case.only("eps_clip_low", "eps_clip_high", "off_policy_correction")
    assert case.params["off_policy_correction"] is None
    scores = sampler_scores(case, "log_probs", "rollout_logprobs")
    clips = {"clip_low": case.params["eps_clip_low"], "clip_high": case.params["eps_clip_high"]}
    return summed(case, scores, rollout_is(log_ratio(scores, anchor="sampler"), scores, **clips)[0])


def prime_default(case: Case) -> Result:
    case.only("dppo_mask_low", "dppo_mask_high", "adv_tau", "kl_tau")
    p, scores = case.params, prime_scores(case)
    deltas = {"delta_low": p["dppo_mask_low"], "delta_high": p["dppo_mask_high"]}
    return summed(case, scores, dppo(log_ratio(scores, anchor="sampler"), scores, kl_tau=p["kl_tau"], **deltas)[0])


def prime_ipo(case: Case) -> Result:
    case.only("ipo_threshold", "adv_tau", "kl_tau")
    p, scores = case.params, prime_scores(case)
    loss, _ = ipo(log_ratio(scores, anchor="sampler"), scores, delta=p["ipo_threshold"], kl_tau=p["kl_tau"])
    return summed(case, scores, loss)


def prime_scores(case: Case) -> Scores:
    """``adv_tau`` is a factor of the advantages."""
    scores = sampler_scores(case, "trainer_logprobs", "inference_logprobs")
    return replace(scores, advantages=case.params["adv_tau"] * scores.advantages)


def areal_loss(case: Case) -> Result:
    """Decoupled PPO. The gap to the sampler is float32, and the ratio of a sequence that of its kept tokens."""
    case.only("eps_clip", "eps_clip_higher", "c_clip", "importance_sampling_level", "rejection_sampling")
    p, mask, proximal = case.params, case.mask("loss_mask"), case.tensor("proximal_logprobs")
    gap = proximal.float() - case.tensor("old_logprobs").float()
    weights, kept = areal_weights(gap, mask, p["rejection_sampling"])
    scores = Scores(case.tensor("logprobs").requires_grad_(), proximal, case.tensor("advantages"), kept)
    high = p["eps_clip"] if p["eps_clip_higher"] is None else p["eps_clip_higher"]
    ratio = log_ratio(scores, **LEVEL[p["importance_sampling_level"]])
    loss, _ = clip(ratio, scores, clip_low=p["eps_clip"], clip_high=high, dual_clip=p["c_clip"])
    total = aggregate(loss * weights, mask, "token-mean")
    return {"loss": Pair(total, as_tensor(case.outputs["loss"]))} | gradient(case, total, scores.logprobs)


def areal_weights(gap: Tensor, mask: Tensor, how: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
    """Weights, and the mask of the tokens that are kept."""
    if how is None:
        return torch.ones_like(gap), mask
    assert (how["metric"], how["agg"]) == ("ratio", "mean"), how
    bounds = {"low": how["lower"], "high": how["upper"]}
    kind = {"token": "token", "sequence": "geometric"}[how["level"]]
    weights, flags = sampler_correction(f"{kind}_tis", gap, mask, **bounds)  # type: ignore[arg-type]
    if how["action"] == "clamp":
        return weights, mask
    kept = mask & ~flags["low"] & ~flags["high"]
    return weights * kept, kept


# -- verl's rollout correction -----------------------------------------------------------------------------------------


def verl_weights(case: Case) -> Result:
    """verl's means, also those of trajectories, have 1e-8 under them."""
    case.only("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize")
    p, mask = case.params, case.mask()
    normalize = p["rollout_is_batch_normalize"]
    weights, _ = sampler_correction(
        f"{p['rollout_is']}_tis",  # type: ignore[arg-type]
        case.tensor("log_ratio"),
        mask,
        high=p["rollout_is_threshold"],
        normalize=normalize,
    )
    if normalize and p["rollout_is"] == "token":
        weights = weights / with_verl_eps(mask.sum())
    if normalize and p["rollout_is"] == "sequence":
        weights = weights / (aggregate_rows(weights, mask) * with_verl_eps(mask.sum(-1))).mean()
    return {"weights": Pair(weights, as_tensor(case.outputs["weights"]))}


def verl_rejection(case: Case) -> Result:
    case.only("rollout_rs", "rollout_rs_threshold")
    mask = case.mask()
    kept = mask.double()
    kinds, thresholds = (case.params[name].split(",") for name in ("rollout_rs", "rollout_rs_threshold"))
    for kind, threshold in zip(kinds, thresholds, strict=True):
        *low, high = (float(bound) for bound in threshold.split("_"))
        weights, _ = sampler_correction(kind, case.tensor("log_ratio"), mask, low=low[0] if low else None, high=high)
        kept = kept * weights
    return {"mask": Pair(kept, as_tensor(case.outputs["mask"]))}


ADAPTERS: dict[str, Adapter] = {
    "GRPOTrainer._compute_loss": trl_loss,
    "agg_loss": agg_loss,
    "compute_cispo_loss": slime_cispo,
    "compute_opsm_mask": slime_opsm,
    "compute_policy_loss": ppo_loss,
    "compute_policy_loss_cispo": verl_cispo,
    "compute_policy_loss_clip_cov": verl_clip_cov,
    "compute_policy_loss_entropy_balanced_clipping": aepo_loss,
    "compute_policy_loss_geo_mean": verl_gmpo,
    "compute_policy_loss_gpg": verl_gpg,
    "compute_policy_loss_gspo": verl_gspo,
    "compute_policy_loss_gvpo": gvpo_loss,
    "compute_policy_loss_kl_cov": verl_kl_cov,
    "compute_policy_loss_reinforce": verl_reinforce,
    "compute_policy_loss_sapo": verl_sapo,
    "compute_policy_loss_turn": tree_grpo_turn,
    "compute_policy_loss_vanilla": verl_vanilla,
    "compute_rollout_correction_weights": verl_weights,
    "compute_rollout_rejection_mask": verl_rejection,
    "compute_value_loss": verl_value_loss,
    "default_loss_fn": prime_default,
    "dppo_policy_loss": skyrl_dppo,
    "icepop_function": slime_icepop,
    "ipo_loss_fn": prime_ipo,
    "kl_penalty": kl,
    "ppo_actor_loss_fn": areal_loss,
    "rollout_is_policy_loss": skyrl_rollout_is,
}
