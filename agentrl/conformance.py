"""The conformance kit behind ``agentrl check``: what an environment must keep to, tried out on a few of its tasks.

Every check plays whole episodes through the public interface, as the rollout engine does, and reports one line.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from agentrl.env import Env
from agentrl.errors import ForkRefused
from agentrl.types import Episode, ForkLevel, Message, Outcome, StepResult, Task, ToolCall

MOST_TURNS = 1000
TASKS_READ = 2000
"""Tasks of a split that are compared; an endless split is read this far."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: what, in a word.
        ok: whether the environment keeps to it.
        detail: what was seen; where ``ok`` is false, what was expected and what came.
    """

    name: str
    ok: bool
    detail: str


class Broken(Exception):
    """A check failed; the message says what was expected and what came."""


@dataclass(frozen=True, slots=True)
class Kit:
    """What every check needs.

    Attributes:
        make: a new environment.
        tasks: the tasks to play.
        seed: of every episode.
        deadline: seconds that one ``reset`` or ``step`` may take.
    """

    make: Callable[[], Env]
    tasks: tuple[Task, ...]
    seed: int
    deadline: float


@dataclass(slots=True)
class Run:
    """An episode as it was played."""

    opening: tuple[Message, ...]
    info: dict[str, Any]
    steps: list[StepResult] = field(default_factory=list)
    actions: list[Message] = field(default_factory=list)

    def seen(self) -> list[Any]:
        """What must be the same when it is played again."""
        texts = [[(m.role, m.content, m.tool_call_id) for m in step.observation] for step in self.steps]
        ends = [(step.reward, step.terminated, step.truncated, step.info.get("outcome")) for step in self.steps]
        return [*zip(texts, ends, strict=True)]


async def check_env(
    make: Callable[[], Env], *, tasks: int = 3, seed: int = 0, deadline: float = 30.0, source: Task | None = None
) -> list[Check]:
    """Try an environment against its contract.

    Args:
        make: a new environment each time it is called; a class will do.
        tasks: how many training tasks to play.
        seed: of the episodes.
        deadline: seconds that one ``reset`` or ``step`` may take.
        source: play this task instead of the environment's own.

    Returns:
        One record a check, in a fixed order. Later checks are left out where there are no tasks to play.
    """
    first: list[Task] = []

    async def read_tasks() -> str:
        first.extend([source] if source else [])
        return _check_tasks(make, first, tasks)

    results = [await _tried("tasks", read_tasks)]
    if not first:
        return results
    kit = Kit(make, tuple(first), seed, deadline)
    for name, check in CHECKS.items():
        results.append(await _tried(name, lambda check=check: check(kit)))  # type: ignore[misc]
    return results


async def _tried(name: str, check: Callable[[], Awaitable[str]]) -> Check:
    try:
        return Check(name, True, await check())
    except Broken as problem:
        return Check(name, False, str(problem))
    except Exception as error:  # whatever the environment raised is the finding
        return Check(name, False, f"raised {type(error).__name__}: {error}")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise Broken(problem)


# -- the checks --------------------------------------------------------------------------------------------------------


def _check_tasks(make: Callable[[], Env], first: list[Task], count: int) -> str:
    """Both splits: not empty, in a fixed order, with ids of their own, and disjoint."""
    splits: dict[str, list[Task]] = {}
    for split in ("train", "test"):
        found = list(islice(make().tasks(split), TASKS_READ))
        _require(bool(found), f"tasks({split!r}) is empty; expected at least one task.")
        strange = [task for task in found if not isinstance(task, Task)]
        _require(not strange, f"tasks({split!r}) gave {strange[:1]}; expected Task records.")
        again = [task.id for task in islice(make().tasks(split), TASKS_READ)]
        _require([task.id for task in found] == again, f"tasks({split!r}) came in another order the second time.")
        _require(len(set(again)) == len(again), f"tasks({split!r}) repeats the id {_repeated(again)!r}.")
        splits[split] = found
    if not first:
        first.extend(splits["train"][:count])
    shared = {task.id for task in splits["train"]} & {task.id for task in splits["test"]}
    _require(not shared, f"train and test share {len(shared)} ids, such as {min(shared, default='')!r}.")
    same = {_content(task) for task in splits["train"]} & {_content(task) for task in splits["test"]}
    _require(not same, f"train and test share {len(same)} tasks, such as {min(same, default='')[:120]}.")
    for task in (*splits["train"], *splits["test"]):
        _check_prompt(task.prompt, f"task {task.id}")
    return ", ".join(f"{len(found)}{'+' if len(found) == TASKS_READ else ''} {name}" for name, found in splits.items())


async def _check_tools(kit: Kit) -> str:
    """Schemas as chat templates take them."""
    run = await _play(kit, kit.tasks[0], [])
    schemas = run.info.get("tools", [])
    for schema in schemas:
        function = schema.get("function", {}) if isinstance(schema, dict) else {}
        whole = {"name", "description", "parameters"} <= set(function)
        _require(whole, f"expected {{'function': {{name, description, parameters}}}}, got {schema!r}.")
        properties = function["parameters"].get("properties", {})
        mute = [name for name, value in properties.items() if not value.get("description")]
        _require(not mute, f"tool {function['name']!r}: parameters without a description: {', '.join(mute)}.")
    listed = [schema["function"]["name"] for schema in schemas]
    _require(len(set(listed)) == len(listed), f"two tools are called {_repeated(listed)!r}.")
    return ", ".join(listed) or "no tools"


async def _check_steps(kit: Kit) -> str:
    """The five-tuple, its types, and the messages in it."""
    turns = 0
    for task in kit.tasks:
        for actions in _scripts(kit, task).values():
            run = await _play(kit, task, actions)
            _check_prompt(run.opening, "reset()")
            known = set(map(id, run.opening))
            for action, step in zip(run.actions, run.steps, strict=True):
                _check_step(action, step, known)
                turns += 1
    return f"{turns} turns"


async def _check_determinism(kit: Kit) -> str:
    """The same seed and the same actions give the same observations and rewards."""
    episodes = 0
    for task in kit.tasks:
        for name, actions in _scripts(kit, task).items():
            one, two = [await _play(kit, task, actions) for _ in range(2)]
            _require(one.opening == two.opening, f"{name}: task {task.id} opened in two ways with seed {kit.seed}.")
            _same(one, two, f"{name}: the same seed and actions")
            episodes += 1
    return f"{episodes} episodes played twice"


async def _check_reward(kit: Kit) -> str:
    """A finite number in the declared range on every road, and more for the expert than for a wrong answer."""
    low, high = getattr(kit.make(), "reward_range", (-math.inf, math.inf))
    earned: dict[str, list[float]] = {}
    for task in kit.tasks:
        for name, actions in _scripts(kit, task).items():
            run = await _play(kit, task, actions)
            last = run.steps[-1]
            _require(last.terminated or last.truncated, f"{name}: no end after {len(run.steps)} turns.")
            rewards = [step.reward for step in run.steps]
            _require(all(map(math.isfinite, rewards)), f"{name}: rewards {rewards} on task {task.id}, not all finite.")
            total = sum(rewards)
            _require(low <= total <= high, f"{name}: reward {total} on task {task.id}, outside {low} to {high}.")
            earned.setdefault(name, []).append(total)
    means = {name: sum(values) / len(values) for name, values in earned.items()}
    if "expert" in means:
        best, worst = means["expert"], means["wrong answer"]
        _require(best > worst, f"the expert earns {best:g}, a wrong answer {worst:g}; expected more for the expert.")
    return ", ".join(f"{name} {mean:g}" for name, mean in means.items())


async def _check_masking(kit: Kit) -> str:
    """Rendered as tokens, what the policy wrote and what the environment wrote stay apart."""
    from agentrl._stand_in import stand_in_tokenizer
    from agentrl.renderer import Renderer

    renderer = Renderer(stand_in_tokenizer())
    written, others = 0, 0
    for task in kit.tasks:
        run = await _play(kit, task, next(iter(_scripts(kit, task).values())))
        others += len(renderer.prompt(run.opening, run.info.get("tools", [])))
        for action, step in zip(run.actions, run.steps, strict=True):
            written += len(renderer.assistant(action))
            if step.terminated or step.truncated:
                break
            ids = renderer.continuation(step.observation)
            text = renderer.tokenizer.decode(ids)
            lost = [m.content for m in step.observation if m.content.strip() not in text]
            _require(not lost, f"expected {lost[:1]} among the tokens that follow the turn, got {text!r}.")
            repeated = [m.content for m in run.opening if m.content and m.content in text]
            _require(not repeated, f"the observation repeats the prompt {repeated[:1]}; expected only new messages.")
            others += len(ids)
    return f"{written} policy tokens to train on, {others} others"


async def _check_deadline(kit: Kit) -> str:
    """The slowest reset or step; ``_play`` refuses one that is slower than the deadline."""
    loop = asyncio.get_running_loop()
    slowest = 0.0
    for task in kit.tasks:
        for actions in _scripts(kit, task).values():
            began = loop.time()
            run = await _play(kit, task, actions)
            slowest = max(slowest, (loop.time() - began) / (len(run.steps) + 1))
    return f"{slowest * 1e3:.1f} ms a step in the slowest episode; {kit.deadline:g} s allowed"


async def _check_fork(kit: Kit) -> str:
    """Two forks of one state go on as the episode would have gone on itself; a refusal is declared."""
    declared = getattr(kit.make(), "fork_level", None)
    forked = 0
    for task in kit.tasks:
        for name, actions in _scripts(kit, task).items():
            if declared is ForkLevel.REFUSED:
                await _check_refusal(kit, task)
                return "refused, as declared"
            whole = await _play(kit, task, actions)
            for cut in range(1, len(whole.steps)):
                for twin in await _play_forked(kit, task, actions, cut):
                    _same(whole, twin, f"{name}: a fork after turn {cut}")
                    forked += 1
    return f"{declared or 'undeclared'}: {forked} forks equal replay"


CHECKS: dict[str, Callable[[Kit], Awaitable[str]]] = {
    "tools": _check_tools,
    "steps": _check_steps,
    "determinism": _check_determinism,
    "reward": _check_reward,
    "masking": _check_masking,
    "deadline": _check_deadline,
    "fork": _check_fork,
}


# -- what they are made of ---------------------------------------------------------------------------------------------


def _scripts(kit: Kit, task: Task) -> dict[str, list[Message]]:
    """Episodes to play: the expert's, where there is one, and every way of doing it wrong."""
    env = kit.make()
    scripts: dict[str, list[Message]] = {}
    if hasattr(env, "expert"):
        try:
            scripts["expert"] = list(env.expert(task, random.Random(kit.seed)))
        except NotImplementedError:
            pass
    malformed = ToolCall("call_{}_0", "", error="The tool call is not valid JSON.")
    unknown = ToolCall("call_{}_0", "no_such_tool", {"x": 1})
    answer = Message("assistant", "no such answer")
    scripts["wrong answer"] = [answer]
    scripts["empty answer"] = [Message("assistant", "")]
    scripts["malformed call"] = [_calling(malformed, 0), answer]
    scripts["unknown tool"] = [_calling(unknown, 0), answer]
    scripts["turn limit"] = [_calling(unknown, turn) for turn in range(min(getattr(env, "max_turns", 100), MOST_TURNS))]
    return scripts


