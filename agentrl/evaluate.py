"""Evaluation: play every task several times, and say pass@k with an interval."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from agentrl.assemble import env_factory, local_actors
from agentrl.config import RunConfig
from agentrl.errors import ConfigError
from agentrl.rollout.scheduler import Progress, Scheduler
from agentrl.seeds import derive_seed
from agentrl.stats import Comparison, Estimate, avg_at_k, compare, pass_at_k, success_counts
from agentrl.tasks import unique_tasks
from agentrl.types import RolloutTree


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One policy on one set of tasks.

    Attributes:
        policy: its folder or address.
        scores: rewards by task id; None where a sample could not be scored.
        threshold: reward from which a sample counts as solved.
        pass_at_k: an estimate per k.
        average: mean reward over all samples (avg@n), with its interval.
        tool_calls: mean calls per trajectory.
        outcomes: trajectories by outcome.
    """

    policy: str
    scores: Mapping[str, list[float | None]]
    threshold: float
    pass_at_k: tuple[Estimate, ...]
    average: Estimate
    tool_calls: float
    outcomes: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return asdict(self)


@asynccontextmanager
async def actors_for(policy: str, config: RunConfig) -> AsyncIterator[Scheduler]:
    """A scheduler that plays ``policy``: a Hugging Face folder, or the base URL of an OpenAI-compatible server."""
    if policy.startswith(("http://", "https://")):
        from agentrl.sampler.openai import chat_actors

        async with chat_actors(policy, config) as scheduler:
            yield scheduler
    else:
        from agentrl.learner.checkpoint import load_policy

        model, tokenizer = load_policy(policy, config.policy.device)
        async with local_actors(config, model, tokenizer, policy) as actors:
            yield actors.scheduler


async def evaluate(config: RunConfig, policy: str, *, progress: Progress | None = None) -> Evaluation:
    """Play the configured tasks with ``policy``.

    Args:
        config: ``env``, ``eval``, ``sampler`` and ``rollout`` are used; tasks are taken in their own order.
        policy: a Hugging Face folder or a base URL.
        progress: called with each finished trajectory.

    Raises:
        UserError: unknown environment, no tasks, k above the number of samples, or an unusable policy.
        TooManyFailures: the infrastructure failed too often for the number to mean anything.
    """
    if max(config.eval.k) > config.eval.samples:
        raise ConfigError(
            f"eval.k contains {max(config.eval.k)}, but eval.samples is {config.eval.samples}: pass@k needs at least k "
            "samples a task."
        )
    env = env_factory(config)()
    tasks = unique_tasks(env.tasks(config.eval.split), config.eval.split, config.eval.tasks)
    seed = derive_seed(config.seed, "eval")
    async with actors_for(policy, config) as scheduler:
        trees = await scheduler.play(tasks, group=config.eval.samples, seed=seed, progress=progress)
    return summarise(policy, trees, config, getattr(env, "reward_range", (0.0, 1.0)))


def summarise(
    policy: str, trees: list[RolloutTree], config: RunConfig, reward_range: tuple[float, float]
) -> Evaluation:
    """Estimates from finished trees."""
    scores = {tree.task.id: [leaf.reward for leaf in tree.leaves] for tree in trees}
    counts = success_counts(scores, config.eval.threshold)
    leaves = [leaf for tree in trees for leaf in tree.leaves]
    outcomes: dict[str, int] = {}
    for leaf in leaves:
        outcomes[leaf.outcome.value] = outcomes.get(leaf.outcome.value, 0) + 1
    scored = {task: [reward for reward in rewards if reward is not None] for task, rewards in scores.items()}
    fewest = min((len(rewards) for rewards in scored.values() if rewards), default=1)
    return Evaluation(
        policy,
        scores,
        config.eval.threshold,
        tuple(pass_at_k(counts, k) for k in config.eval.k),
        avg_at_k(scored, fewest, reward_range=reward_range),
        fmean(leaf.metrics.get("tool_calls", 0.0) for leaf in leaves),
        dict(sorted(outcomes.items())),
    )


def compare_evaluations(before: Evaluation, after: Evaluation) -> list[Comparison]:
    """``after`` minus ``before`` at every k that both have, paired by task."""
    first = success_counts(before.scores, before.threshold)
    second = success_counts(after.scores, after.threshold)
    shared = [e.k for e in before.pass_at_k if any(e.k == other.k for other in after.pass_at_k)]
    return [compare(first, second, k) for k in shared]


def table(rows: Mapping[str, Evaluation], comparisons: list[Comparison] | None = None) -> Table:
    """Evaluations side by side, and their paired difference."""
    first = next(iter(rows.values()))
    tasks, samples = first.pass_at_k[0].tasks, first.pass_at_k[0].samples
    caption = f"{tasks} tasks, {samples} samples; 95 % intervals over tasks; calls: tool calls per episode"
    view = Table(caption=caption, caption_justify="left")
    view.add_column("policy", overflow="fold")
    for estimate in first.pass_at_k:
        view.add_column(f"pass@{estimate.k}", justify="right")
    graded = any(reward not in (None, 0.0, 1.0) for row in rows.values() for r in row.scores.values() for reward in r)
    if graded:  # with rewards of 0 and 1 it is pass@1
        view.add_column(f"avg@{first.average.k}", justify="right")
    view.add_column("calls", justify="right")
    for name, row in rows.items():
        cells = [f"{e.value:.3f}\n[{e.low:.3f}, {e.high:.3f}]" + _excluded(e.excluded) for e in row.pass_at_k]
        if graded:
            cells.append(f"{row.average.value:.3f}\n[{row.average.low:.3f}, {row.average.high:.3f}]")
        view.add_row(name, *cells, f"{row.tool_calls:.2f}")
    if comparisons:
        view.add_section()
        cells = [f"{c.difference:+.3f}\n[{c.low:+.2f}, {c.high:+.2f}]" + _excluded(c.excluded) for c in comparisons]
        view.add_row("2nd - 1st\n(paired)", *cells)
    return view


def on_leaf(advance: Callable[..., None]) -> Progress:
    """A progress callback that keeps the running mean reward beside the bar."""
    rewards: list[float] = []

    def finished(leaf: Any) -> None:
        if leaf.reward is not None:
            rewards.append(leaf.reward)
        advance(1, f"reward {fmean(rewards):.3f}" if rewards else "")

    return finished


def _excluded(count: int) -> str:
    return f"\n{count} tasks left out" if count else ""
