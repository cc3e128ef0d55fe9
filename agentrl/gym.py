"""Bridges to gymnasium: ``SyncEnv`` makes ours a ``gymnasium.Env``, ``FromGymnasium`` makes theirs one of ours."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import gymnasium

from agentrl.data import is_test
from agentrl.env import Env
from agentrl.errors import EnvError
from agentrl.sandbox.shared import close_shared_sandboxes
from agentrl.tool_format import get_format
from agentrl.types import Episode, ForkLevel, Message, Outcome, StepResult, Task, ToolCall

SAMPLE_CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"


class AnyText(gymnasium.spaces.Text):
    """Strings of at most ``max_length`` of any characters; samples are printable ASCII."""

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length, min_length=0, charset=SAMPLE_CHARACTERS)

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is a string that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length


class SyncEnv(gymnasium.Env[str, str]):
    """An environment of ours as a ``gymnasium.Env`` of texts, for one episode at a time.

    An observation is the contents of the new messages, joined by newlines; an action is the text of an assistant turn,
    with tool calls in the Hermes form. It keeps an event loop of its own, so it cannot be used inside a running one.

    Args:
        env: an environment that is not used elsewhere.
        max_length: characters of an action or an observation; longer observations are cut.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(self, env: Env, *, max_length: int = 65_536) -> None:
        self.env = env
        self.max_length = max_length
        self.observation_space = AnyText(max_length)
        self.action_space = AnyText(max_length)
        self._format = get_format("hermes")
        self._runner = asyncio.Runner()
        self._tools: list[dict[str, Any]] = []
        self._turn = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode; without ``options["task"]`` the task is drawn with ``seed``.

        Without a seed the next one comes from the generator that the last one started, as gymnasium asks.
        """
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31))
        opening, info = self._runner.run(self.env.reset(seed=drawn, options=options))
        self._tools, self._turn = info.get("tools", []), 0
        return self._text(opening), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one assistant turn."""
        content, calls = self._format.parse(action, self._tools)
        numbered = tuple(ToolCall(f"call_{self._turn}_{i}", c.name, c.arguments, c.error) for i, c in enumerate(calls))
        self._turn += 1
        result = self._runner.run(self.env.step(Message("assistant", content, numbered)))
        return self._text(result.observation), result.reward, result.terminated, result.truncated, result.info

    def close(self) -> None:
        """Close the environment and the loop. Safe to call twice."""
        if self._runner is not None:
            runner, self._runner = self._runner, None  # type: ignore[assignment]
            runner.run(self._release())
            runner.close()

    async def _release(self) -> None:
        await self.env.close()
        await close_shared_sandboxes()

    def _text(self, messages: Iterable[Message]) -> str:
        return "\n".join(message.content for message in messages)[: self.max_length]


class FromGymnasium:
    """A gymnasium environment played by text: every observation is a user message, every answer an action.

    Subclass it, or pass it through a function, to register it::

        def cart_pole():
            return FromGymnasium("CartPole-v1", parse=int, prompt="Keep the pole up: answer 0 (left) or 1 (right).")

    An answer that ``parse`` refuses (``ValueError``) costs a turn and tells the policy why.

    Args:
        make: an id for ``gymnasium.make``, or a function that gives a new environment.
        parse: from the text of an answer to an action; raises ``ValueError`` where there is none in it.
        show: from an observation to text.
        prompt: put before the first observation.
        max_turns: answers an episode may have.
        count: tasks of the training split, each a seed of ``reset``; the test split has a quarter of it.
    """

    fork_level = ForkLevel.REPLAY

    def __init__(
        self,
        make: str | Callable[[], gymnasium.Env[Any, Any]],
        *,
        parse: Callable[[str], Any],
        show: Callable[[Any], str] = str,
        prompt: str = "",
        max_turns: int = 100,
        count: int = 1000,
    ) -> None:
        self._make, self._parse, self._show = make, parse, show
        self.prompt, self.max_turns, self.count = prompt, max_turns, count
        self._live: gymnasium.Env[Any, Any] | None = None
        self._task: Task | None = None
        self._actions: list[Message] = []
        self._messages: list[Message] = []

    def tasks(self, split: str) -> Iterable[Task]:
        """Seeds: even ones to train on, odd ones to test."""
        test = is_test(split)
        for number in range(self.count // 4 if test else self.count):
            seed = 2 * number + test
            yield Task(self.prompt or "Play.", id=f"seed-{seed}", metadata={"seed": seed})

    async def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """Start an episode with the task's seed, so that all episodes of a group begin alike."""
        await self.close()
        task = (options or {}).get("task") or Task(self.prompt or "Play.", metadata={"seed": seed or 0})
        self._live = gymnasium.make(self._make) if isinstance(self._make, str) else self._make()
        observation, _ = self._live.reset(seed=int(task.metadata["seed"]))
        opening = (*task.prompt, Message("user", self._show(observation)))
        self._task, self._actions, self._messages = task, [], list(opening)
        return opening, {"task_id": task.id, "tools": []}

    async def step(self, action: Message) -> StepResult:
        """Parse the answer and apply it. The environment's own code runs in a thread, so that it stalls nobody.

        Raises:
            EnvError: no live episode, or the gymnasium environment raised.
        """
        live, task = self._require_live()
        self._actions.append(action)
        try:
            chosen = self._parse(action.content)
        except ValueError as error:
            return self._observed(action, f"Not an action: {error}", 0.0, False, False)
        try:
            observation, reward, terminated, truncated, _ = await asyncio.to_thread(live.step, chosen)
        except Exception as error:
            raise EnvError(f"gymnasium: step({chosen!r}) raised {type(error).__name__} in task {task.id}") from error
        return self._observed(action, self._show(observation), float(reward), bool(terminated), bool(truncated))

    async def truncate(self, action: Message, outcome: Outcome) -> StepResult:
        """End the episode on an unfinished answer; what was earned stands."""
        self._require_live()
        self._messages.append(action)
        return self._ended((), 0.0, False, outcome, None)

    async def fork(self) -> Self:
        """A new environment with the same seed, in which the same answers are given again."""
        _, task = self._require_live()
        twin = copy.copy(self)
        twin._live = None
        try:
            await twin.reset(options={"task": task})
            for action in self._actions:
                await twin.step(action)
        except BaseException:
            await twin.close()
            raise
        return twin

    async def close(self) -> None:
        """Close the gymnasium environment. Safe to call twice."""
        live, self._live = self._live, None
        if live is not None:
            live.close()

    def _require_live(self) -> tuple[gymnasium.Env[Any, Any], Task]:
        if self._live is None or self._task is None:
            raise EnvError("gymnasium: no live episode; call reset() first.")
        return self._live, self._task

    def _observed(self, action: Message, text: str, reward: float, terminated: bool, truncated: bool) -> StepResult:
        new = (Message("user", text),)
        self._messages += [action, *new]
        if terminated or truncated or len(self._actions) >= self.max_turns:
            outcome = Outcome.ANSWERED if terminated else Outcome.TURN_LIMIT
            return self._ended(new, reward, terminated, outcome, action.content)
        return StepResult(new, reward, False, False, {"tool_results": ()})

    def _ended(
        self, new: tuple[Message, ...], reward: float, terminated: bool, outcome: Outcome, answer: str | None
    ) -> StepResult:
        episode = Episode(tuple(self._messages), answer, outcome)
        self._task = None
        info = {"outcome": outcome, "episode": episode, "tool_results": ()}
        return StepResult(new, reward, terminated, not terminated, info)
