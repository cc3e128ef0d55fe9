"""One episode: a writer takes turns with an environment until the environment says that it is over.

The loop does not know who writes. ``TokenWriter`` samples token ids and keeps them exactly as sampled;
``sampler.openai.ChatWriter`` asks a chat server and has text only.
"""

from __future__ import annotations

import asyncio
import math
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from agentrl.env import Env
from agentrl.errors import DeadlineExceeded, IsolationUnavailable, RewardError, SamplerError, UserError
from agentrl.renderer import Renderer
from agentrl.sampler.base import Sampler
from agentrl.seeds import derive_seed
from agentrl.types import Leaf, Message, Node, Outcome, SamplingParams, StepResult, StopReason, Task

CLOSING = 30.0
"""Seconds that an environment may take to close; not part of the episode's deadline."""


@dataclass(frozen=True, slots=True)
class Played:
    """A finished episode: its nodes form a chain (the first is the prompt), the leaf ends it."""

    nodes: tuple[Node, ...]
    leaf: Leaf


class Writer(Protocol):
    """Writes the assistant's turns of one episode and keeps the nodes."""

    nodes: list[Node]

    def begin(self, opening: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
        """Take the opening messages."""
        ...

    async def write(self) -> tuple[Message, StopReason]:
        """The next assistant message; ``LENGTH`` where a budget cut it or left no room for it."""
        ...

    def read(self, step: StepResult) -> None:
        """Take the environment's new messages."""
        ...


class TokenWriter:
    """Samples turns as token ids; what was sampled is never decoded and encoded again.

    Args:
        sampler: where tokens come from.
        renderer: how messages become ids and ids messages.
        params: temperature and top-p; ``max_tokens`` is the budget of the whole episode.
        seed: every turn's random numbers derive from it.
    """

    def __init__(self, sampler: Sampler, renderer: Renderer, params: SamplingParams, seed: int) -> None:
        self.nodes: list[Node] = []
        self._sampler, self._renderer, self._params, self._seed = sampler, renderer, params, seed
        self._ids: list[int] = []
        self._left = params.max_tokens
        self._turn = 0

    def begin(self, opening: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
        """Render the prompt."""
        self._tools = tools
        self._stops = self._renderer.stop_strings(tools)
        self._add(Node(-1, "prompt", self._renderer.prompt(opening, tools), messages=tuple(opening)))

    async def write(self) -> tuple[Message, StopReason]:
        """Sample one turn."""
        room = min(self._left, self._sampler.max_length - len(self._ids))
        if room < 1:
            return Message("assistant", ""), StopReason.LENGTH
        params = SamplingParams(
            room,
            self._params.temperature,
            self._params.top_p,
            self._renderer.stop_ids,
            self._stops,
            derive_seed(self._seed, self._turn),
        )
        done = await self._sampler.sample(self._ids, params)
        message = self._renderer.parse(done.token_ids, self._tools, self._turn)
        self._left -= len(done.token_ids)
        self._turn += 1
        self._add(
            Node(
                len(self.nodes) - 1,
                "policy",
                done.token_ids,
                done.logprobs,
                done.entropies,
                done.policy_version,
                (message,),
                stop_reason=done.stop_reason,
            )
        )
        return message, done.stop_reason

    def read(self, step: StepResult) -> None:
        """Render only the new messages."""
        ids = self._renderer.continuation(step.observation)
        results = tuple(step.info.get("tool_results", ()))
        messages = tuple(step.observation)
        self._add(Node(len(self.nodes) - 1, "tool", ids, messages=messages, tool_results=results))

    def _add(self, node: Node) -> None:
        self.nodes.append(node)
        self._ids.extend(node.token_ids)


async def play(env: Env, task: Task, writer: Writer, *, seed: int, deadline: float) -> Played:
    """Play one episode to its end. Whatever the environment does wrong becomes the leaf's outcome.

    Args:
        env: a fresh environment; closed on return.
        task: what to play.
        writer: who plays.
        seed: of the environment and its tools.
        deadline: seconds for the whole episode.

    Raises:
        SamplerError: the sampler failed; no episode can be played.
        UserError: the task or the environment's definition has to be mended.
        IsolationUnavailable: no sandbox can be had on this machine.
    """
    began = time.perf_counter()
    progress = _Progress()
    error: str | None = None
    outcome: Outcome = Outcome.ENV_FAILURE
    reward: float | None = None
    try:
        async with asyncio.timeout(deadline) as timer:
            outcome, reward = await _turns(env, task, writer, seed, progress)
    except (SamplerError, UserError, IsolationUnavailable):
        raise
    except TimeoutError as failure:
        error = _trace(failure)
        if timer.expired():
            outcome = Outcome.TIMEOUT
            error = (
                f"{DeadlineExceeded.__name__}: task {task.id} did not finish within {deadline:g} s (rollout.deadline); "
                f"it was stuck in {progress.where()} of turn {progress.turns}."
            )
    except Exception as failure:
        error = _trace(failure)
    finally:
        unclosed = await _close(env)
    if unclosed is not None and error is None:
        outcome, reward, error = Outcome.ENV_FAILURE, None, unclosed
    seconds = time.perf_counter() - began
    return Played(
        tuple(writer.nodes),
        Leaf(len(writer.nodes) - 1, reward, outcome, seed, error, seconds, progress.metrics()),
    )


@dataclass(slots=True)
class _Progress:
    """How far an episode got, readable after a failure."""

    stage: str = "reset"
    action: Message | None = None
    turns: int = 0
    calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def where(self) -> str:
        """The stage, with the calls that ``env.step`` is at work on."""
        if self.action is None:
            return self.stage
        return f"{self.stage} ({', '.join(c.name or 'malformed call' for c in self.action.tool_calls) or 'answer'})"

    def count(self, step: StepResult) -> None:
        for result in step.info.get("tool_results", ()):
            self.calls += 1
            if result.error is not None:
                self.failures[result.error] += 1

    def metrics(self) -> dict[str, float]:
        kinds = {f"tool_failures/{kind}": float(n) for kind, n in sorted(self.failures.items())}
        total = float(self.failures.total())
        return {"turns": float(self.turns), "tool_calls": float(self.calls), "tool_failures": total, **kinds}


async def _close(env: Env) -> str | None:
    """Close ``env``; what went wrong, if anything did."""
    try:
        async with asyncio.timeout(CLOSING):
            await env.close()
    except Exception as failure:  # whatever it is, it must not reach the other episodes
        return _trace(failure)
    return None


async def _turns(env: Env, task: Task, writer: Writer, seed: int, progress: _Progress) -> tuple[Outcome, float | None]:
    opening, info = await env.reset(seed=seed, options={"task": task})
    writer.begin(opening, info.get("tools", ()))
    total = 0.0
    while True:
        progress.stage, progress.action = "sampling", None
        message, reason = await writer.write()
        progress.turns += 1
        progress.stage, progress.action = "env.step", message
        cut = reason is StopReason.LENGTH
        step = await (env.truncate(message, Outcome.LENGTH) if cut else env.step(message))
        total += step.reward
        progress.count(step)
        if step.terminated or step.truncated:
            if not math.isfinite(total):
                raise RewardError(f"{type(env).__name__}.step gave a reward of {step.reward!r} on task {task.id}.")
            default = Outcome.ANSWERED if step.terminated else Outcome.TURN_LIMIT
            outcome = Outcome(step.info.get("outcome", default))
            return outcome, total if outcome.scored else None
        writer.read(step)


def _trace(failure: BaseException) -> str:
    return "".join(traceback.format_exception(failure))
