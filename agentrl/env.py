"""Environments: gymnasium's five-tuple, awaited, and ``ToolEnv``, which is what most people subclass.

One environment object is one live episode. ``ToolEnv`` turns an assistant ``Message`` into tool calls, runs them
concurrently, and asks ``reward`` once, at the end.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from agentrl import registry
from agentrl.errors import (
    EnvError,
    ForkRefused,
    IsolationUnavailable,
    RewardError,
    TaskError,
    ToolInfrastructureError,
    UserError,
)
from agentrl.tool import FunctionTool, Tool, dispatch_all
from agentrl.types import Episode, ForkLevel, Message, Outcome, StepResult, Task, ToolCall, ToolResult

_FORK_ORDER = list(ForkLevel)
_OWN = frozenset({"task", "forked", "_tools", "_before", "_options"})
"""Attributes that forks share or that are set for each of them."""
_SHOWN = 120


@runtime_checkable
class Env(Protocol):
    """What the rollout engine needs. Observations are tuples of new messages; actions are assistant messages."""

    def tasks(self, split: str) -> Iterable[Task]:
        """The tasks of ``"train"`` or ``"test"``, in a fixed order."""
        ...

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; ``options={"task": task}`` chooses the task. Returns the opening messages and info."""
        ...

    async def step(self, action: Message) -> StepResult:
        """Apply one assistant message."""
        ...

    async def truncate(self, action: Message, outcome: Outcome) -> StepResult:
        """End the episode from outside, for ``length``: ``action`` is the unfinished message."""
        ...

    async def fork(self) -> Self:
        """An independent environment in the same state. The live episode's environment is not changed by it.

        Raises:
            ForkRefused: the state cannot be forked.
        """
        ...

    async def close(self) -> None:
        """Release whatever the episode holds."""
        ...