def _calling(call: ToolCall, turn: int) -> Message:
    return Message("assistant", "", (ToolCall(call.id.format(turn), call.name, call.arguments, call.error),))


async def _play(kit: Kit, task: Task, actions: Sequence[Message]) -> Run:
    """Play ``actions``, repeating the last one (if there is any) until the episode ends."""
    env = kit.make()
    try:
        opening, info = await _timed(kit, "reset", env.reset(seed=kit.seed, options={"task": task}))
        run = Run(tuple(opening), info)
        await _go_on(kit, env, run, actions)
        return run
    finally:
        await env.close()


async def _go_on(kit: Kit, env: Env, run: Run, actions: Sequence[Message]) -> None:
    most = MOST_TURNS if actions else 0
    while len(run.steps) < most and not (run.steps and (run.steps[-1].terminated or run.steps[-1].truncated)):
        action = actions[min(len(run.steps), len(actions) - 1)]
        step = await _timed(kit, "step", env.step(action))
        _require(isinstance(step, tuple) and len(step) == 5, f"step() gave {step!r}; expected gymnasium's five.")
        run.steps.append(StepResult(*step))
        run.actions.append(action)


async def _play_forked(kit: Kit, task: Task, actions: Sequence[Message], cut: int) -> list[Run]:
    """Play ``cut`` turns, fork twice, and play both forks to the end, the second after the first."""
    parent = kit.make()
    twins: list[Env] = []
    try:
        opening, info = await _timed(kit, "reset", parent.reset(seed=kit.seed, options={"task": task}))
        prefix = Run(tuple(opening), info)
        for action in actions[:cut]:
            prefix.steps.append(await _timed(kit, "step", parent.step(action)))
            prefix.actions.append(action)
        runs = []
        for _ in range(2):
            twins.append(await _timed(kit, "fork", parent.fork()))
            runs.append(Run(prefix.opening, info, list(prefix.steps), list(prefix.actions)))
        for twin, run in zip(twins, runs, strict=True):
            await _go_on(kit, twin, run, actions)
        return runs
    finally:
        for env in (*twins, parent):
            await env.close()


