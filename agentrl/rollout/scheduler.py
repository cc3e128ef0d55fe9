"""Plays many trajectories at once, within limits, and gathers them into trees in a fixed order.

Every trajectory is its own coroutine; the sampler batches whatever is in flight, so none waits for the slowest of a
wave. Results come back in the order of the tasks, whatever order they finished in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from pydantic import ValidationError

from agentrl.config import RolloutConfig
from agentrl.env import Env
from agentrl.errors import ConfigError, TooManyFailures, UnknownName
from agentrl.rollout.budget import Budget, Caps
from agentrl.rollout.episode import Progress as EpisodeProgress
from agentrl.rollout.gate import Gate
from agentrl.rollout.policies import Group, Policy, make_policy
from agentrl.rollout.record import Name, Record
from agentrl.rollout.tree import Ground, Tree
from agentrl.rollout.writer import Writer
from agentrl.types import ForkLevel, Leaf, RolloutTree, SamplingParams, Task

Progress = Callable[[Leaf], None]
_LOG = logging.getLogger(__name__)


class Scheduler:
    """Grows rollout trees.

    Args:
        make_env: a new environment per root.
        make_writer: a new writer per root, from its seed.
        limits: the branching policy, budgets, how much at once, deadlines, retries, tolerated failures.
        params: what is sampled with; recorded in the trees.

    Raises:
        UnknownName: no such policy, or no such option of it.
        ConfigError: options or budgets that cannot be met.
    """

    def __init__(
        self,
        make_env: Callable[[], Env],
        make_writer: Callable[[int], Writer],
        limits: RolloutConfig,
        params: SamplingParams,
    ) -> None:
        self._make_env, self._make_writer = make_env, make_writer
        self._limits, self._params = limits, params
        self._live, self._calls = Gate(limits.max_live), Gate(limits.max_calls)
        self._playing: dict[tuple[str, int, Name], EpisodeProgress] = {}
        self.policy, self._task_caps, self._step_caps = read_limits(limits)

    async def play(
        self, tasks: Sequence[Task], *, group: int, seed: int, progress: Progress | None = None
    ) -> list[RolloutTree]:
        """One group of ``group`` trajectories per task, in the order of ``tasks``: what evaluation needs.

        Args:
            tasks: what to play.
            group: trajectories per task.
            seed: every trajectory's seed derives from it, the task's id and the trajectory's number.
            progress: called with each leaf as it ends.

        Raises:
            TooManyFailures: more than ``max_failures`` of the episodes failed for reasons that are not the policy's.
        """
        return await self._grow(tasks, Group(), group, seed, Budget(Caps()), Caps(), progress)

    def step_budget(self) -> Budget:
        """A fresh ``rollout.step_budget``; its clock starts now."""
        return Budget(self._step_caps)

    async def grow(
        self, tasks: Sequence[Task], *, seed: int, budget: Budget | None = None, progress: Progress | None = None
    ) -> list[RolloutTree]:
        """One tree per task by ``rollout.policy``, of ``rollout.group`` leaves, within the budgets; see ``play``.

        Args:
            tasks: what to play.
            seed: what all seeds derive from.
            budget: of the step, where this is not all of it; default: a fresh one.
            progress: called with each leaf as it ends.

        Raises:
            ConfigError: the policy forks, and the environment or the sampler cannot.
            TooManyFailures: as in ``play``.
        """
        self._check_forks()
        budget = budget or self.step_budget()
        return await self._grow(tasks, self.policy, self._limits.group, seed, budget, self._task_caps, progress)

    async def regrow(
        self,
        tree: RolloutTree,
        record: Record,
        *,
        policy: Policy | None = None,
        prepare: Callable[[Env, Name], None] | None = None,
    ) -> RolloutTree:
        """``tree`` again, from its seeds: what hung on time is as ``record`` has it, budgets included.

        Args:
            tree: what was recorded.
            record: of it.
            policy: where it grows by another one than ``rollout.policy``.
            prepare: called with every environment before it is played in or forked, and whose it is.
        """
        again = Tree(
            self._ground(None, prepare),
            tree.task,
            policy or self.policy,
            leaves=self._limits.group,
            budget=Budget(Caps()),
            seed=tree.seed,
            copy=tree.copy,
            record=record,
        )
        async with self._watching():
            grown: RolloutTree = await _unwrapped(again.grow())
        return grown

    async def _grow(
        self,
        tasks: Sequence[Task],
        policy: Policy,
        leaves: int,
        seed: int,
        budget: Budget,
        caps: Caps,
        progress: Progress | None,
    ) -> list[RolloutTree]:
        ground, copies = self._ground(progress), Counter[str]()
        growing: list[asyncio.Task[RolloutTree]] = []

        async def all_of_them() -> None:
            async with asyncio.TaskGroup() as running:
                for task in tasks:
                    copies[task.id] += 1
                    tree = Tree(
                        ground,
                        task,
                        policy,
                        leaves=leaves,
                        budget=Budget(caps, budget),
                        seed=seed,
                        copy=copies[task.id],
                    )
                    growing.append(running.create_task(tree.grow()))

        async with self._watching():
            await _unwrapped(all_of_them())
        trees = [each.result() for each in growing]
        self._check_failures(trees)
        return trees

    def _ground(self, progress: Progress | None, prepare: Callable[[Env, Name], None] | None = None) -> Ground:
        limits = self._limits
        return Ground(
            self._make_env,
            self._make_writer,
            self._params,
            self._live,
            self._calls,
            limits.deadline,
            limits.retries,
            self._playing,
            progress,
            prepare,
        )

    def _check_forks(self) -> None:
        """Refuse a policy that forks where it cannot, before anything is played."""
        if not self.policy.forks:
            return
        check_env_forks(self._make_env(), self._limits.policy)
        writer = self._make_writer(0)
        writer.fork(0)
        if self.policy.needs_entropies and not writer.entropies:
            raise ConfigError(
                f"rollout.policy = {self._limits.policy!r} decides by entropies, and the sampler reports none. "
                "Expected the hf sampler, or rollout.policy = 'random_tree'."
            )

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """Report what is stuck."""
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def _watch(self) -> None:
        limit, reported = self._limits.stall, set[tuple[str, int, Name, float]]()
        while True:
            await asyncio.sleep(limit / 4)
            now = time.perf_counter()
            for (task, copy, name), progress in self._playing.items():
                key = (task, copy, name, progress.since)
                if now - progress.since > limit and key not in reported:
                    reported.add(key)
                    _LOG.warning(
                        "stalled: task %s, trajectory %s has been in %s of turn %d for %.0f s; its deadline is %g s "
                        "(rollout.deadline). %d trajectories are live.",
                        task,
                        ".".join(map(str, name)),
                        progress.where(),
                        progress.turns,
                        now - progress.since,
                        self._limits.deadline,
                        len(self._playing),
                    )

    def _check_failures(self, trees: Sequence[RolloutTree]) -> None:
        leaves = [leaf for tree in trees for leaf in tree.leaves]
        failed = [leaf.error for leaf in leaves if leaf.outcome.failed]
        dropped = int(sum(tree.spent.get("dropped", 0) for tree in trees))  # branches, which were played anew
        count, most = len(failed) + dropped, self._limits.max_failures
        if count > most * (len(leaves) + dropped):
            lost = [each.reason for tree in trees for each in tree.decisions if each.wanted and not each.granted]
            first = next(iter([*failed, *lost]), "see spent/dropped")
            error = TooManyFailures(
                f"{count} of {len(leaves) + dropped} episodes failed for reasons that are not the policy's; at most "
                f"{most:.0%} may (rollout.max_failures). The first failure:\n{first}"
            )
            error.sample = [*failed, *lost]
            raise error


async def _unwrapped(growing: Any) -> Any:
    """Await ``growing``; of the errors that its groups raise, the first one on its own."""
    try:
        return await growing
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from first.__cause__


def read_limits(limits: RolloutConfig) -> tuple[Policy, Caps, Caps]:
    """The branching policy, and the budgets of a task and of a step.

    Raises:
        UnknownName: no such policy, option or budget.
        ConfigError: options or budgets that cannot be met.
    """
    return (
        make_policy(limits.policy, limits.policy_options, limits.group, limits.max_tokens),
        _caps("rollout.task_budget", limits.task_budget),
        _caps("rollout.step_budget", limits.step_budget),
    )


def check_env_forks(env: Env, policy: str) -> None:
    """Refuse ``policy``, which forks, where a tool of ``env`` says that it cannot be forked.

    Raises:
        ConfigError: naming the tool.
    """
    tools = [made for made in getattr(env, "make_tools", tuple)() if made.fork_level is ForkLevel.REFUSED]
    if tools or getattr(env, "fork_level", None) is ForkLevel.REFUSED:
        what = f"tool {tools[0].name!r}" if tools else type(env).__name__
        raise ConfigError(
            f"rollout.policy = {policy!r} forks the environment, but {what} of {type(env).__name__} refuses to be "
            "forked. Expected fork level copy, snapshot or replay; or use rollout.policy = 'group'."
        )


def _caps(key: str, given: Mapping[str, float]) -> Caps:
    for name in given:
        if name not in Caps.model_fields:
            raise UnknownName(f"budget in {key}:", name, Caps.model_fields)
    try:
        return Caps.model_validate(dict(given))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(
            f"{key}.{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}, got {wrong['input']!r}."
        ) from error
