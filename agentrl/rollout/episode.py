"""One trajectory: a writer takes turns with an environment until the environment says that it is over.

The loop knows neither who writes nor who looks on; a branch goes on in the middle of an episode, with an environment
and a writer that were forked there.
"""

from __future__ import annotations

import asyncio
import copy
import math
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from agentrl.env import Env
from agentrl.errors import DeadlineExceeded, IsolationUnavailable, RewardError, SamplerError, UserError
from agentrl.rollout.writer import Watch, Writer
from agentrl.sandbox.limit import notice
from agentrl.types import Leaf, Message, Node, Outcome, StepResult, StopReason, Task, ToolResult

CLOSING = 30.0
"""Seconds that an environment may take to close; not part of the episode's deadline."""


@dataclass(frozen=True, slots=True)
class Played:
    """A finished trajectory: its nodes form a chain (the first is the prompt), the leaf ends it."""

    nodes: tuple[Node, ...]
    leaf: Leaf


@dataclass(slots=True)
class Progress:
    """How far a trajectory got, readable while it is played and after a failure.

    Attributes:
        stage: what it waits for.
        since: when that began, of ``time.perf_counter``.
        action: the message that the environment is at work on.
        turns: policy turns so far.
        reward: the sum of the rewards so far.
        calls: tool calls so far.
        failures: of these, how many went wrong, by kind.
        results: of the calls in the last turn, where the episode ended with them.
        lacks: what the stage cannot go on without; empty where it goes on.
    """

    stage: str = "reset"
    since: float = field(default_factory=time.perf_counter)
    action: Message | None = None
    turns: int = 0
    reward: float = 0.0
    calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    results: tuple[ToolResult, ...] = ()
    lacks: str = ""

    def enter(self, stage: str, action: Message | None = None) -> None:
        """Begin to wait for something else."""
        self.stage, self.action, self.since = stage, action, time.perf_counter()

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Inside, the stage waits for ``what``."""
        self.lacks = what
        try:
            yield
        finally:
            self.lacks = ""

    def fork(self) -> Progress:
        """The progress of a sibling from here on."""
        twin = copy.copy(self)
        twin.lacks = ""
        twin.failures = self.failures.copy()
        twin.enter("waiting for its turn")
        return twin

    def where(self) -> str:
        """The stage, with the calls that ``env.step`` is at work on, and what is missing for it."""
        lacks = f", waiting for {self.lacks}," if self.lacks else ""
        if self.action is None:
            return self.stage + lacks
        calls = ", ".join(c.name or "malformed call" for c in self.action.tool_calls) or "answer"
        return f"{self.stage} ({calls}){lacks}"

    def count(self, step: StepResult) -> None:
        """Note what a step did."""
        self.reward += step.reward
        for result in step.info.get("tool_results", ()):
            self.calls += 1
            if result.error is not None:
                self.failures[result.error] += 1

    def metrics(self) -> dict[str, float]:
        """For the leaf."""
        kinds = {f"tool_failures/{kind}": float(n) for kind, n in sorted(self.failures.items())}
        total = float(self.failures.total())
        return {"turns": float(self.turns), "tool_calls": float(self.calls), "tool_failures": total, **kinds}


async def play(
    env: Env,
    task: Task,
    writer: Writer,
    *,
    seed: int,
    deadline: float,
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> Played:
    """Play a trajectory to its end. Whatever the environment does wrong becomes the leaf's outcome.

    Args:
        env: a fresh environment, or a fork of a live one; closed on return.
        task: what to play.
        writer: who plays; where it has nodes, it goes on in ``env``, which is not reset.
        seed: of the environment and its tools.
        deadline: seconds for all of it.
        watch: who looks on.
        progress: to be kept up to date; that of the episode so far where the trajectory is a branch.

    Raises:
        SamplerError: the sampler failed; no episode can be played.
        UserError: the task or the environment's definition has to be mended.
        IsolationUnavailable: no sandbox can be had on this machine.
    """
    began = time.perf_counter()
    progress = progress or Progress()
    error: str | None = None
    outcome: Outcome = Outcome.ENV_FAILURE
    reward: float | None = None
    told = notice.set(progress.waiting_for)
    try:
        async with asyncio.timeout(deadline) as timer:
            outcome, reward = await _turns(env, task, writer, seed, progress, watch or Watch())
    except (SamplerError, UserError, IsolationUnavailable):
        raise
    except TimeoutError as failure:
        error = describe(failure)
        if timer.expired():
            outcome = Outcome.TIMEOUT
            error = (
                f"{DeadlineExceeded.__name__}: task {task.id} did not finish within {deadline:g} s (rollout.deadline); "
                f"it was stuck in {progress.where()} of turn {progress.turns}."
            )
    except Exception as failure:
        error = describe(failure)
    finally:
        notice.reset(told)
        unclosed = await close(env)
    if unclosed is not None and error is None:
        outcome, reward, error = Outcome.ENV_FAILURE, None, unclosed
    seconds = time.perf_counter() - began
    return Played(
        tuple(writer.nodes),
        Leaf(
            len(writer.nodes) - 1,
            reward,
            outcome,
            seed,
            error,
            seconds,
            progress.metrics(),
            tool_results=progress.results,
        ),
    )


async def close(*envs: Env) -> str | None:
    """Close ``envs``; what went wrong, if anything did. Who is cancelled meanwhile waits until they are closed."""
    closing, cancelled = [asyncio.ensure_future(_closed(env)) for env in envs], None
    while not all(each.done() for each in closing):
        try:
            await asyncio.wait(closing)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return next((problem for each in closing if (problem := each.result()) is not None), None)


async def _closed(env: Env) -> str | None:
    try:
        async with asyncio.timeout(CLOSING):
            await env.close()
    except Exception as failure:  # whatever it is, it must not reach the other episodes
        return describe(failure)
    return None


def describe(failure: BaseException) -> str:
    """A failure with its traceback."""
    return "".join(traceback.format_exception(failure))


async def _turns(
    env: Env, task: Task, writer: Writer, seed: int, progress: Progress, watch: Watch
) -> tuple[Outcome, float | None]:
    if not writer.nodes:
        progress.enter("reset")
        opening, info = await env.reset(seed=seed, options={"task": task})
        writer.begin(opening, info.get("tools", ()))
        progress.enter("a fork of its state")
        await watch.opened()
    while True:
        progress.enter("sampling")
        message, reason = await writer.write(watch)
        progress.turns += 1
        progress.enter("a place for its tool calls", message)
        async with watch.stepping(len(message.tool_calls)):
            progress.enter("env.step", message)
            step = await _step(env, message, reason, watch)
        progress.count(step)
        if step.terminated or step.truncated:
            progress.results = tuple(step.info.get("tool_results", ()))
            if not math.isfinite(progress.reward):
                raise RewardError(f"{type(env).__name__}.step gave a reward of {step.reward!r} on task {task.id}.")
            default = Outcome.ANSWERED if step.terminated else Outcome.TURN_LIMIT
            outcome = Outcome(step.info.get("outcome", default))
            return outcome, progress.reward if outcome.scored else None
        writer.read(step)
        progress.enter("a fork of its state")
        await watch.observed()


async def _step(env: Env, message: Message, reason: StopReason, watch: Watch) -> StepResult:
    """Give ``message`` to the environment, or end the episode where a budget does."""
    if reason is StopReason.LENGTH:
        return await env.truncate(message, Outcome.LENGTH if watch.spend(0) else Outcome.BUDGET)
    if not watch.may_call(len(message.tool_calls)):
        return await env.truncate(message, Outcome.BUDGET)
    step = await env.step(message)
    if step.info.get("outcome") is Outcome.TOOL_LIMIT and not step.info.get("tool_results"):
        watch.not_called(len(message.tool_calls))
    return step
