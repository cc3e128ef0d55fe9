"""The conformance kit behind ``agentrl check``: what an environment must keep to, tried out on a few of its tasks.

Scripted episodes (the expert's and every way of doing it wrong) are played through the public interface, as the rollout
engine does; each check then reports one line.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from agentrl._scripted import EXPERT, WRONG, Player, Run, Script, scripts
from agentrl.env import Env
from agentrl.errors import ForkRefused
from agentrl.types import Episode, ForkLevel, Message, Outcome, StepResult, Task

TASKS_READ = 2000
"""Tasks of a split that are compared; a longer split is read this far."""


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


@dataclass(frozen=True, slots=True)
class Trial:
    """What the checks look at: who plays, and the scripts as they were played."""

    player: Player
    played: tuple[tuple[Script, Run], ...]


class Broken(Exception):
    """A check failed; the message says what was expected and what came."""


async def check_env(make: Callable[[], Env], *, tasks: int = 3, seed: int = 0, deadline: float = 30.0) -> list[Check]:
    """Try an environment against its contract.

    Args:
        make: gives a new environment each time it is called; a class will do.
        tasks: how many training tasks to play.
        seed: of the episodes.
        deadline: seconds that one ``reset``, ``step`` or ``fork`` may take.

    Returns:
        One record a check, in a fixed order. The first one that fails so that nothing can be played is the last.
    """
    player = Player(make, seed, deadline)
    first: list[Task] = []
    played: list[tuple[Script, Run]] = []

    async def read() -> str:
        return _check_tasks(make, first, tasks)

    async def play() -> str:
        for task in first:
            for script in scripts(make(), task, seed):
                played.append((script, await player.play(script)))
        return f"{len(played)} episodes, {sum(len(run.steps) for _, run in played)} turns"

    results = [await _tried("tasks", read)]
    if first:
        results.append(await _tried("play", play))
    if not (first and results[-1].ok):
        return results
    trial = Trial(player, tuple(played))
    return results + [await _tried(name, check, trial) for name, check in CHECKS.items()]


async def _tried(name: str, check: Callable[..., Awaitable[str]], *arguments: Any) -> Check:
    try:
        return Check(name, True, await check(*arguments))
    except Broken as problem:
        return Check(name, False, str(problem))
    except Exception as error:  # whatever the environment raised is the finding
        return Check(name, False, f"raised {type(error).__name__}: {error}")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise Broken(problem)


def _check_tasks(make: Callable[[], Env], first: list[Task], count: int) -> str:
    """Both splits: not empty, in a fixed order, with ids of their own, and disjoint. Fills ``first``."""
    splits: dict[str, list[Task]] = {}
    for split in ("train", "test"):
        found = splits[split] = list(islice(make().tasks(split), TASKS_READ))
        _require(bool(found), f"tasks({split!r}) is empty; expected at least one task.")
        strange = [task for task in found if not isinstance(task, Task)]
        _require(not strange, f"tasks({split!r}) gave {strange[:1]}; expected Task records.")
        ids = [task.id for task in found]
        again = [task.id for task in islice(make().tasks(split), TASKS_READ)]
        _require(ids == again, f"tasks({split!r}) gave other tasks the second time; expected the same in one order.")
        _require(len(set(ids)) == len(ids), f"tasks({split!r}) repeats the id {_repeated(ids)!r}; expected unique ids.")
        for task in found:
            _check_prompt(task.prompt, f"task {task.id}")
    first.extend(splits["train"][:count])
    ids_shared = {task.id for task in splits["train"]} & {task.id for task in splits["test"]}
    _require(not ids_shared, f"train and test share {len(ids_shared)} ids, such as {min(ids_shared, default='')!r}.")
    shared = {_content(task) for task in splits["train"]} & {_content(task) for task in splits["test"]}
    _require(not shared, f"train and test share {len(shared)} tasks, such as {min(shared, default='')[:120]}.")
    return ", ".join(f"{len(found)}{'+' if len(found) == TASKS_READ else ''} {name}" for name, found in splits.items())


async def _check_tools(trial: Trial) -> str:
    """Schemas as chat templates take them."""
    _, run = trial.played[0]
    names = []
    for schema in run.info.get("tools", []):
        function = schema.get("function", {}) if isinstance(schema, dict) else {}
        whole = {"name", "description", "parameters"} <= set(function)
        _require(whole, f"expected {{'function': {{name, description, parameters}}}}, got {schema!r}.")
        properties = function["parameters"].get("properties", {})
        mute = [name for name, value in properties.items() if not value.get("description")]
        _require(not mute, f"tool {function['name']!r}: parameters without a description: {', '.join(mute)}.")
        names.append(function["name"])
    _require(len(set(names)) == len(names), f"two tools are called {_repeated(names)!r}.")
    return ", ".join(names) or "no tools"


async def _check_steps(trial: Trial) -> str:
    """The five-tuple, its types, and the messages in it."""
    for script, run in trial.played:
        _check_prompt(run.opening, f"reset(), {script}")
        known = set(map(id, run.opening))
        for action, step in zip(run.actions, run.steps, strict=True):
            _check_step(action, step, known)
        _require(run.ended, f"{script}: no end after {len(run.steps)} turns.")
    return "gymnasium's five, only new messages, an outcome at the end"


async def _check_determinism(trial: Trial) -> str:
    """The same seeds and actions again, this time all at once: the same observations and rewards."""
    async with asyncio.TaskGroup() as group:
        again = [group.create_task(trial.player.play(script)) for script, _ in trial.played]
    for (script, run), task in zip(trial.played, again, strict=True):
        _require(run.opening == task.result().opening, f"{script}: another opening with the same seed.")
        _same(run, task.result(), f"{script}: the same seed and actions")
    return f"{len(again)} episodes again, at the same time"


async def _check_reward(trial: Trial) -> str:
    """A finite number in the declared range on every road, and more for the expert than for a wrong answer."""
    low, high = getattr(trial.player.make(), "reward_range", (-math.inf, math.inf))
    earned: dict[str, list[float]] = {}
    for script, run in trial.played:
        rewards = [step.reward for step in run.steps]
        total = sum(rewards)
        _require(math.isfinite(total), f"{script}: rewards {rewards}; expected finite numbers.")
        _require(low <= total <= high, f"{script}: reward {total:g}; expected {low:g} to {high:g} (reward_range).")
        earned.setdefault(script.name, []).append(total)
    means = {name: sum(values) / len(values) for name, values in earned.items()}
    if EXPERT in means:
        best, worst = means[EXPERT], means[WRONG]
        _require(best > worst, f"the expert earns {best:g}, a wrong answer {worst:g}; expected more for the expert.")
    return ", ".join(f"{name} {mean:g}" for name, mean in means.items())


async def _check_masking(trial: Trial) -> str:
    """As tokens, what the policy wrote (to train on) and what the environment wrote stay apart."""
    from agentrl._stand_in import stand_in_tokenizer
    from agentrl.renderer import Renderer

    renderer = Renderer(stand_in_tokenizer())
    written, others = 0, 0
    for script, run in trial.played:
        others += len(renderer.prompt(run.opening, run.info.get("tools", [])))
        for action, step in zip(run.actions, run.steps, strict=True):
            written += len(renderer.assistant(action))
            if not step.observation:
                continue
            ids = renderer.continuation(step.observation)
            text = renderer.tokenizer.decode(ids)
            lost = [message.content for message in step.observation if message.content not in text]
            _require(not lost, f"{script}: expected {lost[:1]} among the tokens after the turn, got {text!r}.")
            others += len(ids)
    return f"{written} tokens of the policy, {others} others"


async def _check_deadline(trial: Trial) -> str:
    """How long the slowest call took; one that never ends was stopped while playing, one that blocks is found here."""
    slowest, script = max((run.slowest, str(script)) for script, run in trial.played)
    allowed = trial.player.deadline
    _require(slowest <= allowed, f"{script}: a step blocked for {slowest:.1f} s; expected at most {allowed:g} s.")
    return f"slowest step {slowest * 1e3:.1f} ms ({script}); {allowed:g} s allowed"


async def _check_fork(trial: Trial) -> str:
    """Forks, and forks of forks, go on as the episode played alone, whatever the others do; a refusal is declared."""
    level = getattr(trial.player.make(), "fork_level", None)
    _require(isinstance(level, ForkLevel), f"fork_level is {level!r}; expected one of {', '.join(ForkLevel)}.")
    if level is ForkLevel.REFUSED:
        try:
            await trial.player.begin_and_fork(trial.played[0][0])
        except ForkRefused:
            return "refused, as declared"
        raise Broken("fork_level is 'refused', but fork() gave an environment; expected ForkRefused.")
    forked = 0
    for script, run in trial.played:
        turns, of_task = len(run.steps), [s for s, _ in trial.played if s.task is script.task]
        for cut in sorted({0, 1, turns - 1} - {turns} - ({0} if script is not of_task[0] else set())):
            stray = of_task[0] if cut else of_task[-1]
            begun = tuple(script.actions[min(i, len(script.actions) - 1)] for i in range(cut))
            other = Script(f"{script.name}, from turn {cut + 1} {stray.name},", script.task, begun + stray.actions)
            strayed = await trial.player.play(other)
            for followed, twin in await trial.player.play_forked(script, other, cut):
                _same(run if followed is script else strayed, twin, f"{followed}: a fork after turn {cut}")
                forked += 1
            forked -= 1  # the parent
    return f"{level}: {forked} forks equal replay"


CHECKS: dict[str, Callable[[Trial], Awaitable[str]]] = {
    "tools": _check_tools,
    "steps": _check_steps,
    "reward": _check_reward,
    "determinism": _check_determinism,
    "masking": _check_masking,
    "deadline": _check_deadline,
    "fork": _check_fork,
}


def _check_step(action: Message, step: StepResult, known: set[int]) -> None:
    kinds = (tuple, float, bool, bool, dict)
    for name, value, kind in zip(StepResult._fields, step, kinds, strict=True):
        _require(isinstance(value, kind), f"step(): {name} is {value!r}; expected a {kind.__name__}.")
    _require(not (step.terminated and step.truncated), "step(): both terminated and truncated; expected one of them.")
    for message in step.observation:
        fine = isinstance(message, Message) and message.role in ("tool", "user")
        _require(fine, f"step(): observed {message!r}; expected a message of a tool or a user, not of the assistant.")
        _require(id(message) not in known, f"step(): {message.content[:60]!r} came again; expected only new messages.")
        known.add(id(message))
    if step.terminated or step.truncated:
        outcome, episode = step.info.get("outcome"), step.info.get("episode")
        _require(isinstance(outcome, Outcome), f"step(): at the end info['outcome'] is {outcome!r}, not an Outcome.")
        _require(isinstance(episode, Episode), f"step(): at the end info['episode'] is {episode!r}, not an Episode.")
        return
    _require(bool(step.observation), "step(): no observation and no end; expected new messages for the policy.")
    answered = [message.tool_call_id for message in step.observation if message.role == "tool"]
    asked = [call.id for call in action.tool_calls]
    _require(not answered or answered == asked, f"step(): tool messages answer {answered}; expected {asked}, in order.")


def _check_prompt(messages: Sequence[Message], where: str) -> None:
    _require(bool(messages), f"{where}: no messages; expected a prompt.")
    _require(all(isinstance(m, Message) for m in messages), f"{where}: expected Message records, got {messages!r}.")
    _require(messages[-1].role in ("user", "tool"), f"{where}: ends with {messages[-1].role}; expected a user message.")
    late = [message.content for message in messages[1:] if message.role == "system"]
    _require(not late, f"{where}: a system message after the first place: {late[:1]}; expected it first.")


def _same(one: Run, two: Run, what: str) -> None:
    for turn in range(min(len(one.steps), len(two.steps))):
        a, b = one.turn(turn), two.turn(turn)
        _require(a == b, f"{what} gave {b!r} in turn {turn + 1}; expected {a!r}.")
    _require(len(one.steps) == len(two.steps), f"{what} took {len(two.steps)} turns; expected {len(one.steps)}.")


def _content(task: Task) -> str:
    return repr(([(m.role, m.content) for m in task.prompt], task.answer, sorted(task.metadata.items(), key=str)))


def _repeated(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), "")  # type: ignore[func-returns-value]
