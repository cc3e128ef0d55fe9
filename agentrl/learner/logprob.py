"""Log-probs of a batch's targets under a model, once per unique target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentrl.learner.pack import TrainBatch


def target_logprobs(model: Any, batch: TrainBatch, temperature: float = 1.0) -> Tensor:
    """Log-prob of each policy token under the tempered model, ``[L, T]``; 0 where masked.

    Args:
        model: a transformers causal language model switched to ``pack.ATTENTION``.
        batch: N unique tokens with M targets on L paths.
        temperature: that of the sampler, above 0; 0 (greedy) is scored untempered, as the sampler does.
    """
    hidden = model.get_decoder()(
        input_ids=batch.token_ids, position_ids=batch.position_ids, use_cache=False, tree=batch
    ).last_hidden_state[0]
    logits = model.get_output_embeddings()(hidden.index_select(0, batch.parent_index)).float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    picked = logits.gather(1, batch.target_ids[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)
    if not len(picked):
        return torch.zeros_like(batch.old_logprobs)
    spread: Tensor = picked[batch.gather].masked_fill(~batch.mask, 0.0)
    return spread
