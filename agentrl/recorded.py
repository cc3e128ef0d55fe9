"""A recorded rollout: its tree, the configuration of its run, and the weights that wrote it, where they still are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from agentrl._versions import collect_versions
from agentrl.config import RunConfig, TrainConfig, load_config
from agentrl.errors import RunFolderError, UserError
from agentrl.trace import read_rollouts, rollout_steps, whole_checkpoints
from agentrl.types import RolloutTree


@dataclass(frozen=True, slots=True)
class Found:
    """A recorded tree.

    Attributes:
        rollout: its ID, STEP/INDEX.
        tree: itself.
        config: of its run.
        run: its run folder.
    """

    rollout: str
    tree: RolloutTree
    config: RunConfig
    run: Path

    @property
    def versions(self) -> set[int]:
        """Those of the policy that wrote its tokens."""
        return {version for node in self.tree.nodes for version in node.policy_version}


def find(run: Path, rollout: str) -> Found:
    """The tree that ``rollout`` names: ``STEP/INDEX``, from 0, or ``STEP/TASK_ID``.

    Raises:
        UserError: no such tree, or several.
        RunFolderError: no run, or what it holds cannot be read.
    """
    config = read_config(run)
    step, slash, which = rollout.partition("/")
    if not (step.isdecimal() and slash and which):
        raise UserError(f"--rollout {rollout}: expected STEP/INDEX or STEP/TASK_ID, as `agentrl replay {run}` lists.")
    trees = read_rollouts(run, int(step))
    places = [int(which)] if which.isdecimal() and int(which) < len(trees) else []
    places = places or [place for place, tree in enumerate(trees) if tree.task.id == which]
    if len(places) > 1:
        several = ", ".join(f"{int(step)}/{place}" for place in places)
        raise UserError(f"--rollout {rollout}: task {which} was played several times in that step: {several}.")
    if not places:
        known = ", ".join(dict.fromkeys(tree.task.id for tree in trees[:8]))
        raise UserError(
            f"--rollout {rollout}: step {int(step)} has the trees 0 to {len(trees) - 1}, and no task {which!r}; its "
            f"tasks: {known}{', ...' if len(trees) > 8 else ''}."
        )
    return Found(f"{int(step)}/{places[0]}", trees[places[0]], config, run)


def read_config(run: Path) -> RunConfig:
    """The configuration of the run in ``run``.

    Raises:
        RunFolderError: there is no run.
    """
    try:
        if not (run / "versions.json").is_file():
            raise FileNotFoundError(run / "versions.json")
        values = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{run} is not a run folder: {error}. Expected one that `agentrl train` wrote.") from error
    return load_config(None, values)


def listing(run: Path) -> list[str]:
    """The trees of the last step in lines for people.

    Raises:
        RunFolderError: no run, or one without rollouts.
    """
    read_config(run)
    steps = rollout_steps(run)
    if not steps:
        raise RunFolderError(f"{run} holds no rollouts yet.")
    lines = [f"{'rollout':<12}{'leaves':>6}{'mean':>8}  task"]
    for place, tree in enumerate(read_rollouts(run, steps[-1])):
        mean = f"{fmean(tree.rewards):.3f}" if tree.rewards else "none"
        lines.append(f"{f'{steps[-1]}/{place}':<12}{len(tree.leaves):>6}{mean:>8}  {tree.task.id}")
    return [*lines, "mean: of the rewards of all leaves", f"the rollouts of steps {steps[0]} to {steps[-1]} are there"]


def _kept(train: TrainConfig) -> str:
    return (
        f"every {train.checkpoint_every} steps were saved and the last {train.keep_checkpoints} kept "
        "(train.checkpoint_every, train.keep_checkpoints); "
    )


def find_weights(found: Found) -> Path:
    """The folder of the weights that wrote the tokens of ``found``.

    Raises:
        UserError: they are not there any more, or there is no single version.
    """
    if len(found.versions) > 1:
        raise UserError(
            f"rollout {found.rollout} was sampled by versions {sorted(found.versions)} of the policy, and weights that "
            "change in the middle of a tree cannot be changed again at the same token. Replay it with "
            "--recorded-tokens."
        )
    kept = _kept_weights(found)
    version = next(iter(found.versions), min(kept, default=0))
    if version in kept:
        return kept[version]
    steps = [step for step in rollout_steps(found.run) if _versions_of(found.run, step) <= kept.keys()]
    shown = ", ".join(map(str, steps[:6] + (["..."] if len(steps) > 6 else []))) or "none"
    raise UserError(
        f"rollout {found.rollout} was sampled by version {version} of the policy, and its weights are not there: "
        + (f"the policy was {found.config.policy.path}; " if version == 0 else _kept(found.config.train))
        + "there are versions "
        f"{', '.join(map(str, sorted(kept))) or 'none'}. Rollouts of these steps can be sampled again: {shown}. "
        "--recorded-tokens replays this one with its recorded tokens."
    )


def any_policy(found: Found) -> Path:
    """A folder with the tokenizer that ``found`` was written with: the run's policy, or one that came of it."""
    start = Path(found.config.policy.path)
    return start if (start / "config.json").is_file() else next(iter(_kept_weights(found).values()), start)


def changed_versions(run: Path) -> list[str]:
    """Libraries that were others then."""
    then: dict[str, str | None] = json.loads((run / "versions.json").read_text(encoding="utf-8"))
    now = collect_versions()
    changed = [f"{name} {old} -> {now[name]}" for name, old in then.items() if name in now and now[name] != old]
    return [f"recorded with other versions: {', '.join(changed)}"] if changed else []


def _kept_weights(found: Found) -> dict[int, Path]:
    """Version -> folder, of the weights that are still there."""
    from agentrl.learner.checkpoint import STATE

    kept: dict[int, Path] = {}
    for checkpoint in whole_checkpoints(found.run):
        state = json.loads((checkpoint.path / STATE).read_text(encoding="utf-8"))
        kept[int(state["version"])] = checkpoint.path  # a step without an update has the version before
    start = Path(found.config.policy.path)
    return kept | ({0: start} if (start / "config.json").is_file() else {})


def _versions_of(run: Path, step: int) -> set[int]:
    """Versions that wrote the tokens of ``step``, by its first tree: all of a step are written by the same weights."""
    return {version for tree in read_rollouts(run, step, 1) for node in tree.nodes for version in node.policy_version}
