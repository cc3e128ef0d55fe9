"""Plays many episodes at once, within limits, and gathers them into trees in a fixed order.

Every episode is its own coroutine; the sampler batches whatever is in flight, so no episode waits for the slowest of a
wave. Results come back in the order of the tasks, whatever order they finished in: a run is reproducible.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from agentrl.config import RolloutConfig
from agentrl.env import Env
from agentrl.errors import AgentRLError, TooManyFailures
from agentrl.rollout.episode import Played, Writer, play
from agentrl.seeds import derive_seed
from agentrl.types import Leaf, Node, RolloutTree, SamplingParams, Task

Progress = Callable[[Leaf], None]


class Scheduler:
    """Plays groups of episodes.

    Args:
        make_env: a new environment per episode.
        make_writer: a new writer per episode, from its seed.
        limits: how many at once, deadlines, retries and the share of failures that is tolerated.
        params: what the episodes are sampled with; recorded in the trees.
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
        self._live = asyncio.Semaphore(limits.max_live)

    async def play(
        self, tasks: Sequence[Task], *, group: int, seed: int, progress: Progress | None = None
    ) -> list[RolloutTree]:
        """One tree of ``group`` chains per task, in the order of ``tasks``.

        Args:
            tasks: what to play.
            group: episodes per task.
            seed: every episode's seed derives from it, the task's id and the episode's number.
            progress: called with each leaf as it ends.

        Raises:
            TooManyFailures: more than ``max_failures`` of the episodes failed for reasons that are not the policy's.
        """
        copies: Counter[str] = Counter()
        groups: list[list[asyncio.Task[Played]]] = []
        try:
            async with asyncio.TaskGroup() as running:
                for task in tasks:
                    copies[task.id] += 1
                    seeds = [derive_seed(seed, task.id, copies[task.id], i) for i in range(group)]
                    groups.append([running.create_task(self._episode(task, s, progress)) for s in seeds])
        except* AgentRLError as errors:
            raise errors.exceptions[0] from None
        trees = [
            self._tree(task, [episode.result() for episode in episodes])
            for task, episodes in zip(tasks, groups, strict=True)
        ]
        self._check_failures(trees)
        return trees

    async def _episode(self, task: Task, seed: int, progress: Progress | None) -> Played:
        async with self._live:
            for attempt in range(self._limits.retries + 1):
                played = await play(
                    self._make_env(), task, self._make_writer(seed), seed=seed, deadline=self._limits.deadline
                )
                if played.leaf.outcome.scored or attempt == self._limits.retries:
                    break
        if progress is not None:
            progress(played.leaf)
        return played

    def _tree(self, task: Task, group: Sequence[Played]) -> RolloutTree:
        """Chains under one root, the prompt; an environment whose prompt depends on the seed gets several roots."""
        nodes: list[Node] = []
        roots: dict[tuple[int, ...], int] = {}
        leaves: list[Leaf] = []
        for played in group:
            if not played.nodes:
                leaves.append(replace(played.leaf, node=-1))
                continue
            root = played.nodes[0]
            parent = roots.setdefault(root.token_ids, len(nodes))
            if parent == len(nodes):
                nodes.append(root)
            for node in played.nodes[1:]:
                nodes.append(replace(node, parent=parent))
                parent = len(nodes) - 1
            leaves.append(replace(played.leaf, node=parent))
        return RolloutTree(task, tuple(nodes), tuple(leaves), self._params.temperature, self._params.top_p)

    def _check_failures(self, trees: Sequence[RolloutTree]) -> None:
        leaves = [leaf for tree in trees for leaf in tree.leaves]
        failed = [leaf for leaf in leaves if not leaf.outcome.scored]
        if len(failed) > self._limits.max_failures * len(leaves):
            error = TooManyFailures(
                f"{len(failed)} of {len(leaves)} episodes failed for reasons that are not the policy's; at most "
                f"{self._limits.max_failures:.0%} may (rollout.max_failures). The first failure:\n{failed[0].error}"
            )
            error.sample = [leaf.error for leaf in failed]
            raise error
