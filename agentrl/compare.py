"""``agentrl compare``: train several methods on several seeds until each has spent the same budget.

The file is a run's configuration with a table of its own beside it::

    [compare]
    seeds = [0, 1, 2, 3, 4]
    budget = {calls = 1000}             # or tokens (generated), or learner_tokens (unique, through the learner)

    [compare.methods.group]             # the first method is the reference
    rollout.policy = "group"

    [compare.methods.random_tree]       # any keys of the configuration, as dotted keys or tables
    rollout.policy = "random_tree"

Every method on every seed is a run of its own in ``OUT/METHOD/seed_N``. It ends with the step that spends the budget;
``train.steps`` is the most steps it may take for that. At ``probes`` places on the way it is stopped, its policy plays
the ``eval.tasks`` held-out tasks, and it goes on from its checkpoint. What has been done is not done again, so a
comparison that was interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from agentrl.config import RunConfig, Section, leaves, load_config
from agentrl.equal_cost import UNITS, Point, Run
from agentrl.errors import AgentRLError, ConfigError, RunFolderError, UnknownName
from agentrl.evaluate import evaluate
from agentrl.progress import Advance, progress_bar
from agentrl.rollout.policies import make_policy
from agentrl.trace import RunFolder, latest_checkpoint, read_metrics
from agentrl.train import Metrics, train

COSTS = {"calls": "spent/calls", "tokens": "spent/tokens", "learner_tokens": "num_tokens/unique"}
"""What a budget can be counted in, and the metric of it."""
PROBES = "probes.json"
"""In a run's folder: what its policies earned so far."""


