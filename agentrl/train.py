"""The training loop: play, learn, hand the weights over, write it all down.

With ``train.staleness = 1`` the next batch is played while the learner works on this one, by the weights from before
its update; then both are waited for, and only then are the new weights handed over. Weights that arrive in the middle
of a batch would keep the sampler busier, but which token is whose would then hang on the clock. So every batch is of
one version, at most one update old; the same run comes out every time, and a replay stays exact. Nothing is played
ahead of a checkpoint, which then holds all that there is: a resumed run is the uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentrl._together import Timed, in_thread, timed, together
from agentrl.assemble import env_factory, local_actors
from agentrl.config import RunConfig
from agentrl.errors import TrainingError
from agentrl.handover import Handover
from agentrl.learner import distributed
from agentrl.learner.checkpoint import load_policy
from agentrl.learner.leader import Leader, follow
from agentrl.learner.step import Learner
from agentrl.rollout.batch import Batch, collect, rollout_metrics, staleness
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
    async with local_actors(config, model, tokenizer, config.policy.path) as actors:
        with Leader(make_learner(config, model, start)) as learner:
            state = learner.load(start) if start else {"step": 0, "cursor": 0, "version": 0}
            handover = Handover(actors.sampler, learner, config)
            with saving_samples(folder, state["step"]):
                await (handover(state["version"]) if start or handover.adapters else handover.probe())
            stream = TaskStream(env_factory(config)().tasks("train"), config.seed, state["cursor"])

            async def play(step: int) -> Batch:
                with saving_samples(folder, step):
                    return await collect(actors.scheduler, stream, config, step)

            async def learn(step: int, batch: Batch, *, stale: bool) -> Metrics:
                if not batch.informative:
                    return {}
                with saving_samples(folder, step):
                    async with actors.resting():
                        return {**await in_thread(learner.run, Learner.step, batch.informative, stale=stale)}

            ahead: Timed | None = None
            for step in range(state["step"] + 1, config.train.steps + 1):
                played = ahead or await timed(play(step))
                batch: Batch = played.result
                metrics = rollout_metrics(batch) | staleness(batch, handover.versions)
                learning = timed(learn(step, batch, stale=bool(metrics["staleness/max"])))
                saving = step % config.train.checkpoint_every == 0 or step == config.train.steps
                if config.train.staleness and not saving:
                    learnt, ahead = await together(learning, timed(play(step + 1)))
                else:
                    learnt, ahead = await learning, None
                metrics |= learnt.result
                began = time.perf_counter()
                if batch.informative:
                    with saving_samples(folder, step):
                        metrics |= await handover(step)
                metrics["time/rollout"] = played.seconds
                metrics["time/update"] = learnt.seconds + time.perf_counter() - began
                metrics["time/overlap"] = learnt.overlap(ahead) if ahead else 0.0
                folder.write_rollouts(step, batch.played)
                folder.log_metrics(step, metrics)
                if saving:
                    await handover.settle()
                    state = {"step": step, "cursor": stream.cursor, "version": handover.versions[-1]}
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
    return load_policy(start_folder(config, checkpoint), config.policy.device, config.policy.dtype)


def start_folder(config: RunConfig, checkpoint: Path | None) -> Path:
    """Where those are; not the checkpoint of a run that trains adapters, in whose policy they are merged."""
    return Path(config.policy.path) if checkpoint is None or config.policy.lora_rank else checkpoint


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
