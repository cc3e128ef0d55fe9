"""What a training step plays: groups, replacements for those that teach nothing, and what to report of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from agentrl.config import RunConfig
from agentrl.errors import PolicyMismatch
from agentrl.rollout.scheduler import Scheduler
from agentrl.seeds import derive_seed
from agentrl.tasks import TaskStream
from agentrl.types import RolloutTree

SPENT = ("tokens", "calls", "roots", "branches", "forks_failed", "forks_replay", "dropped", "pruned", "retried")
"""What the trees count, see ``RolloutTree.spent``; their seconds pass at the same time and are not added up."""


@dataclass(slots=True)
class Batch:
    """The rollouts of one step.

    Attributes:
        fresh: the trees of the first round, not chosen by what they earned; rewards are reported from their roots.
        played: all trees, refills included.
        informative: the trees to learn from.
        refills: rounds of replacements played.
    """

    fresh: list[RolloutTree] = field(default_factory=list)
    played: list[RolloutTree] = field(default_factory=list)
    informative: list[RolloutTree] = field(default_factory=list)
    refills: int = 0


async def collect(scheduler: Scheduler, stream: TaskStream, config: RunConfig, step: int) -> Batch:
    """Grow ``rollout.prompts`` trees; with dynamic sampling (DAPO), replace those whose rewards are all equal.

    Replacements are paid for by the same step's budget, and none is played once it is spent.
    """
    batch, wanted, budget = Batch(), config.rollout.prompts, scheduler.step_budget()
    while True:
        seed = derive_seed(config.seed, "rollout", step, batch.refills)
        tasks = stream.take(wanted - len(batch.informative))
        trees = await scheduler.grow(tasks, seed=seed, budget=budget)
        batch.fresh = batch.fresh or trees
        batch.played += trees
        if not config.algorithm.dynamic_sampling:
            batch.informative = [tree for tree in trees if tree.rewards]
            return batch
        batch.informative += [tree for tree in trees if len(set(tree.rewards)) > 1]
        if len(batch.informative) >= wanted or batch.refills >= config.algorithm.max_refills or budget.exhausted:
            return batch
        batch.refills += 1


def staleness(batch: Batch, versions: Sequence[int]) -> dict[str, float | None]:
    """How many updates lie between the policy that wrote the tokens to learn from and the learner's.

    Args:
        batch: what was played.
        versions: those that the sampler has had, oldest first; the last one is the learner's. They are numbers of
            steps, and a step without an update leaves its number out, so places in this row are counted.

    Returns:
        ``staleness/mean`` and ``staleness/max`` over the policy tokens of the trees to learn from; None without any.

    Raises:
        PolicyMismatch: a token of a version that was never handed over.
    """
    behind = {version: number for number, version in enumerate(reversed(versions))}
    ages: Counter[int] = Counter()
    for tree in batch.informative:
        for version in (version for node in tree.nodes for version in node.policy_version):
            if version not in behind:
                raise PolicyMismatch(
                    f"the sampler wrote tokens of version {version} (task {tree.task.id!r}), expected one that it was "
                    f"given, the last of which is {versions[-1]}: somebody else gives it weights."
                )
            ages[behind[version]] += 1
    if not ages:
        return {"staleness/mean": None, "staleness/max": None}
    return {"staleness/mean": sum(k * n for k, n in ages.items()) / ages.total(), "staleness/max": float(max(ages))}


def rollout_metrics(batch: Batch) -> dict[str, float | None]:
    """What a step's rollouts say, by TRL's names; ``spent/`` is what all of them cost, refills included."""
    leaves = [leaf for tree in batch.fresh for leaf in tree.leaves]
    scored = [(leaf.reward, len(leaf.name) <= 1) for leaf in leaves if leaf.reward is not None]
    # Trees branch where tools are called, so their leaves call tools more often than the policy does: what began from
    # the prompt is a sample of it. (In an expand_tree all of those may have been pruned.)
    rewards = [reward for reward, root in scored if root] or [reward for reward, _ in scored]
    spread = [pstdev(tree.rewards) for tree in batch.fresh if tree.rewards] or [0.0]
    policy = [node for tree in batch.fresh for node in tree.nodes if node.author == "policy"]
    calls = sum(leaf.metrics.get("tool_calls", 0.0) for leaf in leaves)
    failed = sum(leaf.metrics.get("tool_failures", 0.0) for leaf in leaves)
    entropies = [entropy for node in policy for entropy in node.entropies] or [0.0]
    spent: Counter[str] = Counter()
    for tree in batch.played:
        spent.update(tree.spent)
    count = max(len(leaves), 1)
    return {
        "reward": fmean(rewards) if rewards else None,
        "reward_std": fmean(spread),
        "frac_reward_zero_std": fmean(float(s == 0) for s in spread),
        "entropy": fmean(entropies),
        "tools/call_frequency": calls / count,
        "tools/failure_frequency": failed / max(calls, 1.0),
        "completions/mean_length": sum(len(node.token_ids) for node in policy) / count,
        "completions/clipped_ratio": sum(leaf.outcome == "length" for leaf in leaves) / count,
        "rollout/failures": float(sum(leaf.outcome.failed for leaf in leaves)),
        "rollout/over_budget": float(sum(leaf.outcome == "budget" for leaf in leaves)),
        "rollout/refills": float(batch.refills),
        "rollout/groups": float(len(batch.informative)),
        "rollout/leaves": float(sum(len(tree.leaves) for tree in batch.played)),
        **{f"spent/{name}": spent[name] for name in SPENT},
    }
