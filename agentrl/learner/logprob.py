"""Log-probs of a batch's targets under a model, once per unique target and never all logits at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from agentrl.errors import ConfigError
from agentrl.learner.attention import ATTENTION
from agentrl.learner.pack import TrainBatch, pack

CHUNK = 2**25
"""Most logits at a time: 128 MiB in fp32, 220 targets at a vocabulary of 151,936."""
TOLERANCE = {torch.float64: 40.0, torch.float32: 40.0, torch.float16: 8.0, torch.bfloat16: 2.0}
"""How far ``check_packable`` lets log-probs differ on average, in roundings of the largest. Measured on random Qwen3
and Llama, logits up to 100,000: right attention gives at most 17 of them in fp32, 4.6 in fp16 and 1.7 in bf16; a wrong
mask or wrong positions at least 74, 28 and 3.5, unless the weights are so small that context hardly matters."""


def hidden_states(model: Any, batch: TrainBatch) -> Tensor:
    """The decoder's last hidden state of every unique token, [N, H], after the final norm.

    Args:
        model: a transformers causal language model (or what has its ``get_decoder``) switched to
            ``attention.ATTENTION``.
        batch: N unique tokens.
    """
    found: Tensor = model.get_decoder()(
        input_ids=batch.token_ids, position_ids=batch.position_ids, use_cache=False, tree=batch
    ).last_hidden_state[0]
    return found


def target_logprobs(
    model: Any, batch: TrainBatch, temperature: float = 1.0, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each policy token under the tempered model, and the entropy of the distribution it was drawn from.

    Logits are made ``CHUNK`` at a time. Where one chunk is not enough, they are made again in the backward pass
    instead of kept, which costs another third of the output embedding's time.

    Args:
        model: a transformers causal language model switched to ``attention.ATTENTION``.
        batch: N unique tokens with M targets on L rows.
        temperature: that of the sampler, above 0; 0 (greedy) is scored untempered, as the sampler does.
        entropy: whether entropies are wanted.

    Returns:
        [L, T] log-probs and [L, T] entropies in nats (or None), 0 where masked. float32, or float64 of a model in
        float64; both carry gradients.
    """
    hidden = hidden_states(model, batch).index_select(0, batch.parent_index)
    rows = max(CHUNK // model.config.get_text_config().vocab_size, 1)
    found = _scores(model.get_output_embeddings(), hidden, batch.target_ids, temperature or 1.0, entropy, rows)
    if not batch.target_ids.numel():
        # Zeros that still hang on the graph: of many processes, each has to make every backward pass.
        none = hidden.new_zeros(batch.mask.shape, dtype=found.dtype) + found.sum()
        return none, none.clone() if entropy else None
    spread = found[batch.gather].masked_fill(~batch.mask.unsqueeze(-1), 0.0)
    return spread[..., 0], spread[..., 1] if entropy else None


def _scores(head: Any, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool, rows: int) -> Tensor:
    """[M, 1] log-probs, or [M, 2] with entropies, of ``targets`` [M] after ``hidden`` [M, H]; ``rows`` at a time."""
    if len(targets) <= rows:
        return _chunk(head, hidden, targets, temperature, entropy)
    parts = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    return torch.cat([checkpoint(_chunk, head, h, t, temperature, entropy, use_reentrant=False) for h, t in parts])


def _chunk(head: Any, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Tensor:
    logits: Tensor = head(hidden)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    picked = logits.gather(1, targets[:, None]) - total
    if not entropy:
        return picked
    logprobs = logits - total
    return torch.cat([picked, -(logprobs.exp() * logprobs).sum(-1, keepdim=True)], dim=1)


# -- which models fit -------------------------------------------------------------------------------------------------


def check_packable(model: Any) -> None:
    """Refuse a model whose log-probs change when rows share tokens; to be called before training.

    First by its configuration, since a window of 4,096 tokens does not show in a short text; then by proof: two
    branches of a short text, packed, must give the log-probs of flat rows through the model's own attention. The
    model's attention implementation, its modules' training modes and the random state are left as they were.

    Args:
        model: a transformers causal language model, on its device, in its dtype.

    Raises:
        ConfigError: the model does not fit; names its class and the reason.
    """
    reason = _unfit(model) or _disproof(model)
    if reason:
        raise ConfigError(
            f"{type(model).__name__} cannot be trained on trees: {reason}. Expected a causal language model with full "
            "attention in every layer and positions given by position_ids, such as Qwen2, Qwen3 or Llama."
        )


def _unfit(model: Any) -> str | None:
    """What in the configuration stands against sharing."""
    config = model.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        return f"it has layers of {', '.join(kinds)}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"its attention slides over the last {config.sliding_window} tokens"
    if getattr(config, "attention_dropout", 0.0):
        return (
            f"its attention drops out ({config.attention_dropout}), which no sampler does: set attention_dropout to 0"
        )
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "it has cross-attention"
    if not getattr(model, "_supports_attention_backend", False):
        return "it does not take its attention from transformers' AttentionInterface"
    return None


def _disproof(model: Any) -> str | None:
    """How the packed log-probs of a short text differ from the flat ones."""
    config = model.config.get_text_config()
    # Long enough for every way in which ``attention`` cuts a forest, where the model's positions allow it.
    size = min(40, getattr(config, "max_position_embeddings", 80) // 2)
    text = torch.arange(2 * size) * 37
    other = text + (torch.arange(2 * size) >= size)  # from the middle on, every token is another one
    rows = torch.stack([text, other]) % config.vocab_size
    batch = pack(rows, torch.full((2,), 2 * size), torch.ones_like(rows, dtype=torch.bool), model.device)
    try:
        with _as_found(model), torch.no_grad():
            model.set_attn_implementation("sdpa")
            logits = model(input_ids=rows.to(model.device), use_cache=False).logits[:, :-1]
            logits = logits if logits.dtype.itemsize >= 4 else logits.float()
            targets = rows.to(model.device)[:, 1:, None]
            flat = logits.log_softmax(-1).gather(2, targets)[..., 0]
            model.set_attn_implementation(ATTENTION)
            packed = target_logprobs(model, batch)[0][:, 1:]
    except Exception as error:  # whatever another author's model raises on a text packed so, it does not fit
        return f"a packed text made it fail with {type(error).__name__}: {error}"
    difference = float((packed - flat).abs().mean())
    bound = TOLERANCE[model.dtype] * _rounding(logits, flat, model.dtype)
    if difference <= bound:
        return None
    return f"packed and flat log-probs differ by {difference:.2g} nats, expected at most {bound:.2g}"


def _rounding(logits: Tensor, logprobs: Tensor, dtype: torch.dtype) -> float:
    """A last digit of the largest logit in ``dtype`` and of the largest log-prob in fp32, together, in nats.

    Relative to their size, since a policy with very peaked logits has no finer digits.
    """
    fine = torch.finfo(torch.float32).eps  # in fp64 too, as transformers keeps norms and rotations in fp32
    coarse = max(torch.finfo(dtype).eps, fine)
    return float(coarse * logits.abs().max() + fine * logprobs.abs().max())


@contextmanager
def _as_found(model: Any) -> Iterator[None]:
    """The model in evaluation mode; on leaving, its modes, attention implementation and the random state return."""
    modes = [(module, module.training) for module in model.modules()]
    attention = model.config._attn_implementation
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        model.set_attn_implementation(attention)
