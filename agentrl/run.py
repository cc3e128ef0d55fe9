"""What the commands do: each function is one of them, with its progress bar and its table."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agentrl import registry
from agentrl._durable import disk_full_explained
from agentrl.assemble import env_factory, make_renderer, use_threads
from agentrl.collapse import Watch
from agentrl.compare import compare, load_plan
from agentrl.compare_report import remarks, tables, write_comparison
from agentrl.config import RunConfig, load_config
from agentrl.demonstrations import Tokens, encode, record
from agentrl.equal_cost import Row, summarise
from agentrl.errors import ConfigError, RunFolderError, TrainingError, UserError
from agentrl.evaluate import Evaluation, compare_evaluations, evaluate, on_leaf, table
from agentrl.learner import distributed
from agentrl.preflight import check_learner, check_sampler
from agentrl.progress import StepTable, console, progress_bar
from agentrl.recorded import find, listing
from agentrl.replay import replay
from agentrl.rollout.scheduler import check_env_forks, read_limits
from agentrl.sandbox.shared import close_shared_sandboxes
from agentrl.seeds import derive_seed
from agentrl.tasks import TaskStream
from agentrl.tiny import build_model, build_tokenizer, render_texts, save_policy
from agentrl.trace import RunFolder, read_metrics
from agentrl.train import Metrics, follow_training, train
from agentrl.types import Task


def run_sft(config: RunConfig, folder: Path) -> list[float]:
    """Warm-start ``policy.path``, or a tiny policy made from nothing, and save it in ``folder``.

    Returns:
        The loss of every step.

    Raises:
        RunFolderError: ``folder`` exists and is not empty.
        UserError: the environment has no scripted expert, or the policy cannot be loaded.
    """
    from agentrl.learner.checkpoint import load_policy
    from agentrl.warmstart import sft

    if folder.exists() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} exists and is not empty. Choose another folder with --out.")
    use_threads(config)
    model, tokenizer = load_policy(config.policy.path, config.policy.device) if config.policy.path else (None, None)
    expert, guesses, tokenizer = asyncio.run(_demonstrations(config, tokenizer))
    if model is None:
        model = build_model(tokenizer, seed=derive_seed(config.seed, "model") % 2**31)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        console.print(f"policy: Qwen3 from nothing, {size:.2f} M parameters, {len(tokenizer)} tokens")
    with progress_bar("warm start (SFT)", config.sft.steps) as advance:
        losses = sft(
            model,
            expert,
            guesses,
            config.sft,
            seed=derive_seed(config.seed, "sft"),
            progress=lambda _, loss: advance(1, f"loss {loss:.3f}"),
        )
    folder.mkdir(parents=True, exist_ok=True)
    with disk_full_explained("the policy", folder):
        save_policy(model, tokenizer, folder)
    console.print(f"policy saved in {folder}")
    return losses


async def _demonstrations(config: RunConfig, tokenizer: Any) -> tuple[list[Tokens], list[Tokens], Any]:
    """Encoded demonstrations of expert and guesser, and the tokenizer: the given one, or one trained on them."""
    make_env, count = env_factory(config), config.sft.demonstrations
    guessed = count if config.sft.guess_fraction > 0 else 0
    stream = TaskStream(make_env().tasks("train"), derive_seed(config.seed, "demonstrations"))
    try:
        with progress_bar("record demonstrations", count + guessed) as advance:
            expert = await record(make_env, stream.take(count), seed=config.seed, progress=advance)
            tasks = stream.take(guessed)
            guesses = await record(make_env, tasks, seed=config.seed, guess=True, progress=advance)
    finally:
        await close_shared_sandboxes()
    if tokenizer is None:
        tokenizer = build_tokenizer(render_texts((d.messages, d.tools) for d in expert))
    renderer = make_renderer(config, tokenizer)
    return [encode(renderer, d) for d in expert], [encode(renderer, d) for d in guesses], tokenizer


def run_train(
    config: RunConfig | None, out: Path, *, toml: str | None = None, overrides: dict[str, Any] | None = None
) -> Path:
    """Train in a new run folder, or, without ``config``, go on with the run in ``out``; returns the last checkpoint.

    Under torchrun every process calls it; process 0 plays and writes, the others learn with it.

    A resumed run keeps its configuration; of ``overrides`` only those of ``MAY_CHANGE`` may differ.

    Raises:
        RunFolderError: the folder is in use, holds a run already, or holds none to resume.
        ConfigError: a resume with another value than the run's for something else.
        UserError: something that can be told before there is a run folder.
    """
    distributed.start(_device(config, out))
    try:
        if distributed.rank() == 0:
            return _lead(config, out, toml, overrides or {})
        follow_training()
        return out
    finally:
        distributed.stop()


def _device(config: RunConfig | None, out: Path) -> str:
    """Where the run learns; a run folder that cannot be read is process 0's to complain about."""
    try:
        return (
            config.policy.device if config else str(json.loads((out / "config.json").read_text())["policy"]["device"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "auto"


def _lead(config: RunConfig | None, out: Path, toml: str | None, overrides: Mapping[str, Any]) -> Path:
    if config is not None:
        _check_inputs(config)
        config = _anchored(config)
        text = Path(toml).read_text() if toml else None
        values = config.model_dump(mode="json")
        keep = config.train.keep_checkpoints
        _require_no_policy(out)
        with RunFolder.create(out, values, toml=text, environment=config.env, keep=keep) as run:
            return train_with_bar(config, run)
    _require_no_policy(out)
    with RunFolder.resume(out) as run:
        config = _resumed_config(run, overrides)
        run.keep = config.train.keep_checkpoints
        if run.start and run.start.step >= config.train.steps:
            raise UserError(
                f"the run in {out} has done {run.start.step} of {config.train.steps} steps; to go on, give "
                "--train.steps a larger number."
            )
        return train_with_bar(config, run)


def _require_no_policy(out: Path) -> None:
    """A run folder has a ``config.json``, and so has a policy's."""
    if (out / "config.json").is_file() and not (out / "versions.json").is_file():
        raise RunFolderError(f"{out} is not a run folder: its config.json is not a run's. Choose another with --out.")


def _check_inputs(config: RunConfig) -> TaskStream:
    """Stumble now over what a run would stumble over later; the training tasks."""
    from agentrl.learner.checkpoint import load_tokenizer

    if not config.policy.path:
        raise ConfigError("no policy: expected a Hugging Face folder, --policy DIR; `agentrl sft` makes a tiny one.")
    read_limits(config.rollout)
    tasks = TaskStream(env_factory(config)().tasks("train"), config.seed)
    make_renderer(config, load_tokenizer(config.policy.path))
    return tasks


def _anchored(config: RunConfig) -> RunConfig:
    """Paths made absolute, so that a run can be resumed from any folder."""
    file, _, attribute = config.env.rpartition(":")
    env = f"{Path(file).resolve()}:{attribute}" if file.endswith(".py") else config.env
    local = Path(env, "__init__.py")
    if env not in registry.names("envs") and local.is_file():
        env = f"{local.resolve()}:ENV"
    policy = config.policy.model_copy(update={"path": str(Path(config.policy.path).resolve())})
    return config.model_copy(update={"env": env, "policy": policy})


MAY_CHANGE = ("train.steps", "train.min_entropy", "train.min_informative", "train.patience")
"""What a resumed run may do otherwise: how long it goes on, which changes no step that it has done."""


def _resumed_config(run: RunFolder, overrides: Mapping[str, Any]) -> RunConfig:
    saved = load_config(None, run.config)
    for key, value in overrides.items():
        if key not in MAY_CHANGE and _anchored(load_config(None, {**run.config, key: value})) != saved:
            raise ConfigError(
                f"a resumed run keeps its configuration but for train.steps, got {key} = {value!r}. (Also "
                f"{', '.join(MAY_CHANGE[1:])} may change.)"
            )
    return load_config(None, {**run.config, **overrides})


def train_with_bar(config: RunConfig, run: RunFolder) -> Path:
    """``train`` with a progress bar and a table of its steps, and a watch for its collapse.

    Raises:
        TrainingCollapsed: see ``collapse``; besides what ``train`` raises.
    """
    done = run.start.step if run.start else 0
    watch = Watch.of(config.train, read_metrics(run.path))
    steps = StepTable(config.train.steps)
    with progress_bar(f"train ({config.algorithm.name})", config.train.steps, done) as advance:

        def show(step: int, metrics: Metrics) -> None:
            reward = metrics["reward"]
            note = "" if reward is None else f"reward {reward:.3f}  calls {metrics['tools/call_frequency']:.2f}"
            advance(1, note, steps.row(step, metrics, _aloud(metrics)))
            watch.check(metrics)

        last = asyncio.run(train(config, run, on_step=show))
    console.print(f"checkpoint {last}")
    return last


def _aloud(metrics: Metrics) -> str:
    """What must not be overlooked in a step; empty where there is nothing."""
    failures = metrics["rollout/failures"] or 0
    words = [f"{failures:.0f} EPISODES FAILED"] if failures else []
    words += [f"{cut:.0f} CUT BY A BUDGET"] if (cut := metrics["rollout/over_budget"]) else []
    words += [f"{lost:.0f} FORKS FAILED"] if (lost := metrics["spent/forks_failed"]) else []
    words += [f"{lost:.0f} BRANCHES FAILED"] if (lost := metrics["spent/dropped"]) else []
    words += ["NO SCORED EPISODE"] if metrics["reward"] is None else []
    words += [] if metrics["rollout/groups"] else ["NOTHING TO LEARN FROM"]
    return ", ".join(words)


def dry_run(config: RunConfig) -> None:
    """Check what can be checked without starting an engine or asking a server; print it, and the configuration.

    Raises:
        UserError: whatever a real run would have stumbled over.
    """
    tasks = _check_inputs(config)
    if read_limits(config.rollout)[0].forks:
        check_env_forks(env_factory(config)(), config.rollout.policy)
    first = tasks.take(1)[0]
    asyncio.run(_open_episode(config, first))
    said = list(check_sampler(config, check_learner(config)))
    print(json.dumps(config.model_dump(mode="json"), indent=2))
    print("\n".join(said))
    print(f"ok: {config.rollout.prompts} x {config.rollout.group} rollouts a step, first task {first.id!r}")


async def _open_episode(config: RunConfig, task: Task) -> None:
    """Begin an episode and close it: the tools exist and start."""
    env = env_factory(config)()
    try:
        await env.reset(seed=config.seed, options={"task": task})
    finally:
        await env.close()
        await close_shared_sandboxes()


def run_eval(config: RunConfig, policies: list[str], target: Path | None) -> list[Evaluation]:
    """Evaluate one or two policies on the same tasks, print the table, write JSON if asked.

    Raises:
        UserError: there is no folder for ``target``; found out before the work is done.
    """
    _require_folder(target)
    rows = {policy: evaluate_with_bar(config, policy, f"evaluate {Path(policy).name}") for policy in policies}
    found = list(rows.values())
    comparisons = compare_evaluations(found[0], found[1]) if len(found) == 2 else []
    console.print(table(rows, comparisons))
    for comparison in comparisons:
        if comparison.k == config.eval.k[0]:
            console.print(f"paired sign-flip test at pass@{comparison.k}: p = {comparison.p_value:.4g}")
    if target is not None:
        payload = {
            "config": config.model_dump(mode="json"),
            "evaluations": [row.to_json() for row in found],
            "difference": [asdict(comparison) for comparison in comparisons],
        }
        target.write_text(json.dumps(payload, indent=2) + "\n")
        console.print(f"wrote {target}")
    return found


def evaluate_with_bar(config: RunConfig, policy: str, title: str) -> Evaluation:
    """``evaluate`` with a progress bar."""
    with progress_bar(title, config.eval.tasks * config.eval.samples) as advance:
        return asyncio.run(evaluate(config, policy, progress=on_leaf(advance)))


def run_compare(file: str, overrides: Mapping[str, Any], out: Path) -> list[Row]:
    """Run the comparison in ``file``, or what of it is left to do; print its table, write its JSON and its plot.

    Raises:
        UserError: something in the file, the policy or the environment that can be told before anything is run.
        TrainingError: every run of the reference method failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("agentrl compare runs in one process: start it without torchrun, several seeds side by side.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('agentrl compare draws its curves: expected matplotlib; pip install "agentrl[plots]".')
    plan = load_plan(file, overrides)
    for config in {method: config for (method, _), config in plan.configs.items()}.values():
        _check_inputs(config)
    plan = replace(plan, configs={key: _anchored(config) for key, config in plan.configs.items()})
    runs = compare(plan, out, failed=lambda line: console.print(line, style="red", markup=False))
    rows = summarise(runs, plan.reference, plan.unit, plan.budget)
    for view in tables(rows, plan):
        console.print(view)
    for remark in remarks(rows, runs, plan):
        console.print(remark, markup=False, highlight=False)
    for path in write_comparison(plan, runs, rows, out):
        console.print(f"wrote {path}")
    if not rows[0].finished:
        raise TrainingError(f"every run of {plan.reference} failed, so there is nothing to compare with; see above.")
    return rows


def run_replay(run: Path, rollout: str, target: Path | None, *, recorded_tokens: bool, live: bool) -> bool:
    """Grow a recorded tree again and print the verdict, or, without ``rollout``, what there is; whether all is equal.

    Raises:
        UserError: no such run or tree, or its weights are not there any more.
    """
    if not rollout:
        for line in listing(run):
            print(line)
        return True
    _require_folder(target)
    verdict = asyncio.run(replay(find(run, rollout), recorded_tokens=recorded_tokens, live=live))
    for line in verdict.lines():
        print(line)
    if target is not None:
        target.write_text(json.dumps(verdict.to_json(), indent=2, default=str) + "\n")
    return verdict.difference is None


def run_check(config: RunConfig, target: Path | None) -> bool:
    """Run the conformance kit and print what it found; whether all checks passed."""
    from agentrl.conformance import Check, check_env

    async def check() -> list[Check]:
        try:
            return await check_env(env_factory(config))
        finally:
            await close_shared_sandboxes()

    _require_folder(target)
    checks = asyncio.run(check())
    for found in checks:
        console.print(f"[{'green' if found.ok else 'red'}]{'ok  ' if found.ok else 'FAIL'}[/] {found.name}", end="")
        console.print(f"  {found.detail}" if found.detail else "", markup=False)
    if target is not None:
        target.write_text(json.dumps([asdict(found) for found in checks], indent=2) + "\n")
    return all(found.ok for found in checks)


def _require_folder(target: Path | None) -> None:
    if target is not None and not target.parent.is_dir():
        raise UserError(f"cannot write {target}: {target.parent} is no folder.")