class ToolEnv:
    """Base class of tool-using environments.

    Subclasses define ``tasks`` and ``reward``, and usually ``tools``. ``reset`` puts ``{"task_id", "tools"}`` into
    info; ``step`` puts ``{"tool_results"}`` and, at the end, ``{"outcome", "episode"}``.

    A fork copies what was assigned to ``self`` since the first ``reset`` and shares what was there before it, such as
    options and data. See docs/rollouts.md.

    Attributes:
        tools: names in the registry, functions, or ``Tool`` objects.
        system: system prompt put before a task's messages; None for none.
        max_turns: assistant messages an episode may have.
        max_tool_calls: tool calls an episode may make; None for no limit besides the turns.
        reward_range: lowest and highest reward; checked by ``agentrl check``.
        task: the task of the live episode; None before the first ``reset``.
        forked: how this environment was made out of another one, by the weakest means that was needed; None: by
            ``reset``.
    """

    tools: ClassVar[tuple[str | Callable[..., Any] | Tool, ...]] = ()
    system: ClassVar[str | None] = None
    max_turns: int = 8
    max_tool_calls: int | None = None
    reward_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    task: Task | None = None
    forked: ForkLevel | None = None
    _done: bool = True
    _before: dict[str, Any] | None = None

    # -- what a subclass defines ------------------------------------------------------------------------------

    def tasks(self, split: str) -> Iterable[Task]:
        """The tasks of ``split`` (``"train"`` or ``"test"``), the same ones in the same order every time."""
        raise NotImplementedError(f"{type(self).__name__} must define tasks(split)")

    async def reward(self, task: Task, episode: Episode) -> float:
        """Score a finished episode with a finite float. Called once, also for episodes without an answer."""
        raise NotImplementedError(f"{type(self).__name__} must define reward(task, episode)")

    async def setup(self, task: Task) -> None:
        """Prepare the tools' state for ``task``; called after the tools have started."""

    def expert(self, task: Task, rng: random.Random) -> list[Message]:
        """A demonstration: the assistant messages a skilled policy would send. Needed only for ``agentrl sft``."""
        raise NotImplementedError(f"{type(self).__name__} has no scripted expert; define expert(task, rng).")

    def guesser(self, task: Task, rng: random.Random) -> list[Message]:
        """A demonstration that answers without using a tool. Needed only for ``sft.guess_fraction`` above 0."""
        raise NotImplementedError(f"{type(self).__name__} has no scripted guesser; define guesser(task, rng).")

    def make_tools(self) -> Sequence[Tool]:
        """The tools of one episode (``self.task`` is set); the default makes those of ``tools``."""
        return [make_tool(spec) for spec in self.tools]

    async def run_calls(self, calls: tuple[ToolCall, ...]) -> tuple[ToolResult, ...]:
        """Run the calls of one turn; a replay answers from its record here."""
        return await dispatch_all(self._tools, calls)

    def extract_answer(self, content: str) -> str:
        """The answer in a final message: the last ``<answer>`` block, else the whole text, stripped."""
        for part in reversed(content.split("</answer>")[:-1]):
            _, opened, answer = part.partition("<answer>")
            if opened:
                return answer.strip()
        return content.strip()

    # -- gymnasium's interface, awaited --------------------------------------------------------------------------

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """Start an episode on ``options["task"]``, or on a training task drawn with ``seed``."""
        if self._before is None:
            self._before = dict(vars(self))
        await self.close()
        chosen = (options or {}).get("task") or self._draw(seed)
        self.task, self._turns, self._calls, self._done, self.forked = chosen, 0, 0, False, None
        self._seed, self._options = seed, {**(options or {}), "task": chosen}
        self._tools = {made.name: made for made in self.make_tools()}
        self._results: list[ToolResult] = []
        self._actions: list[Message] = []
        opening = (Message("system", self.system), *chosen.prompt) if self.system else chosen.prompt
        self._messages: list[Message] = list(opening)
        for made in self._tools.values():
            await made.start(seed or 0)
        await self.setup(chosen)
        return opening, {"task_id": chosen.id, "tools": [made.schema for made in self._tools.values()]}

    async def step(self, action: Message) -> StepResult:
        """Apply one assistant message: run its tool calls, or take it as the answer when it has none.

        Raises:
            RewardError: ``reward`` raised or did not give a finite number.
            ToolInfrastructureError: a tool's backend failed.
        """
        self._require_live()
        self._messages.append(action)
        self._actions.append(action)
        self._turns += 1
        if not action.tool_calls:
            return await self._finish(Outcome.ANSWERED, self.extract_answer(action.content), (), ())
        self._calls += len(action.tool_calls)
        if self.max_tool_calls is not None and self._calls > self.max_tool_calls:
            return await self._finish(Outcome.TOOL_LIMIT, None, (), ())
        results = await self.run_calls(action.tool_calls)
        observation = tuple(Message("tool", r.content, tool_call_id=r.call_id) for r in results)
        self._messages.extend(observation)
        self._results.extend(results)
        if self._turns >= self.max_turns:
            malformed = all(r.error == "malformed" for r in results)
            outcome = Outcome.PARSE_ERROR if malformed else Outcome.TURN_LIMIT
            return await self._finish(outcome, None, observation, results)
        return StepResult(observation, 0.0, False, False, {"tool_results": results})

    async def truncate(self, action: Message, outcome: Outcome) -> StepResult:
        """End the episode on an unfinished message; ``reward`` is asked with no answer."""
        self._require_live()
        self._messages.append(action)
        return await self._finish(outcome, None, (), ())

    async def fork(self) -> Self:
        """An independent copy in the same state. The weakest level among the tools decides how it is made.

        Where a tool is of level ``replay``, the copy is a new environment with the same seed and task that takes the
        recorded actions again. So it is where an exact fork is refused while it is made, if every tool that was called
        is declared pure. The copy's ``forked`` says which it was.

        Raises:
            ForkRefused: naming the tool that cannot be forked, or whose repeated call gave something else.
            ToolInfrastructureError: a tool failed while it was forked; names it.
        """
        self._require_live()
        if refused := [made.name for made in self._tools.values() if made.fork_level is ForkLevel.REFUSED]:
            raise ForkRefused(f"{type(self).__name__} cannot fork: tools {', '.join(refused)} refuse to.")
        if _weakest(self._tools.values()) is ForkLevel.REPLAY:
            return await self._replayed()
        try:
            return await self._split()
        except ForkRefused as refusal:
            called = {result.name for result in self._results}
            impure = [made.name for made in self._tools.values() if made.name in called and not made.pure]
            if not impure:
                return await self._replayed()
            raise ForkRefused(
                f"{refusal} Its calls are not repeated instead, since {', '.join(impure)} is not declared pure.",
                refusal.reasons,
            ) from refusal

    async def close(self) -> None:
        """Close the tools of the episode. Safe to call twice."""
        tools, self._tools = getattr(self, "_tools", {}), {}
        self._done = True
        async with contextlib.AsyncExitStack() as closing:  # goes on to the others when one fails to close
            for made in tools.values():
                closing.push_async_callback(made.close)

    @property
    def fork_level(self) -> ForkLevel:
        """The weakest level among the tools."""
        return _weakest(self.make_tools())

    # -- inside ---------------------------------------------------------------------------------------------------

    def _draw(self, seed: int | None) -> Task:
        tasks = list(self.tasks("train"))
        if not tasks:
            raise TaskError(f"{type(self).__name__}.tasks('train') is empty: there is nothing to train on.")
        return random.Random(seed).choice(tasks)

    def _require_live(self) -> None:
        if self._done:
            raise EnvError(f"{type(self).__name__}: no live episode; call reset() first.")

    async def _split(self) -> Self:
        """A copy with a fork of every tool."""
        twin = copy.copy(self)
        twin._tools = {}
        try:
            for name, made in self._tools.items():
                twin._tools[name] = await self._fork_tool(made)
            self._copy_state(twin)
        except BaseException:
            await twin.close()
            raise
        twin.forked = _weakest(self._tools.values())
        return twin

    async def _fork_tool(self, made: Tool) -> Tool:
        try:
            return await made.fork()
        except ForkRefused as refusal:
            named = str(refusal) if repr(made.name) in str(refusal) else f"tool {made.name!r}: {refusal}"
            raise ForkRefused(f"{type(self).__name__} cannot fork: {named}", refusal.reasons) from refusal
        except (UserError, IsolationUnavailable):
            raise
        except Exception as error:
            raise ToolInfrastructureError(
                f"tool {made.name!r} failed while it was forked: {type(error).__name__}: {error}"
            ) from error

    def _copy_state(self, twin: Self) -> None:
        """Give ``twin`` copies of what the episode has made; in them its own tools stand for this one's."""
        known: dict[int, Any] = {id(made): twin._tools[name] for name, made in self._tools.items()}
        known |= {id(value): value for value in (self.task, *self._messages, *self._results)}
        known[id(self)] = twin
        for name, value in vars(self).items():
            kept = name in _OWN or (name in (self._before or {}) and (self._before or {})[name] is value)
            if not kept:
                try:
                    setattr(twin, name, copy.deepcopy(value, known))
                except Exception as error:  # whatever its type raises
                    raise ForkRefused(
                        f"{type(self).__name__} cannot fork: its {name}, a {type(value).__name__}, cannot be copied "
                        f"({error}). Make it in __init__ if branches may share it, or define fork()."
                    ) from error

    async def _replayed(self) -> Self:
        """A new environment that has taken the recorded actions, and given the same results."""
        from agentrl.sandbox.limit import without_waiting

        twin = object.__new__(type(self))
        vars(twin).update(self._before or {})
        actions, results = list(self._actions), list(self._results)
        opening = self._messages[: len(self._messages) - len(actions) - len(results)]
        try:
            with without_waiting():  # whoever is forked holds what this would wait for
                await twin.reset(seed=self._seed, options=dict(self._options))
                if twin._messages != opening:
                    raise ForkRefused(f"{type(self).__name__} cannot be replayed: it opens with other messages.")
                for turn, action in enumerate(actions, 1):
                    done = len(twin._results)
                    await twin.step(action)
                    if twin._done:
                        raise ForkRefused(f"{type(self).__name__} cannot be replayed: it was over after turn {turn}.")
                    for call, before, now in zip(action.tool_calls, results[done:], twin._results[done:], strict=False):
                        self._compare(turn, call, before, now)
        except BaseException:
            await twin.close()
            raise
        twin.forked = ForkLevel.REPLAY
        return twin

    def _compare(self, turn: int, call: ToolCall, before: ToolResult, now: ToolResult) -> None:
        if (before.content, before.error) != (now.content, now.error):
            raise ForkRefused(
                f"{type(self).__name__} cannot be replayed: tool {call.name!r}, called again in turn {turn} with "
                f"{str(call.arguments)[:_SHOWN]}, gave {_first_difference(now, before)}."
            )

    async def _finish(
        self, outcome: Outcome, answer: str | None, observation: tuple[Message, ...], results: tuple[ToolResult, ...]
    ) -> StepResult:
        assert self.task is not None
        self._done = True
        episode = Episode(tuple(self._messages), answer, outcome, tuple(self._results))
        reward = await self._score(self.task, episode)
        info = {"outcome": outcome, "episode": episode, "tool_results": results}
        answered = outcome is Outcome.ANSWERED
        return StepResult(observation, reward, answered, not answered, info)

    async def _score(self, task: Task, episode: Episode) -> float:
        try:
            scoring = self.reward(task, episode)
            if not inspect.isawaitable(scoring):
                raise RewardError(f"{type(self).__name__}.reward is a plain function: make it `async def reward`.")
            reward = await scoring
        except (EnvError, UserError, IsolationUnavailable):
            raise
        except Exception as error:
            raise RewardError(
                f"{type(self).__name__}.reward raised {type(error).__name__} on task {task.id}"
            ) from error
        if isinstance(reward, bool | int | float) and math.isfinite(reward):
            return float(reward)
        raise RewardError(
            f"{type(self).__name__}.reward gave {reward!r} on task {task.id}: expected a finite float. "
            "Return a number on every road through reward()."
        )


