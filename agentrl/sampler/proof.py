"""The start-up proof: can the embedded engine sample from this model, and are its bits the same in every batch?

The engine replaces a model's attention. A model whose attention does more than causal softmax (a window, sinks, another
position code) would produce plausible nonsense, so the engine's logits are compared with the model's own first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from agentrl.errors import UserError
from agentrl.sampler.slots import Chunk

PROBE = 24
"""Tokens of the prompt that is tried in many ways."""

LONG = 1100
"""Tokens of the one that is tried in a few, or all that fit: BLAS sums over more keys in another order."""

Forward = Callable[[list[Chunk]], Tensor]


def check_lengths(model: Any, max_length: int) -> None:
    """Refuse a length that the model's positions or its attention window do not allow.

    Raises:
        UserError: naming the limit.
    """
    name = type(model).__name__
    positions = getattr(model.config, "max_position_embeddings", max_length)
    if max_length > positions:
        raise UserError(f"sampler.max_length is {max_length}, but {name} has {positions} positions.")
    window = _attention_window(model.config)
    if window is not None and max_length > window:
        raise UserError(
            f"sampler.max_length is {max_length}, but {name} attends only to the last {window} tokens, which the "
            f"embedded engine does not do; set it to {window} or less."
        )


def cannot_sample(model: Any, why: object) -> UserError:
    """The refusal of ``model``."""
    return UserError(
        f"{type(model).__name__} cannot be sampled by the embedded engine, which knows models with ordinary causal "
        f"attention such as Llama, Mistral and Qwen: {why}"
    )


@torch.inference_mode()
def plain_logits(model: Any, max_length: int) -> Tensor:
    """[V] logits after the probe, fp32, through whatever attention the model is set to."""
    ids = torch.tensor([_probe(model, max_length)], device=next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    return logits


def prove(model: Any, reference: Tensor, forward: Forward, *, slots: int, max_length: int) -> bool:
    """Whether the probe has the same logits, bit for bit, alone, piecewise beside another prompt, and in many slots.

    In those its last token is computed with all before it, by itself beside the others', and in slots far apart: the
    shapes of a prompt, of a step of decoding, and of one where most sequences have ended. A long prompt has to have the
    same logits at once and in a dozen pieces.

    Args:
        model: set to the engine's attention.
        reference: ``plain_logits`` of the model's own attention.
        forward: the engine's forward pass: chunks to logits, a row each.
        slots: slots there are, at least 1; their content is overwritten.
        max_length: tokens of a slot.

    Raises:
        UserError: they are not even nearly ``reference``.
    """
    ids = _probe(model, max_length)
    found = [forward([Chunk(0, 0, ids)])[0]]
    for begin, end in pairwise([*range(0, len(ids) - 1, 5), len(ids) - 1, len(ids)]):
        piecewise = forward([Chunk(1, 0, ids[::-1][begin:]), Chunk(0, begin, ids[begin:end])])[1]
    found.append(piecewise)
    for count in (1, 3, 27):
        prompts = [ids[slot % 5 :] or ids for slot in range(min(count, slots))]
        found.extend(forward([Chunk(slot, 0, prompt) for slot, prompt in enumerate(prompts)])[: len(prompts) : 5])
        decoding = [Chunk(slot, len(prompt) - 1, prompt[-1:]) for slot, prompt in enumerate(prompts)]
        found.extend(forward(decoding)[: len(prompts) : 5])
        apart = decoding[::5]
        found.extend(forward(apart)[: len(apart)])
    single = next(model.parameters()).dtype == torch.float32
    tolerance = (1e-3 if single else 0.2) * float(reference.abs().max() + 1)
    error = max(float((logits - reference).abs().max()) for logits in found)
    if not error <= tolerance:
        raise cannot_sample(
            model, f"its logits there differ from its own by {error:.3g}, expected at most {tolerance:.3g}."
        )
    return all(torch.equal(found[0], logits) for logits in found) and _keeps_bits_at_length(model, forward, max_length)


def _keeps_bits_at_length(model: Any, forward: Forward, max_length: int) -> bool:
    ids = _probe(model, max_length, LONG)
    whole = forward([Chunk(0, 0, ids)])[0]
    step = max(PROBE, -(-len(ids) // 12))
    for begin in range(0, len(ids), step):
        piecewise = forward([Chunk(0, begin, ids[begin : begin + step])])[0]
    return torch.equal(whole, piecewise)


def _probe(model: Any, max_length: int, length: int = PROBE) -> Sequence[int]:
    return [(7 * i + 3) % model.config.vocab_size for i in range(min(length, max_length - 1))]


def _attention_window(config: Any) -> int | None:
    """Tokens that the narrowest layer attends to; None where all layers see everything."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window: int | None = getattr(config, "sliding_window", None)
    return window if any(kind != "full_attention" for kind in kinds) else None
