"""Rollouts that cost what real ones cost, by a policy of random weights: every turn gets a result, lengths are drawn.

``Cut`` ends turns, since a random policy never does, and notes what was asked of the sampler: the requests that vLLM is
then given by itself.
"""

from __future__ import annotations

import copy
import random
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Self
from zlib import crc32

from agentrl.config import RolloutConfig
from agentrl.renderer import Renderer
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import TokenWriter
from agentrl.tiny import build_tokenizer
from agentrl.types import Completion, Message, Outcome, SamplingParams, StepResult, StopReason, Task, TokenEvent

TURNS, SHORTEST, LONGEST = 3, 32, 256
RESULT = "what the tool found, in some words that are different every time: "
POLICIES: dict[str, dict[str, Any]] = {"group": {}, "entropy_tree": {"first_tokens": 20}}


class Turns:
    """Whatever the policy writes, a result comes back; after ``TURNS`` turns it is over."""

    def __init__(self) -> None:
        self._task = Task("")
        self._left = TURNS

    def tasks(self, split: str) -> Iterable[Task]:
        """Prompts of some 600 bytes."""
        for number in range(100_000):
            yield Task(f"question {number}: " + f"{number} words about it, " * 30, id=f"{split}-{number}")

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """Begin."""
        self._task, self._left = (options or {})["task"], TURNS
        return self._task.prompt, {"task_id": self._task.id, "tools": ()}

    async def step(self, action: Message) -> StepResult:
        """Give a result, or end it."""
        self._left -= 1
        if not self._left:
            return StepResult((), 0.0, True, False, {"outcome": Outcome.ANSWERED})
        found = RESULT + str(crc32(f"{self._task.id} {self._left}".encode()))
        return StepResult((Message("tool", found, tool_call_id="call_0_0"),), 0.0, False, False, {"tool_results": ()})

    async def truncate(self, action: Message, outcome: Outcome) -> StepResult:
        """End it."""
        return StepResult((), 0.0, False, True, {"outcome": outcome})

    async def fork(self) -> Self:
        """One as far."""
        return copy.copy(self)

    async def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of the engine.

    Attributes:
        prompt: [T] ids.
        tokens: that were generated.
    """

    prompt: tuple[int, ...]
    tokens: int


class Cut:
    """``sampler``, whose answers have the lengths that are drawn from their seeds, and end with ``stop``.

    Attributes:
        requests: those that were answered, since the last ``take``.
    """

    def __init__(self, sampler: Any, stop: int) -> None:
        self.requests: list[Request] = []
        self._sampler, self._stop = sampler, stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def take(self) -> list[Request]:
        """The requests so far, and forget them."""
        taken, self.requests = self.requests, []
        return taken

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Completion:
        """See ``Sampler.sample``."""
        done: Completion = await self._sampler.sample(token_ids, self._cut(params))
        self.requests.append(Request(tuple(token_ids), len(done.token_ids)))
        return replace(done, token_ids=(*done.token_ids[:-1], self._stop), stop_reason=StopReason.STOP)

    async def stream(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenEvent, None]:
        """See ``Sampler.stream``."""
        count = 0
        async with aclosing(self._sampler.stream(token_ids, self._cut(params))) as events:
            async for event in events:
                count += 1
                if event.stop_reason is None:
                    yield event
                    continue
                self.requests.append(Request(tuple(token_ids), count))
                yield event._replace(token_id=self._stop, stop_reason=StopReason.STOP)

    def _cut(self, params: SamplingParams) -> SamplingParams:
        wanted = random.Random(params.seed).randint(SHORTEST, LONGEST)
        return replace(params, max_tokens=min(wanted, params.max_tokens), stop_ids=())


class Field:
    """Where trees are grown.

    Args:
        sampler: whose speed is wanted.
        tasks: trees at once.
        leaves: of each.
    """

    def __init__(self, sampler: Any, tasks: int, leaves: int) -> None:
        tokenizer = build_tokenizer(["question words about it what the tool found, in some words"], vocab=300)
        self._renderer = Renderer(tokenizer)
        self.sampler = Cut(sampler, self._renderer.stop_ids[0])
        self._tasks, self._leaves = tasks, leaves
        self._unseen = iter(Turns().tasks("train"))

    async def grow(self, name: str, seed: int) -> list[Request]:
        """Grow trees by policy ``name`` from tasks that nobody has seen; what was asked of the sampler."""
        limits = RolloutConfig(
            group=self._leaves,
            policy=name,
            policy_options=POLICIES[name],
            max_tokens=TURNS * LONGEST,
            deadline=3600,
            stall=3600,
        )
        params = SamplingParams(TURNS * LONGEST)

        def writer(seed: int) -> TokenWriter:
            return TokenWriter(self.sampler, self._renderer, params, seed)

        scheduler = Scheduler(Turns, writer, limits, params)
        trees = await scheduler.grow([next(self._unseen) for _ in range(self._tasks)], seed=seed)
        requests = self.sampler.take()
        written, spent = sum(each.tokens for each in requests), sum(tree.spent["tokens"] for tree in trees)
        if any(len(tree.rewards) != self._leaves for tree in trees) or written != spent:
            raise RuntimeError(
                f"{name}: {written} tokens were sampled and {spent:.0f} are in trees of "
                f"{sorted({len(tree.rewards) for tree in trees})} leaves: expected equal tokens, {self._leaves} leaves."
            )
        return requests