async def _check_refusal(kit: Kit, task: Task) -> None:
    env = kit.make()
    try:
        await _timed(kit, "reset", env.reset(seed=kit.seed, options={"task": task}))
        twin = await env.fork()
    except ForkRefused:
        return
    finally:
        await env.close()
    await twin.close()
    raise Broken("fork_level is 'refused', but fork() gave an environment; expected ForkRefused.")


async def _timed(kit: Kit, what: str, work: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(kit.deadline) as timer:
            return await work
    except TimeoutError:
        if not timer.expired():
            raise
        raise Broken(f"{what}() did not finish within {kit.deadline:g} s.") from None


def _check_step(action: Message, step: StepResult, known: set[int]) -> None:
    kinds = (tuple, float, bool, bool, dict)
    for name, value, kind in zip(StepResult._fields, step, kinds, strict=True):
        _require(isinstance(value, kind), f"step(): {name} is {value!r}; expected a {kind.__name__}.")
    _require(not (step.terminated and step.truncated), "step(): both terminated and truncated; expected one of them.")
    for message in step.observation:
        fine = isinstance(message, Message) and message.role in ("tool", "user", "system")
        _require(fine, f"step(): observed {message!r}; expected a message of a tool or a user, not of the assistant.")
        _require(id(message) not in known, f"step(): {message.content[:60]!r} came again; expected only new messages.")
        known.add(id(message))
    if step.terminated or step.truncated:
        outcome, episode = step.info.get("outcome"), step.info.get("episode")
        _require(
            isinstance(outcome, Outcome), f"step(): info['outcome'] is {outcome!r} at the end; expected an Outcome."
        )
        _require(
            isinstance(episode, Episode), f"step(): info['episode'] is {episode!r} at the end; expected an Episode."
        )
        return
    answered = [message.tool_call_id for message in step.observation if message.role == "tool"]
    asked = [call.id for call in action.tool_calls]
    if answered:
        _require(answered == asked, f"step(): tool messages answer calls {answered}; expected one for each of {asked}.")
    _require(bool(step.observation), "step(): no observation and no end; expected new messages for the policy.")


def _check_prompt(messages: Sequence[Message], where: str) -> None:
    _require(bool(messages), f"{where}: no messages; expected a prompt.")
    _require(all(isinstance(m, Message) for m in messages), f"{where}: expected Message records, got {messages!r}.")
    _require(messages[-1].role in ("user", "tool"), f"{where}: ends with {messages[-1].role}; expected a user message.")
    system = [place for place, message in enumerate(messages) if message.role == "system" and place]
    _require(not system, f"{where}: a system message in place {system[:1]}; expected it first.")


def _same(one: Run, two: Run, what: str) -> None:
    for turn, (a, b) in enumerate(zip(one.seen(), two.seen(), strict=False)):
        _require(a == b, f"{what} gave {b!r} in turn {turn + 1}; expected {a!r}.")
    _require(len(one.steps) == len(two.steps), f"{what} took {len(two.steps)} turns; expected {len(one.steps)}.")


def _content(task: Task) -> str:
    return repr(([(m.role, m.content) for m in task.prompt], task.answer, sorted(task.metadata.items(), key=str)))


def _repeated(names: Sequence[str]) -> str:
    return next(name for place, name in enumerate(names) if name in names[:place])
