"""One optimizer step on a batch of rollout trees: advantages, packed forward, loss, gap check, update."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from agentrl.config import AlgorithmConfig, RunConfig
from agentrl.errors import ConfigError, NonFiniteError, PolicyMismatch
from agentrl.learner.advantage import group_advantages, soft_overlong_penalty
from agentrl.learner.logprob import target_logprobs
from agentrl.learner.loss import aggregate, kl_penalty, loss_denominator, mask_overlong, policy_loss
from agentrl.learner.pack import ATTENTION, TrainBatch, Trajectory, flatten, micro_batches, pack
from agentrl.types import RolloutTree

Metrics = dict[str, float]


class Learner:
    """Owns the model in training, its optimizer and its schedule.

    Args:
        model: a transformers causal language model, in training dtype, on its device.
        config: the run's configuration.
        reference: the starting policy, which the KL is measured to; default: ``model`` as it is now. A resumed run
            has to give it. Not used where ``algorithm.kl_coef`` is 0.

    Raises:
        ConfigError: top-p below 1, under which the learner cannot rebuild the sampling distribution.
    """

    def __init__(self, model: Any, config: RunConfig, *, reference: Any = None) -> None:
        if config.sampler.top_p < 1:
            raise ConfigError(
                f"sampler.top_p is {config.sampler.top_p}: training needs 1.0, because the ratio in the loss must use "
                "the distribution that sampled, and the nucleus of old weights cannot be rebuilt from new ones."
            )
        self.model, self.config = model.train(), config
        model.set_attn_implementation(ATTENTION)
        self.reference = None
        if config.algorithm.kl_coef > 0:
            self.reference = copy.deepcopy(model if reference is None else reference).eval().requires_grad_(False)
            self.reference.set_attn_implementation(ATTENTION)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.train.lr,
            betas=(0.9, config.train.beta2),
            weight_decay=config.train.weight_decay,
        )
        self.updates = 0
        """Optimizer steps taken; with ``step`` it is all the state besides weights and moments."""

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, for ``Sampler.update_weights``."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def step(self, trees: Sequence[RolloutTree]) -> Metrics:
        """Update on ``trees``, in ``train.minibatches`` optimizer steps. Returns metrics by TRL's names.

        Raises:
            NonFiniteError: a log-prob, the loss or the gradient norm is not finite; that update was not made.
            PolicyMismatch: the sampler's log-probs are not the learner's.
        """
        trajectories = trajectories_of(trees, self.config)
        parts = _deal(trajectories, self.config.train.minibatches)
        history = [self._update(part, check_gap=i == 0) for i, part in enumerate(parts) if part]
        keys = {key for metrics in history for key in metrics}
        combine = {key: sum if key.startswith("num_tokens/") else _mean for key in keys}
        return {key: combine[key]([m[key] for m in history if key in m]) for key in sorted(keys)}

    def learning_rate(self, update: int) -> float:
        """Linear warm-up, constant, then linear decay to a tenth over the last ``train.decay`` of the updates."""
        train = self.config.train
        total = train.steps * train.minibatches
        warm = min(1.0, (update + 1) / max(train.warmup, 1))
        tail = train.decay * total
        left = min(1.0, (total - update) / tail) if tail else 1.0
        return train.lr * warm * (0.1 + 0.9 * max(left, 0.0))

    def _update(self, trajectories: list[Trajectory], *, check_gap: bool) -> Metrics:
        lr = self.learning_rate(self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self.accumulate(trajectories)
        gap = metrics["sampling/sampling_logp_difference/mean"]
        if check_gap and gap > self.config.train.max_gap:
            raise PolicyMismatch(
                f"sampler and learner disagree: mean |log-prob difference| is {gap:.4g} before the update, expected at "
                f"most {self.config.train.max_gap:g} (train.max_gap). The sampler may hold other weights, another "
                "temperature or another dtype than the learner."
            )
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        if not torch.isfinite(norm):
            raise _not_finite("the gradient norm", float(norm), trajectories)
        self.optimizer.step()
        self.updates += 1
        return metrics | {"grad_norm": float(norm), "learning_rate": lr}

    def accumulate(self, trajectories: Sequence[Trajectory]) -> Metrics:
        """Add the gradient of the loss over ``trajectories``, micro-batch by micro-batch under one denominator."""
        algorithm = self.config.algorithm
        masks = [torch.tensor([t.policy], dtype=torch.bool) for t in trajectories]
        used = [m for m, t in zip(masks, trajectories, strict=True) if not (algorithm.overlong_filter and t.truncated)]
        budget = self.config.rollout.max_tokens
        denominator = max(sum(loss_denominator(m, algorithm.aggregation, max_tokens=budget) for m in used), 1.0)
        tokens = max(float(sum(int(m.sum()) for m in used)), 1.0)
        totals: dict[str, float] = defaultdict(float)
        unique = 0
        for part in micro_batches(trajectories, self.config.train.micro_tokens):
            batch = pack(part, self.device)
            unique += batch.token_ids.shape[1]
            logprobs = target_logprobs(self.model, batch, self.config.sampler.temperature)
            if not bool(logprobs.isfinite().all()):
                raise _not_finite("a log-prob", float(logprobs.detach()[~logprobs.isfinite()][0]), part)
            loss, metrics = self._loss(batch, logprobs, denominator, tokens)
            if not bool(loss.isfinite()):
                raise _not_finite("the loss", float(loss.detach()), part)
            if loss.requires_grad:  # not so where the policy wrote nothing, as after a prompt that fills the context
                loss.backward()  # type: ignore[no-untyped-call]
            for name, value in metrics.items():
                pick = max if name.endswith("/max") else float.__add__
                totals[name] = pick(totals[name], float(value))
        totals["num_tokens/unique"] = float(unique)
        totals["num_tokens/flat"] = float(sum(len(t.token_ids) for t in trajectories))
        return dict(totals)

    def _loss(
        self, batch: TrainBatch, logprobs: Tensor, denominator: float, tokens: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the step's loss, and its shares of the metrics."""
        algorithm: AlgorithmConfig = self.config.algorithm
        mask = mask_overlong(batch.mask, batch.truncated) if algorithm.overlong_filter else batch.mask
        per_token, metrics = policy_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            mask,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            tokens=tokens,
        )
        if self.reference is not None:
            with torch.no_grad():
                reference = target_logprobs(self.reference, batch, self.config.sampler.temperature)
            kl = kl_penalty(logprobs, reference, algorithm.kl_estimator)
            per_token = per_token + algorithm.kl_coef * kl
            metrics["kl"] = aggregate(kl.detach(), mask, "token-mean", denominator=tokens)
        loss = aggregate(per_token, mask, algorithm.aggregation, denominator=denominator)
        gap = (logprobs.detach() - batch.old_logprobs).abs()
        metrics["loss"] = loss.detach()
        metrics["sampling/sampling_logp_difference/mean"] = aggregate(gap, mask, "token-mean", denominator=tokens)
        metrics["sampling/sampling_logp_difference/max"] = gap.masked_fill(~mask, 0.0).max()
        return loss, metrics


