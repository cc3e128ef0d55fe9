"""The training loop: play, learn, hand the weights over, write it all down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev

from agentrl.assemble import env_factory, local_actors
from agentrl.config import RunConfig
from agentrl.errors import TrainingError
from agentrl.learner.checkpoint import load_policy, load_state, save_checkpoint
from agentrl.learner.step import Learner
from agentrl.rollout.scheduler import Scheduler
from agentrl.seeds import derive_seed
from agentrl.tasks import TaskStream
from agentrl.trace import RunFolder
from agentrl.types import RolloutTree

Metrics = dict[str, float | None]
OnStep = Callable[[int, Metrics], None]


async def train(config: RunConfig, folder: RunFolder, *, on_step: OnStep | None = None) -> Path:
    """Train until ``train.steps``; returns the last checkpoint. Continues where ``folder`` left off.

    Args:
        config: the run's configuration.
        folder: an open run folder, new or resumed.
        on_step: called with every step's number, from 1, and its metrics.

    Raises:
        UserError: something in the configuration, the policy or the environment has to change.
        TrainingError: the run cannot go on; everything up to the step before is in the folder.
    """
    start = folder.start
    model, tokenizer = load_policy(start.path if start else config.policy.path, config.policy.device)
    # A resumed model is not the starting policy any more, which the KL is measured to.
    resumed_kl = start is not None and config.algorithm.kl_coef > 0
    reference = load_policy(config.policy.path, config.policy.device)[0] if resumed_kl else None
    learner = Learner(model, config, reference=reference)
    state = load_state(start.path, learner) if start else {"step": 0, "cursor": 0, "version": 0}
    stream = TaskStream(env_factory(config)().tasks("train"), config.seed, state["cursor"])
    async with local_actors(config, model, tokenizer, version=state["version"]) as actors:
        for step in range(state["step"] + 1, config.train.steps + 1):
            began = time.perf_counter()
            with saving_samples(folder, step):
                batch = await collect(actors.scheduler, stream, config, step)
            played = time.perf_counter()
            metrics = rollout_metrics(batch)
            if batch.informative:
                with saving_samples(folder, step):
                    metrics |= await asyncio.to_thread(learner.step, batch.informative)
                await actors.sampler.update_weights(learner.weights(), step)
            metrics |= {"time/rollout": played - began, "time/update": time.perf_counter() - played}
            folder.write_rollouts(step, batch.played)
            folder.log_metrics(step, metrics)
            if step % config.train.checkpoint_every == 0 or step == config.train.steps:
                state = {"step": step, "cursor": stream.cursor, "version": actors.sampler.version}
                with folder.checkpoint(step) as target:
                    save_checkpoint(target, learner, tokenizer, state)
            if on_step is not None:
                on_step(step, metrics)
    last = folder.latest_checkpoint()
    assert last is not None
    return last.path


@contextmanager
def saving_samples(folder: RunFolder, step: int) -> Iterator[None]:
    """Keep what made the run stop in ``failures/``."""
    try:
        yield
    except TrainingError as error:
        folder.save_failure(f"step_{step:06d}", {"error": str(error), "sample": error.sample})
        raise


@dataclass(slots=True)
class Batch:
    """The rollouts of one step.

    Attributes:
        fresh: the trees of the first round, an unbiased sample of the policy; rewards are reported from these.
        played: all trees, refills included.
        informative: the trees to learn from.
        refills: rounds of replacements played.
    """

    fresh: list[RolloutTree] = field(default_factory=list)
    played: list[RolloutTree] = field(default_factory=list)
    informative: list[RolloutTree] = field(default_factory=list)
    refills: int = 0


async def collect(scheduler: Scheduler, stream: TaskStream, config: RunConfig, step: int) -> Batch:
    """Play ``rollout.prompts`` groups; with dynamic sampling (DAPO), replace those whose rewards are all equal."""
    batch, wanted = Batch(), config.rollout.prompts
    while True:
        seed = derive_seed(config.seed, "rollout", step, batch.refills)
        tasks = stream.take(wanted - len(batch.informative))
        trees = await scheduler.play(tasks, group=config.rollout.group, seed=seed)
        batch.fresh = batch.fresh or trees
        batch.played += trees
        if not config.algorithm.dynamic_sampling:
            batch.informative = [tree for tree in trees if tree.rewards]
            return batch
        batch.informative += [tree for tree in trees if len(set(tree.rewards)) > 1]
        if len(batch.informative) >= wanted or batch.refills >= config.algorithm.max_refills:
            return batch
        batch.refills += 1


def rollout_metrics(batch: Batch) -> Metrics:
    """What a step's rollouts say, by TRL's names."""
    leaves = [leaf for tree in batch.fresh for leaf in tree.leaves]
    rewards = [leaf.reward for leaf in leaves if leaf.reward is not None]
    spread = [pstdev(tree.rewards) for tree in batch.fresh if tree.rewards] or [0.0]
    policy = [node for tree in batch.fresh for node in tree.nodes if node.author == "policy"]
    calls = sum(leaf.metrics.get("tool_calls", 0.0) for leaf in leaves)
    failed = sum(leaf.metrics.get("tool_failures", 0.0) for leaf in leaves)
    entropies = [entropy for node in policy for entropy in node.entropies] or [0.0]
    return {
        "reward": fmean(rewards) if rewards else None,
        "reward_std": fmean(spread),
        "frac_reward_zero_std": fmean(float(s == 0) for s in spread),
        "entropy": fmean(entropies),
        "tools/call_frequency": calls / len(leaves),
        "tools/failure_frequency": failed / max(calls, 1.0),
        "completions/mean_length": sum(len(node.token_ids) for node in policy) / len(leaves),
        "completions/clipped_ratio": fmean(float(leaf.outcome == "length") for leaf in leaves),
        "rollout/failures": float(sum(not leaf.outcome.scored for leaf in leaves)),
        "rollout/refills": float(batch.refills),
        "rollout/groups": float(len(batch.informative)),
    }
