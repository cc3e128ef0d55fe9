"""The training loop: play, learn, hand the weights over, write it all down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentrl.assemble import env_factory, local_actors
from agentrl.config import RunConfig
from agentrl.errors import TrainingError
from agentrl.learner import distributed
from agentrl.learner.checkpoint import load_policy
from agentrl.learner.leader import Leader, follow
from agentrl.learner.step import Learner
from agentrl.rollout.batch import collect, rollout_metrics
from agentrl.tasks import TaskStream
from agentrl.trace import RunFolder

Metrics = dict[str, float | None]
OnStep = Callable[[int, Metrics], None]


async def train(config: RunConfig, folder: RunFolder, *, on_step: OnStep | None = None) -> Path:
    """Train until ``train.steps``; returns the last checkpoint. Continues where ``folder`` left off.

    Under torchrun this is for process 0; the others call ``follow_training``.

    Args:
        config: the run's configuration.
        folder: an open run folder, new or resumed.
        on_step: called with every step's number, from 1, and its metrics.

    Raises:
        UserError: something in the configuration, the policy or the environment has to change.
        TrainingError: the run cannot go on; everything up to the step before is in the folder.
    """
    start = folder.start.path if folder.start else None
    distributed.broadcast((config, start))
    model, tokenizer = load_start(config, start)
    async with local_actors(config, model, tokenizer) as actors:
        with Leader(make_learner(config, model, start)) as learner:
            state = {"step": 0, "cursor": 0, "version": 0}
            if start is not None:
                state = learner.load(start)
                await actors.sampler.update_weights(learner.weights(), state["version"])
            stream = TaskStream(env_factory(config)().tasks("train"), config.seed, state["cursor"])
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
                        learner.save(target, tokenizer, state)
                if on_step is not None:
                    on_step(step, metrics)
    last = folder.latest_checkpoint()
    assert last is not None
    return last.path


def follow_training() -> None:
    """The part of the processes of torchrun that do not play: learn as process 0 says, until it is done."""
    config, start = distributed.broadcast((RunConfig(), None))
    follow(make_learner(config, load_start(config, start)[0], start))


def load_start(config: RunConfig, checkpoint: Path | None) -> tuple[Any, Any]:
    """The model and tokenizer to go on from; adapters go into the policy that they began with."""
    path = config.policy.path if checkpoint is None or config.policy.lora_rank else checkpoint
    return load_policy(path, config.policy.device, config.policy.dtype)


def make_learner(config: RunConfig, model: Any, checkpoint: Path | None) -> Learner:
    """The learner of ``model``; a resumed model is not the starting policy, which the KL is measured to."""
    moved = checkpoint is not None and config.algorithm.kl_coef > 0 and not config.policy.lora_rank
    return Learner(model, config, reference=load_start(config, None)[0] if moved else None)


@contextmanager
def saving_samples(folder: RunFolder, step: int) -> Iterator[None]:
    """Keep what made the run stop in ``failures/``."""
    try:
        yield
    except TrainingError as error:
        folder.save_failure(f"step_{step:06d}", {"error": str(error), "sample": error.sample})
        raise