def _weakest(tools: Iterable[Tool]) -> ForkLevel:
    return max((made.fork_level for made in tools), key=_FORK_ORDER.index, default=ForkLevel.COPY)


def _first_difference(now: ToolResult, before: ToolResult) -> str:
    if now.error != before.error:
        return f"{now.error or 'no error'} instead of {before.error or 'none'}: {now.content[:_SHOWN]!r}"
    pairs = enumerate(zip(now.content, before.content, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(len(now.content), len(before.content)))
    at = max(same - _SHOWN // 4, 0)
    where = f" from character {at}" if at else ""
    return f"{now.content[at : at + _SHOWN]!r} instead of {before.content[at : at + _SHOWN]!r}{where}"


def make_tool(spec: str | Callable[..., Any] | Tool, **options: Any) -> Tool:
    """A ``Tool`` from a registry name, a function or a ``Tool``.

    Raises:
        UnknownName: no such tool.
        ToolSchemaError: a function that cannot be described.
    """
    found: Any = registry.load("tools", spec) if isinstance(spec, str) else spec
    if isinstance(found, Tool):
        return found
    if isinstance(found, type) and issubclass(found, Tool):
        return found(**options)
    return FunctionTool(found)


def require_answer(task: Task) -> str:
    """The task's reference answer.

    Raises:
        TaskError: there is none, though the reward needs one.
    """
    if task.answer is None:
        raise TaskError(f"task {task.id} has no answer, but this environment's reward compares with one.")
    return task.answer
