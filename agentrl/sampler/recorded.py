"""A sampler that has nothing to say but what was recorded."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentrl.errors import NotRecorded
from agentrl.rollout.record import Turn, dotted
from agentrl.types import Completion, SamplingParams, TokenEvent


class RecordedSampler:
    """Gives the recorded completion of a seed, for exactly the recorded prompt.

    Args:
        written: the record's turns.
        max_length: most tokens of a sequence, as in the run.
    """

    deterministic = True
    entropies = True

    def __init__(self, written: Sequence[Turn], max_length: int, version: int = 0) -> None:
        self._turns = {turn.seed: turn for turn in written}
        self.max_length, self.version = max_length, version

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Completion:
        """What was recorded.

        Raises:
            NotRecorded: nothing was with this seed, or after another prompt.
        """
        turn = self._turns.get(params.seed)
        if turn is None:
            raise NotRecorded("the record has no tokens for this turn: the trajectory ended before it.")
        if turn.prompt != tuple(token_ids):
            raise NotRecorded(
                f"the record has turn {turn.number} of trajectory {dotted(turn.owner)} after other tokens than these."
            )
        node = turn.node
        assert node.stop_reason is not None
        return Completion(
            node.token_ids,
            node.logprobs,
            node.entropies,
            node.stop_reason,
            node.policy_version,
            params.temperature,
            params.top_p,
        )

    async def stream(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenEvent, None]:
        """The same, token by token."""
        done = await self.sample(token_ids, params)
        last = len(done.token_ids) - 1
        rows = zip(done.token_ids, done.logprobs, done.entropies, done.policy_version, strict=True)
        for place, row in enumerate(rows):
            yield TokenEvent(*row, done.stop_reason if place == last else None)

    async def update_weights(self, source: Mapping[str, Any] | Path, version: int) -> None:
        """There are none."""
        raise NotImplementedError("a record has no weights to update")

    async def close(self) -> None:
        """Nothing to release."""