class CompareConfig(Section):
    """The table ``[compare]``.

    Attributes:
        seeds: one run of each method for each.
        budget: one of ``COSTS`` and how much of it.
        reference: the method to compare with; default: the first in the file.
        probes: how often on the way the policy plays ``eval.tasks`` x ``eval.samples`` held-out episodes, at equal
            distances along the budget, the start not counted.
        methods: overrides of the configuration, by name.
    """

    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1, max_length=20)
    budget: dict[str, float]
    reference: str = ""
    probes: int = Field(8, ge=1)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("expected different seeds, none below 0")
        return seeds

    @field_validator("budget")
    @classmethod
    def _one_cost(cls, budget: dict[str, float]) -> dict[str, float]:
        if len(budget) != 1 or not budget.keys() <= COSTS.keys() or min(budget.values()) <= 0:
            raise ValueError(f"expected one of {', '.join(COSTS)} and a number above 0, as in {{calls = 1000}}")
        return budget

    @field_validator("methods")
    @classmethod
    def _usable_names(cls, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if wrong := [name for name in methods if not re.fullmatch(r"\w[\w.-]*", name)]:
            raise ValueError(
                f"a method's name is a folder's: expected letters, digits, '_', '-', '.', got {wrong[0]!r}"
            )
        return methods


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    Attributes:
        configs: by method and seed; methods in the order of the file, the reference among them.
        reference: the method to compare with.
        unit: of the budget, one of ``COSTS``.
        budget: how much of it.
        probes: see ``CompareConfig``.
    """

    configs: Mapping[tuple[str, int], RunConfig]
    reference: str
    unit: str
    budget: float
    probes: int

    @property
    def places(self) -> dict[str, list[float]]:
        """Costs from which on the policy is probed next, by unit: 0, then ``probes`` up to the budget."""
        return {self.unit: [self.budget * number / self.probes for number in range(self.probes + 1)]}


class _Stop(Exception):
    """Ends a leg of a run; its last step is on the disk."""


def load_plan(file: str, overrides: Mapping[str, Any]) -> Plan:
    """Read ``file``; a method's keys win over ``overrides``, which win over variables and the file's other keys.

    Raises:
        ConfigError: no such file, no ``[compare]``, or a value that it does not take.
        UnknownName: an unknown key.
    """
    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {file}: {error}.") from error
    wanted = _compare_config(file, tables.pop("compare", None))
    names = list(wanted.methods)
    reference = wanted.reference or names[0]
    if reference not in names:
        raise UnknownName("method for compare.reference", reference, names)
    configs = {}
    for name, table in wanted.methods.items():
        changes = dict(leaves(table))
        if refused := {"seed", "out"} & changes.keys():
            raise ConfigError(f"compare.methods.{name}.{refused.pop()}: expected it to be left to the comparison.")
        for seed in wanted.seeds:
            config = load_config(tables, {**overrides, **changes, "seed": seed})
            _check_method(name, config)
            train = config.train.model_copy(update={"checkpoint_every": 1})  # a probe is of any step
            configs[name, seed] = config.model_copy(update={"train": train})
    ((unit, budget),) = wanted.budget.items()
    return Plan(configs, reference, unit, budget, wanted.probes)


def _compare_config(file: str, table: Any) -> CompareConfig:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{file} has no table [compare]: expected its budget and its methods; see agentrl --help.")
    for key in table:
        if key not in CompareConfig.model_fields:
            raise UnknownName(
                "configuration key", f"compare.{key}", [f"compare.{k}" for k in CompareConfig.model_fields]
            )
    try:
        return CompareConfig.model_validate(table)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("compare", *wrong["loc"])))
        raise ConfigError(f"{where}: {wrong['msg']}, got {_brief(wrong['input'])}.") from error


def _check_method(name: str, config: RunConfig) -> None:
    """Refuse what would make runs of one budget incomparable, or would fail every run of the method."""
    if config.train.decay:
        raise ConfigError(
            f"compare.methods.{name}: train.decay is {config.train.decay}, expected 0: the rate would fall towards "
            "train.steps, and the budget ends the runs of each method at another step."
        )
    if config.train.checkpoint_every not in (1, RunConfig().train.checkpoint_every):
        raise ConfigError(f"compare.methods.{name}: expected train.checkpoint_every to be left out: it is 1 here.")
    rollout = config.rollout
    make_policy(rollout.policy, rollout.policy_options, rollout.group, rollout.max_tokens)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# -- running ----------------------------------------------------------------------------------------------------------


def compare(plan: Plan, out: Path, *, failed: Callable[[str], None] = print) -> list[Run]:
    """Run what ``plan`` says and has not finished yet, in ``out``; a failed run does not stop the others.

    Seeds come one after the other, all methods of a seed together, so that a comparison that is cut short has whole
    pairs.

    Args:
        plan: methods, seeds, budget.
        out: its folder.
        failed: called with a line about each run that failed.

    Raises:
        RunFolderError: ``out`` holds runs of another configuration, or runs that spent a larger budget.
    """
    if (out / "config.json").exists():
        raise RunFolderError(f"{out} is a run's or a policy's folder: choose another one with --out.")
    found = []
    for name, seed in sorted(plan.configs, key=lambda key: key[1]):
        folder = out / name / f"seed_{seed}"
        try:
            found.append(_one_run(plan, name, seed, folder))
        except RunFolderError:
            raise
        except AgentRLError as error:
            found.append(Run(name, seed, failure=f"{type(error).__name__}: {error}"))
            failed(f"{name} seed {seed} failed: {found[-1].failure}")
    return found


def _one_run(plan: Plan, name: str, seed: int, folder: Path) -> Run:
    config = plan.configs[name, seed]
    points = _read_probes(plan, config, folder)
    with progress_bar(f"{name} seed {seed}", round(plan.budget), round(_at(points, plan.unit))) as advance:
        while not points or (_at(points, plan.unit) < plan.budget and points[-1].step < config.train.steps):
            target = next(place for place in plan.places[plan.unit] if not points or place > _at(points, plan.unit))
            with _opened(config, folder) as run:
                _play_leg(config, run, plan.unit, target, advance)
                points.append(_probe(config, run))
                run.write_json(PROBES, {"places": plan.places, "points": [asdict(point) for point in points]})
            gc.collect()  # models are few objects, and so wait long for the collector, but they are large
    return Run(name, seed, tuple(points))


def _play_leg(config: RunConfig, run: RunFolder, unit: str, target: float, advance: Advance) -> None:
    """Train until the run has cost ``target``, or done its steps; nothing where that is so."""
    done = run.start.step if run.start else 0
    spent = _total(run, done)[unit]

    def watch(step: int, metrics: Metrics) -> None:
        nonlocal spent
        before, spent = spent, spent + _cost(metrics, unit)
        reward = metrics["reward"]
        note = f"step {step}" + ("" if reward is None else f"  reward {reward:.3f}")
        advance(round(spent) - round(before), note)
        if spent >= target:
            raise _Stop

    if spent < target and done < config.train.steps:
        with suppress(_Stop):
            asyncio.run(train(config, run, on_step=watch))


def _probe(config: RunConfig, run: RunFolder) -> Point:
    """What the run's policy earns on the held-out tasks."""
    last = latest_checkpoint(run.path)
    policy, step = (config.policy.path, 0) if last is None else (str(last.path), last.step)
    # The same episodes' seeds for every run: what differs is the policy.
    evaluation = asyncio.run(evaluate(config.model_copy(update={"seed": 0}), policy))
    return Point(step, _total(run, step), evaluation.average.value)


def _read_probes(plan: Plan, config: RunConfig, folder: Path) -> list[Point]:
    if not (folder / PROBES).is_file():
        return []
    _require_same(config, json.loads((folder / "config.json").read_text()), folder)
    saved = json.loads((folder / PROBES).read_text())
    if saved["places"] != plan.places:
        raise RunFolderError(
            f"{folder} holds a run of another comparison: it was probed at {saved['places']}, now it would be at "
            f"{plan.places}. Keep the budget and the number of probes, or choose another folder with --out."
        )
    return [Point(**point) for point in saved["points"]]


def _at(points: Sequence[Point], unit: str) -> float:
    return points[-1].cost[unit] if points else 0.0


def _total(run: RunFolder, steps: int) -> dict[str, float]:
    """What the first ``steps`` steps of ``run`` cost, by unit."""
    rows = [row for row in read_metrics(run.path) if row["step"] <= steps]
    return {unit: sum(_cost(row, unit) for row in rows) for unit in UNITS}


def _opened(config: RunConfig, folder: Path) -> RunFolder:
    """A new run folder, or the one that is there."""
    values = config.model_dump(mode="json")
    if not (folder / "config.json").is_file():
        return RunFolder.create(folder, values, environment=config.env, keep=config.train.keep_checkpoints)
    _require_same(config, json.loads((folder / "config.json").read_text()), folder)
    return RunFolder.resume(folder, keep=config.train.keep_checkpoints)


def _require_same(config: RunConfig, saved: Mapping[str, Any], folder: Path) -> None:
    """Refuse a run of another configuration; ``train.steps``, without a decay, changes no step that was done."""
    old, new = load_config(saved, {"train.steps": config.train.steps}).model_dump(), config.model_dump()
    changed = [key for key in new if new[key] != old[key]]
    if changed:
        raise RunFolderError(
            f"{folder} holds a run with another configuration: {changed[0]} was {old[changed[0]]!r}, now it is "
            f"{new[changed[0]]!r}. Choose another folder with --out, or remove this one."
        )


def _cost(metrics: Mapping[str, Any], unit: str) -> float:
    """What a step cost; one without an update put no tokens through the learner."""
    if unit == "seconds":
        return float(metrics["time/rollout"] + metrics["time/update"])
    return float(metrics.get(COSTS[unit]) or 0.0)
