"""A critic for PPO: how much reward is still to come, guessed before every token the policy writes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from agentrl.learner.logprob import hidden_states
from agentrl.learner.pack import TrainBatch


class Critic(nn.Module):
    """The policy's decoder, copied, under a linear head that begins at 0.

    A head of zeros says "no reward" everywhere, so that the first advantages are the returns themselves and not the
    noise of a random head.

    Args:
        policy: a transformers causal language model; its weights are copied and its vocabulary head is not.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        decoder = copy.deepcopy(policy.get_decoder())
        self.decoder = decoder.requires_grad_(True)
        example = next(self.decoder.parameters())
        width = policy.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, device=example.device, dtype=example.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def get_decoder(self) -> Any:
        """What ``hidden_states`` runs, as in a causal language model."""
        return self.decoder

    def values(self, batch: TrainBatch) -> Tensor:
        """[L, T] the value of the state in which each policy token was written; 0 where masked."""
        states = hidden_states(self, batch).index_select(0, batch.parent_index)
        values = self.head(states)[:, 0].float()
        if not len(values):
            # On the graph nevertheless: of many processes, each has to make every backward pass.
            nothing: Tensor = torch.zeros(batch.mask.shape, device=batch.mask.device) + values.sum()
            return nothing
        spread: Tensor = values[batch.gather].masked_fill(~batch.mask, 0.0)
        return spread
