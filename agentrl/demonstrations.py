"""Demonstrations: an environment's scripted expert (or guesser) played against the real tools and written down."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agentrl.env import ToolEnv
from agentrl.errors import EnvError, UserError
from agentrl.renderer import Renderer
from agentrl.seeds import derive_seed
from agentrl.types import Message, Task

MAX_LIVE = 64
"""Demonstrations recorded at once."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One finished conversation.

    Attributes:
        opening: the messages of the prompt.
        turns: what followed: each assistant message with the messages that answered it.
        tools: the schemas that the prompt shows.
        reward: what the environment gave it.
    """

    opening: tuple[Message, ...]
    turns: tuple[tuple[Message, tuple[Message, ...]], ...]
    tools: tuple[dict[str, Any], ...]
    reward: float

    @property
    def messages(self) -> list[Message]:
        """The whole conversation."""
        return [*self.opening, *(m for said, heard in self.turns for m in (said, *heard))]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A demonstration as the policy sees it: ids [T], and which of them it has to learn to write [T]."""

    token_ids: tuple[int, ...]
    policy: tuple[bool, ...]


async def record(
    make_env: Callable[[], ToolEnv],
    tasks: Sequence[Task],
    *,
    seed: int,
    guess: bool = False,
    progress: Callable[[], None] | None = None,
) -> list[Demonstration]:
    """Play the scripted expert (or guesser) on ``tasks``, in order.

    Raises:
        UserError: the environment has no such script, or the expert's messages did not end the episode.
    """
    gate = asyncio.Semaphore(MAX_LIVE)

    async def one(index: int, task: Task) -> Demonstration:
        async with gate:
            demonstration = await _play(make_env(), task, derive_seed(seed, task.id, index), guess)
        if progress is not None:
            progress()
        return demonstration

    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(i, task)) for i, task in enumerate(tasks)]
    except* (UserError, EnvError) as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in running]


def encode(renderer: Renderer, demonstration: Demonstration) -> Tokens:
    """Token ids and the loss mask: only what the assistant wrote is learnt, its stop token included."""
    ids = list(renderer.prompt(demonstration.opening, demonstration.tools))
    policy = [False] * len(ids)
    for said, heard in demonstration.turns:
        written = renderer.assistant(said)
        ids.extend(written)
        policy.extend([True] * len(written))
        if heard:
            read = renderer.continuation(heard)
            ids.extend(read)
            policy.extend([False] * len(read))
    return Tokens(tuple(ids), tuple(policy))


async def _play(env: ToolEnv, task: Task, seed: int, guess: bool) -> Demonstration:
    rng = random.Random(seed)
    try:
        script = env.guesser(task, rng) if guess else env.expert(task, rng)
    except NotImplementedError as error:
        raise UserError(str(error)) from error
    turns: list[tuple[Message, tuple[Message, ...]]] = []
    try:
        opening, info = await env.reset(seed=seed, options={"task": task})
        for message in script:
            step = await env.step(message)
            turns.append((message, step.observation))
            if step.terminated or step.truncated:
                return Demonstration(tuple(opening), tuple(turns), tuple(info["tools"]), step.reward)
    finally:
        await env.close()
    raise UserError(
        f"the {'guesser' if guess else 'expert'} of {type(env).__name__} stopped after {len(script)} messages on task "
        f"{task.id} without ending the episode: its last message must be the answer."
    )
