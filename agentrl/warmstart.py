"""Supervised warm start: learn to write what demonstrations wrote, loss on the assistant's tokens only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agentrl.config import SFTConfig
from agentrl.demonstrations import Tokens
from agentrl.errors import NonFiniteError, TaskError
from agentrl.learner.attention import ATTENTION
from agentrl.learner.logprob import target_logprobs
from agentrl.learner.pack import TrainBatch, pack


def sft(
    model: Any,
    expert: Sequence[Tokens],
    guesses: Sequence[Tokens],
    config: SFTConfig,
    *,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train ``model`` in place.

    Every batch draws ``guess_fraction`` of its demonstrations from ``guesses`` and the rest from ``expert``, and packs
    them, so that prompts in common are computed once.

    Args:
        model: a transformers causal language model.
        expert: demonstrations worth imitating.
        guesses: demonstrations that answer without tools; may be empty where ``guess_fraction`` is 0.
        config: steps, batch and rates.
        seed: of the order of demonstrations.
        progress: called with the step and its loss.

    Returns:
        The loss of every step, in nats per token.

    Raises:
        TaskError: nothing to learn from.
        NonFiniteError: the loss is not finite.
    """
    if not expert or (config.guess_fraction > 0 and not guesses):
        raise TaskError(f"expected demonstrations, got {len(expert)} of the expert and {len(guesses)} guesses.")
    model.train().set_attn_implementation(ATTENTION)
    device = next(model.parameters()).device
    optimizers = _optimizers(model, config)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    rng = random.Random(seed)
    losses: list[float] = []
    for step in range(config.steps):
        batch = _packed([_pick(expert, guesses, config, rng) for _ in range(config.batch)], device)
        loss = -target_logprobs(model, batch)[0].sum() / batch.mask.sum()
        if not bool(loss.isfinite()):
            raise NonFiniteError(
                f"the warm start's loss is {float(loss.detach())} at step {step}: lower sft.lr or sft.muon_lr."
            )
        _apply(model, optimizers, peaks, loss, _schedule(step, config))
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step, losses[-1])
    return losses


def _pick(expert: Sequence[Tokens], guesses: Sequence[Tokens], config: SFTConfig, rng: random.Random) -> Tokens:
    return rng.choice(guesses if rng.random() < config.guess_fraction else expert)


def _packed(demonstrations: Sequence[Tokens], device: torch.device) -> TrainBatch:
    ids = [torch.tensor(tokens.token_ids) for tokens in demonstrations]
    own = [torch.tensor(tokens.policy) for tokens in demonstrations]
    lengths = torch.tensor([len(row) for row in ids])
    return pack(pad_sequence(ids, batch_first=True), lengths, pad_sequence(own, batch_first=True), device)


def _optimizers(model: torch.nn.Module, config: SFTConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon (Jordan et al. 2024) for the hidden matrices and AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)]
    rest = [p for _, p in named if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _schedule(step: int, config: SFTConfig) -> float:
    """Linear warm-up, constant, linear decay to a fiftieth."""
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    tail = config.decay * config.steps
    return warm * (max(0.02, min(1.0, (config.steps - step) / tail)) if tail else 1.0)


def _apply(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    peaks: list[list[float]],
    loss: Tensor,
    scale: float,
) -> None:
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        optimizer.zero_grad(set_to_none=True)
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * scale
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
