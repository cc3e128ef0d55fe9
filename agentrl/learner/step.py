"""One optimizer step on a batch of rollout trees: advantages, packed forward, loss, gap check, update."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from agentrl.config import RunConfig
from agentrl.errors import ConfigError, NonFiniteError, PolicyMismatch, TrainingError
from agentrl.learner import distributed
from agentrl.learner.attention import ATTENTION
from agentrl.learner.critic import Critic
from agentrl.learner.estimate import Estimator
from agentrl.learner.experience import Experience, experience
from agentrl.learner.logprob import check_packable, target_logprobs
from agentrl.learner.lora import add_lora, merged_weights
from agentrl.learner.loss import Scores, aggregate, value_loss
from agentrl.learner.objective import Objective, Step
from agentrl.learner.optimizer import Optimizer
from agentrl.learner.pack import TrainBatch, micro_batches, pack
from agentrl.learner.recompute import recompute_layers
from agentrl.types import RolloutTree

Metrics = dict[str, float]
GAP = "sampling/sampling_logp_difference"


@dataclass(frozen=True, slots=True)
class Prepared:
    """An experience and what is known of it before the first update, [L, T] each.

    Attributes:
        flat: the experience.
        scores: old log-probs, advantages, mask after the filters; its ``logprobs`` are the old ones until a policy in
            training has scored it.
        old_values: the critic's, or None.
        returns: what the critic is fitted to, or None.
    """

    flat: Experience
    scores: Scores
    old_values: Tensor | None = None
    returns: Tensor | None = None

    def take(self, rows: Tensor) -> Prepared:
        """The leaves ``rows`` [l], and no more columns than they need."""
        flat = self.flat.take(rows)
        width = flat.mask.shape[1]

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows, :width]

        names = ("logprobs", "old_logprobs", "advantages", "mask", "turn", "entropies", "sampled_logprobs")
        changed: dict[str, Any] = {name: some(getattr(self.scores, name)) for name in (*names, "ref_logprobs")}
        return Prepared(flat, replace(self.scores, **changed), some(self.old_values), some(self.returns))


class Learner:
    """Owns the model in training, its optimizer and its schedule.

    Under torchrun every process has one, all with the same weights; ``step`` and whatever reads weights are then calls
    that all have to make (``distributed``).

    Args:
        model: a transformers causal language model, on its device, in its training dtype. It is changed in place:
            adapters, tree attention, shards.
        config: the run's configuration.
        reference: the starting policy, which the KL is measured to; default: ``model`` as it is now. A resumed run
            has to give it, unless it trains adapters, whose base the starting policy is. Not used without a KL.

    Raises:
        ConfigError: choices that contradict one another, top-p below 1, under which the learner cannot rebuild the
            sampling distribution, or a model that cannot take packed trees.
        UserError: adapters are wanted and peft is not installed.
    """

    def __init__(self, model: Any, config: RunConfig, *, reference: Any = None) -> None:
        if config.sampler.top_p < 1:
            raise ConfigError(
                f"sampler.top_p is {config.sampler.top_p}: training needs 1.0, because the ratio in the loss must use "
                "the distribution that sampled, and the nucleus of old weights cannot be rebuilt from new ones."
            )
        self.config, self.estimator, self.objective = config, Estimator(config), Objective(config)
        check_packable(model)
        self.vocabulary = len(model.get_input_embeddings().weight)
        """Tokens that the policy knows, from 0."""
        policy = config.policy
        self.reference, self.critic = None, None
        if self.objective.needs_reference and not policy.lora_rank:
            self.reference = self._frozen(model if reference is None else reference)
        if self.estimator.has_critic:
            self.critic = distributed.shard(self._trainable(Critic(model)))
        if policy.lora_rank:
            model = add_lora(model, policy.lora_rank, policy.lora_alpha, policy.lora_targets, seed=config.seed)
        self.model = distributed.shard(self._trainable(model))
        groups = {"policy": self.model.named_parameters()}
        if self.critic is not None:
            groups["critic"] = self.critic.named_parameters()
        self.optimizer = Optimizer(groups, betas=(0.9, config.train.beta2), weight_decay=config.train.weight_decay)
        self.updates = 0
        """Optimizer steps taken."""
        self.remembered: dict[str, Tensor] = {}
        """This process's part of the trained weights as a sampler last had them, for certain; see ``suspects``."""

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def weights(self) -> dict[str, Tensor]:
        """The policy's parameters by name, adapters merged in, for ``Sampler.update_weights``."""
        return merged_weights(self.model)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside weights and moments, as JSON has it."""
        return {"updates": self.updates, "objective": self.objective.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put ``state`` back."""
        self.updates = state["updates"]
        self.objective.load_state(state["objective"])

    def step(self, trees: Sequence[RolloutTree], *, stale: bool = False) -> Metrics:
        """Update on ``trees``, in ``train.minibatches`` optimizer steps.

        Args:
            trees: what was played.
            stale: they were played by older weights than these. The gap is then measured but not held against
                ``train.max_gap``, since most of it is the way that the policy has gone since; that the sampler had
                the weights that it says is for the probe of every hand-over to show (``agentrl.handover``).

        Returns:
            Metrics by TRL's names; none, and no update, where no scored leaf has a token that the policy wrote.

        Raises:
            NonFiniteError: a reward, a log-prob, the loss or the gradient norm is not finite; that update was not made.
            PolicyMismatch: the sampler's log-probs are not the learner's.
            TrainingError: a policy token without the log-prob, or an entropy that the algorithm reads, that it was
                sampled with; a token that the policy does not know; or a leaf whose path does not lead to a root.
        """
        flat = experience(trees)
        if not bool(flat.mask.any()):
            return {}
        self._check(flat)
        prepared, metrics = self.prepare(flat)
        history = []
        for number, rows in enumerate(_deal(flat.group, self.config.train.minibatches)):
            history.append(self._update(prepared.take(rows), check_gap=number == 0 and not stale))
        combined = _combine(history) | metrics
        if self.objective.measures_after:
            combined["kl"] = self.objective.moved_kl(prepared.scores, self.score(self.model, flat)[0])
        self.objective.adapt(combined)
        return dict(sorted(combined.items()))

    def _check(self, flat: Experience) -> None:
        """Refuse what the sampler cannot have given this policy."""
        sampled, real = flat.sampled_logprobs, flat.token >= 0
        if not bool(sampled.isfinite().all()):
            raise _not_finite("a sampled log-prob", float(sampled[~sampled.isfinite()][0]), flat)
        wrong = flat.token_ids[real & ((flat.token_ids < 0) | (flat.token_ids >= self.vocabulary))]
        if len(wrong):
            raise TrainingError(
                f"the rollouts have a token {int(wrong[0])}: expected 0 to {self.vocabulary - 1}, the rows of the "
                "policy's embedding; they were sampled from another policy, or with another tokenizer."
            )
        algorithm = self.config.algorithm
        if algorithm.credit == "entropy" or algorithm.entropy_target:
            missing = int(flat.mask.sum() - flat.entropies[flat.mask].isfinite().sum())
            if missing:
                raise TrainingError(
                    f'{missing} policy tokens have no finite entropy, which algorithm.credit = "entropy" and '
                    "algorithm.entropy_target read: train with a sampler that reports them, or leave these two out."
                )

    def prepare(self, flat: Experience) -> tuple[Prepared, Metrics]:
        """What the updates of a step have in common: old log-probs, reference, values, advantages.

        Each of them costs a forward pass over the batch, and only what the algorithm reads is computed.
        """
        objective, algorithm = self.objective, self.config.algorithm
        old, reference, values = flat.sampled_logprobs, None, None
        if algorithm.old_logprobs == "learner":
            old = self.score(self.model, flat)[0]
        if objective.needs_reference:
            reference = self._score_reference(flat)
        if self.critic is not None:
            values = self._values(flat)
        kl = None
        if objective.needs_reference and algorithm.kl_placement == "reward":
            assert reference is not None
            kl = objective.reward_kl(old, reference, flat.mask)
        estimate = self.estimator(flat, kl=kl, values=values)
        mask, advantages = estimate.mask, estimate.advantages
        scores = Scores(
            logprobs=old,
            old_logprobs=old,
            advantages=advantages,
            mask=mask,
            turn=flat.turn,
            sampled_logprobs=flat.sampled_logprobs,
            ref_logprobs=reference,
        )
        metrics = self._describe(flat, mask, advantages) | objective.begin(flat.entropies[flat.mask])
        if kl is not None:
            metrics["kl"] = float(kl[flat.mask].mean()) / max(objective.kl.value, 1e-12)
        return Prepared(flat, scores, values, estimate.returns), metrics

    @torch.no_grad()
    def score(
        self, model: Any, flat: Experience, *, entropy: bool = False, temperature: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs [L, T] of all policy tokens under ``model``, and entropies if wanted; on the CPU.

        Args:
            model: the policy in training, or the reference.
            flat: what to score.
            entropy: whether entropies are wanted.
            temperature: default: that of the sampler.
        """
        found = torch.zeros(2, *flat.mask.shape)
        for rows, batch, real in self._micro_batches(flat, flat.mask):
            logprobs, entropies = self._logprobs(model, batch, entropy=entropy, temperature=temperature)
            width = logprobs.shape[1]
            if not real:
                continue
            found[0, rows, :width] += logprobs.float().cpu()
            if entropies is not None:
                found[1, rows, :width] += entropies.float().cpu()
        distributed.sum_tensors(found)
        return found[0], found[1] if entropy else None

    def learning_rate(self, update: int) -> float:
        """Linear warm-up, constant, then linear decay to a tenth over the last ``train.decay`` of the updates."""
        return self.config.train.lr * self._schedule(update)

    def _schedule(self, update: int) -> float:
        train = self.config.train
        total = train.steps * train.minibatches
        warm = min(1.0, (update + 1) / max(train.warmup, 1))
        tail = train.decay * total
        left = min(1.0, (total - update) / tail) if tail else 1.0
        return warm * (0.1 + 0.9 * max(left, 0.0))

    # -- one optimizer step -------------------------------------------------------------------------------------------

    def _update(self, part: Prepared, *, check_gap: bool) -> Metrics:
        self.optimizer.zero_grad()
        metrics = self.accumulate(part)
        gap = metrics[f"{GAP}/mean"]
        if check_gap and gap > self.config.train.max_gap:
            raise PolicyMismatch(
                f"sampler and learner disagree: mean |log-prob difference| is {gap:.4g} before the update, expected at "
                f"most {self.config.train.max_gap:g} (train.max_gap). The sampler may hold other weights, another "
                "temperature or another dtype than the learner."
            )
        norm = self.optimizer.clip(self.config.train.max_grad_norm)
        if not torch.isfinite(torch.tensor(norm)):
            raise _not_finite("the gradient norm", norm, part.flat)
        scale = self._schedule(self.updates)
        rates = {"policy": self.config.train.lr * scale}
        if self.critic is not None:
            rates["critic"] = self.estimator.options["critic_lr"] * scale
        if norm:
            self.optimizer.step(rates)
        else:  # nothing to learn from: neither old momentum nor weight decay is to move the policy
            self.optimizer.zero_grad()
        self.updates += 1
        return metrics | {"grad_norm": norm, "learning_rate": rates["policy"]}

    def accumulate(self, part: Prepared) -> Metrics:
        """Add the gradient of the loss over ``part``, micro-batch by micro-batch under one denominator."""
        scores = part.scores
        if self.objective.needs_current:
            current, entropies = self.score(self.model, part.flat, entropy=self.objective.needs_entropies)
            scores = replace(scores, logprobs=current, entropies=entropies)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.updates)
        step = self.objective.prepare(scores, part.flat.group, generator)
        totals: dict[str, float] = defaultdict(float)
        for rows, batch, real in self._micro_batches(part.flat, scores.mask):
            metrics = self._backward(part.take(rows), batch, step.take(rows, batch.mask.shape[1]), real=real)
            for name, value in metrics.items():
                pick = max if name.endswith("/max") else float.__add__
                totals[name] = pick(totals[name], float(value))
        return distributed.sum_metrics(totals)

    def _backward(self, part: Prepared, batch: TrainBatch, step: Step, *, real: bool) -> dict[str, Any]:
        """The gradient of a micro-batch, and its shares of the metrics; of nothing where it is not ``real``."""
        wants_entropy = self.objective.entropy.value > 0
        logprobs, entropies = self._logprobs(self.model, batch, entropy=wants_entropy)
        if not bool(logprobs.isfinite().all()):
            raise _not_finite("a log-prob", float(logprobs.detach()[~logprobs.isfinite()][0]), part.flat)
        scores = _moved(part.scores, self.device)
        loss, metrics = self.objective.loss(
            replace(scores, logprobs=logprobs, entropies=entropies), _moved(step, self.device)
        )
        if self.critic is not None:
            value, value_metrics = self._value_loss(part, batch, step)
            loss, metrics = loss + value, metrics | value_metrics
        if not bool(loss.isfinite()):
            raise _not_finite("the loss", float(loss.detach()), part.flat)
        if loss.requires_grad:  # not so where the policy wrote nothing, as after a prompt that fills the context
            (loss if real else loss * 0).backward()  # type: ignore[no-untyped-call]
            self.optimizer.collect()
        if not real:
            return {}
        assert scores.sampled_logprobs is not None
        gap = (logprobs.detach() - scores.sampled_logprobs).abs()
        metrics[f"{GAP}/mean"] = aggregate(gap, scores.mask, "token-mean", denominator=step.tokens)
        metrics[f"{GAP}/max"] = gap.masked_fill(~scores.mask, 0.0).max()
        counts = {"unique": batch.token_ids.shape[1], "flat": int(part.flat.lengths.sum())}
        return metrics | {f"num_tokens/{name}": float(count) for name, count in counts.items()}

    def _value_loss(self, part: Prepared, batch: TrainBatch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        assert part.returns is not None
        assert part.old_values is not None
        values = distributed.call(self.critic, Critic.values, batch)
        mask, returns = part.scores.mask.to(self.device), part.returns.to(self.device)
        clip = self.estimator.options["value_clip"]
        per_token, flags = value_loss(values, part.old_values.to(self.device), returns, mask, clip=clip or None)
        loss = aggregate(per_token, mask, "token-mean", denominator=step.tokens)
        clipped = aggregate(flags["clip"].float(), mask, "token-mean", denominator=step.tokens)
        return loss, {"critic/loss": loss.detach(), "critic/clip_mean": clipped}

    # -- the models ---------------------------------------------------------------------------------------------------

    def _micro_batches(self, flat: Experience, mask: Tensor) -> Iterator[tuple[Tensor, TrainBatch, bool]]:
        """This process's (rows, batch, whether it counts), as many in every process; targets are where ``mask``."""
        parts = micro_batches(flat.token_ids, flat.lengths, self.config.train.micro_tokens)
        for mine in distributed.share(parts):
            rows = parts[0] if mine is None else mine
            part = flat.take(rows)
            width = part.mask.shape[1]
            yield rows, pack(part.token_ids, part.lengths, mask[rows, :width], self.device), mine is not None

    def _logprobs(
        self, model: Any, batch: TrainBatch, *, entropy: bool, temperature: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        tempered = self.config.sampler.temperature if temperature is None else temperature
        return distributed.call(model, target_logprobs, batch, tempered, entropy=entropy)

    def _score_reference(self, flat: Experience) -> Tensor:
        """Under the starting policy: a copy, or the model without its adapters."""
        if self.reference is not None:
            return self.score(self.reference, flat)[0]
        with self.model.disable_adapter():
            return self.score(self.model, flat)[0]

    @torch.no_grad()
    def _values(self, flat: Experience) -> Tensor:
        found = torch.zeros(flat.mask.shape)
        for rows, batch, real in self._micro_batches(flat, flat.mask):
            values = distributed.call(self.critic, Critic.values, batch)
            if real:
                found[rows, : values.shape[1]] += values.cpu()
        distributed.sum_tensors(found)
        return found

    def _trainable(self, model: Any) -> Any:
        model.train()
        inner = model.decoder if isinstance(model, Critic) else model
        inner.set_attn_implementation(ATTENTION)
        if self.config.train.gradient_checkpointing:
            recompute_layers(inner)
        return model

    def _frozen(self, model: Any) -> Any:
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        frozen.set_attn_implementation(ATTENTION)
        return distributed.shard(frozen)

    def _describe(self, flat: Experience, mask: Tensor, advantages: Tensor) -> Metrics:
        """How much there is to learn from."""
        learnt = mask & (advantages != 0)
        values = advantages[mask] if bool(mask.any()) else advantages.new_zeros(1)
        effective = learnt.any(-1)
        return {
            "advantage/std": float(values.std(correction=0)),
            "advantage/min": float(values.min()),
            "advantage/max": float(values.max()),
            "num_trajectories": float(len(flat)),
            "num_trajectories/effective": float(effective.sum()),
            "num_groups/effective": float(len(set(flat.group[effective].tolist()))),
            "num_tokens/policy": float(flat.mask.sum()),
            "num_tokens/learnt": float(learnt.sum()),
        }


def _moved(record: Any, device: torch.device) -> Any:
    """A record of tensors, on ``device``."""
    if device.type == "cpu":
        return record
    tensors = {name: getattr(record, name) for name in record.__slots__}
    return replace(record, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})


def _deal(group: Tensor, parts: int) -> list[Tensor]:
    """Neighbouring leaves, [l] each, in ``parts`` of nearly as many groups; leaves, where there are fewer groups."""
    _, sizes = torch.unique_consecutive(group, return_counts=True)
    ends = [0, *sizes.cumsum(0).tolist()] if len(sizes) >= parts else list(range(len(group) + 1))
    bounds = [ends[(len(ends) - 1) * i // parts] for i in range(parts + 1)]
    return [torch.arange(a, b) for a, b in pairwise(bounds) if b > a]


def _combine(history: Sequence[Metrics]) -> Metrics:
    """Metrics of several updates as one: token counts add up, the gap is the first's, the rest is averaged."""
    keys = {key for metrics in history for key in metrics}
    combined = {}
    for key in keys:
        values = [m[key] for m in history if key in m]
        if key.startswith(GAP):  # after the first update the policy is meant to differ from the one that sampled
            values = values[:1]
        combined[key] = sum(values) if key.startswith("num_tokens/") else sum(values) / len(values)
    return combined


def _not_finite(what: str, value: float, flat: Experience) -> NonFiniteError:
    error = NonFiniteError(
        f"{what} is {value}: this update was not made. The offending batch is saved in the run folder; look "
        "for a learning rate that is too high or log-probs of -inf."
    )
    error.sample = [flat.describe(row) for row in range(len(flat))]
    return error
