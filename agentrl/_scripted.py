"""Episodes whose assistant messages are known beforehand, played through an environment's public interface."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentrl.env import Env
from agentrl.errors import DeadlineExceeded, EnvError
from agentrl.types import Message, StepResult, Task, ToolCall

MOST_TURNS = 1000
EXPERT, WRONG = "expert", "wrong answer"


@dataclass(frozen=True, slots=True)
class Script:
    """One episode to play.

    Attributes:
        name: what it tries.
        task: on which task.
        actions: the assistant's messages; the last one is repeated until the episode ends.
    """

    name: str
    task: Task
    actions: tuple[Message, ...]

    def __str__(self) -> str:
        return f"{self.name} on task {self.task.id}"


@dataclass(slots=True)
class Run:
    """A script as it was played.

    Attributes:
        opening: the messages that ``reset`` gave.
        info: the info that ``reset`` gave.
        steps: what every step gave.
        actions: the action of every step.
        slowest: seconds of the slowest ``reset`` or ``step``.
    """

    opening: tuple[Message, ...]
    info: dict[str, Any]
    steps: list[StepResult] = field(default_factory=list)
    actions: list[Message] = field(default_factory=list)
    slowest: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether the last step ended the episode."""
        return bool(self.steps) and (self.steps[-1].terminated or self.steps[-1].truncated)

    def turn(self, number: int) -> tuple[Any, ...]:
        """What must be the same when the script is played again."""
        step = self.steps[number]
        texts = [(m.role, m.content, m.tool_call_id) for m in step.observation]
        return texts, step.reward, step.terminated, step.truncated, step.info.get("outcome")


@dataclass(frozen=True, slots=True)
class Player:
    """Plays scripts, each in a new environment.

    Attributes:
        make: a new environment.
        seed: of every episode.
        deadline: seconds that one ``reset``, ``step`` or ``fork`` may take.
    """

    make: Callable[[], Env]
    seed: int
    deadline: float

    async def play(self, script: Script) -> Run:
        """Play from the beginning to the end.

        Raises:
            DeadlineExceeded: one call took longer than the deadline.
        """
        env = self.make()
        try:
            run = await self._begin(env, script)
            await self._go_on(env, run, script.actions)
            return run
        finally:
            await env.close()

    async def play_forked(self, script: Script, other: Script, cut: int) -> list[tuple[Script, Run]]:
        """Play ``cut`` turns of ``script``, fork, and go on in all of them, which take their turns at the same time.

        The environment itself and a fork of it do as ``script`` says; so does a fork of that fork, made a turn later.
        A second fork and a fork of the first one do as ``other`` says, which begins with the same turns.
        """
        envs: list[Env] = []

        async def fork(parent: Env, run: Run, followed: Script) -> tuple[Env, Run, Script]:
            envs.append(twin := await self._timed("fork", parent.fork(), run))
            return twin, Run(run.opening, run.info, list(run.steps), list(run.actions), run.slowest), followed

        envs.append(parent := self.make())
        try:
            run = await self._begin(parent, script)
            await self._go_on(parent, run, script.actions, most=cut)
            child = await fork(parent, run, script)
            members = [(parent, run, script), child, await fork(parent, run, other), await fork(*child[:2], other)]
            for turn in range(cut + 1, MOST_TURNS):
                turns = (self._go_on(env, its, followed.actions, most=turn) for env, its, followed in members)
                for failure in await asyncio.gather(*turns, return_exceptions=True):
                    if failure is not None:
                        raise failure
                if turn == cut + 1 and not child[1].ended:
                    members.append(await fork(*child[:2], script))
                if all(its.ended for _, its, _ in members):
                    break
            return [(followed, its) for _, its, followed in members]
        finally:
            async with contextlib.AsyncExitStack() as closing:
                for env in envs:
                    closing.push_async_callback(env.close)

    async def begin_and_fork(self, script: Script) -> None:
        """Fork right after ``reset``, and throw the fork away; whatever ``fork`` raises comes through."""
        env = self.make()
        try:
            run = await self._begin(env, script)
            await (await self._timed("fork", env.fork(), run)).close()
        finally:
            await env.close()

    async def _begin(self, env: Env, script: Script) -> Run:
        run = Run((), {})
        opening, run.info = await self._timed("reset", env.reset(seed=self.seed, options={"task": script.task}), run)
        run.opening = tuple(opening)
        return run

    async def _go_on(self, env: Env, run: Run, actions: Sequence[Message], most: int = MOST_TURNS) -> None:
        while len(run.steps) < most and not run.ended:
            action = actions[min(len(run.steps), len(actions) - 1)]
            step = await self._timed("step", env.step(action), run)
            if not (isinstance(step, tuple) and len(step) == len(StepResult._fields)):
                raise EnvError(f"step() gave {step!r}; expected gymnasium's five: {', '.join(StepResult._fields)}.")
            run.steps.append(StepResult(*step))
            run.actions.append(action)

    async def _timed(self, what: str, work: Awaitable[Any], run: Run) -> Any:
        loop = asyncio.get_running_loop()
        began = loop.time()
        timer = asyncio.timeout(self.deadline)
        try:
            async with timer:
                result = await work
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise DeadlineExceeded(f"{what}() did not finish within {self.deadline:g} s.") from error
        run.slowest = max(run.slowest, loop.time() - began)
        return result


def scripts(env: Env, task: Task, seed: int) -> list[Script]:
    """The expert's episode, where there is an expert, and one for every way of doing it wrong."""
    answer = Message("assistant", "no such answer")
    unknown = [_calling(ToolCall(f"call_{turn}_0", "no_such_tool", {"x": 1})) for turn in range(MOST_TURNS)]
    malformed = _calling(ToolCall("call_0_0", "", error="The tool call is not valid JSON."))
    ways: dict[str, Sequence[Message]] = {
        WRONG: [answer],
        "empty answer": [Message("assistant", "")],
        "malformed call": [malformed, answer],
        "unknown tool": [unknown[0], answer],
        "turn limit": unknown,
    }
    if hasattr(env, "expert"):
        with contextlib.suppress(NotImplementedError):
            ways = {EXPERT: env.expert(task, random.Random(seed)), **ways}
    return [Script(name, task, tuple(actions)) for name, actions in ways.items()]


def _calling(call: ToolCall) -> Message:
    return Message("assistant", "", (call,))