def trajectories_of(trees: Sequence[RolloutTree], config: RunConfig) -> list[Trajectory]:
    """The scored leaves of ``trees`` as trajectories with their group's advantages, in order."""
    algorithm = config.algorithm
    paths = [(i, flatten(tree, leaf), leaf.reward) for i, tree in enumerate(trees) for leaf in tree.scored()]
    if not paths:
        return []
    rewards = torch.tensor([reward for _, _, reward in paths], dtype=torch.float64)
    group = torch.tensor([i for i, _, _ in paths])
    if algorithm.overlong_buffer:
        lengths = torch.tensor([sum(t.policy) for _, t, _ in paths])
        rewards = rewards + soft_overlong_penalty(lengths, config.rollout.max_tokens, algorithm.overlong_buffer)
    advantages = group_advantages(rewards, group, normalize_std=algorithm.normalize_std).tolist()
    return [
        Trajectory(t.token_ids, t.policy, t.old_logprobs, a, t.truncated)
        for (_, t, _), a in zip(paths, advantages, strict=True)
    ]


def _deal(trajectories: list[Trajectory], parts: int) -> list[list[Trajectory]]:
    """Neighbouring slices of nearly equal length, so that groups stay together."""
    bounds = [len(trajectories) * i // parts for i in range(parts + 1)]
    return [trajectories[a:b] for a, b in pairwise(bounds)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _not_finite(what: str, value: float, trajectories: Sequence[Trajectory]) -> NonFiniteError:
    error = NonFiniteError(
        f"{what} is {value}: this update was not made. The offending batch is saved in the run folder; look "
        "for a learning rate that is too high or log-probs of -inf."
    )
    error.sample = [
        {"token_ids": t.token_ids, "policy": t.policy, "old_logprobs": t.old_logprobs, "advantage": t.advantage}
        for t in trajectories
    ]
    return error
