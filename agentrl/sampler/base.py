"""What every sampler offers. Token ids in, token ids out; one contract test suite runs against each backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from agentrl.types import Completion, SamplingParams, TokenEvent


class Sampler(Protocol):
    """A policy that can be sampled from.

    Attributes:
        version: version of the weights in use; grows with every ``update_weights``.
        max_length: most tokens, prompt and completion together.
        entropies: whether completions carry them; where not, they are NaN.
        deterministic: whether log-probs are bit for bit the same whatever else is being sampled.
    """

    version: int
    max_length: int
    entropies: bool
    deterministic: bool

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Continue ``token_ids``; cancelling the await frees whatever the request holds.

        Raises:
            SamplerError: the engine failed or is closed, or the prompt does not fit.
        """
        ...

    def stream(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenEvent, None]:
        """The same, token by token."""
        ...

    async def update_weights(self, source: Mapping[str, Any] | Path, version: int) -> None:
        """Use ``source`` from now on, under ``version``; nothing that older weights computed is used any more.

        Args:
            source: parameter name -> tensor, as ``Learner.weights`` gives it, or a checkpoint folder.
            version: greater than those before.

        Raises:
            SamplerError: weights of another policy, or they did not get through.
        """
        ...

    async def close(self) -> None:
        """Release the engine; waiting requests fail with ``SamplerError``."""
        ...
