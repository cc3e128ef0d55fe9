"""``agentrl demo``: from random weights to a policy that uses its tools, with a number that can be trusted.

The policy is warm-started on demonstrations half of which guess instead of using the tools, so it starts by doing
either; reinforcement learning finds out which one pays. Everything is real: the search index, the sandboxed Python
session, the sampler, the learner. Only the model is tiny.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.markup import escape

from agentrl.config import RunConfig, load_config
from agentrl.evaluate import Evaluation, compare_evaluations, table
from agentrl.plot import learning_curve
from agentrl.progress import console
from agentrl.run import evaluate_with_bar, run_sft, train_with_bar
from agentrl.trace import RunFolder, read_metrics

SHORT = {"sft.steps": 110, "sft.demonstrations": 800, "train.steps": 3, "eval.tasks": 20}
"""The short form: every part runs, nothing is learnt well enough to be proud of."""


def demo_config(overrides: dict[str, Any], short: bool) -> RunConfig:
    """The demo's configuration; ``overrides`` win over the short form, which wins over ``demo.toml``."""
    return load_config(str(files("agentrl") / "demo.toml"), (SHORT if short else {}) | overrides)


def run_demo(config: RunConfig, out: Path) -> dict[str, Any]:
    """Run the whole job in ``out``; returns what ``result.json`` holds.

    Raises:
        RunFolderError: ``out`` holds a run already.
        IsolationUnavailable: this machine cannot isolate a Python session.
    """
    clock = Clock()
    run = RunFolder.create(out, config.model_dump(mode="json"), environment=config.env)
    with run:
        policy = out / "policy"
        with clock.phase("warm start"):
            run_sft(config, policy)
        with clock.phase("evaluate before"):
            before = evaluate_with_bar(config, str(policy), "evaluate before")
        with clock.phase("train"):
            start = config.policy.model_copy(update={"path": str(policy)})
            trained = train_with_bar(config.model_copy(update={"policy": start}), run)
        with clock.phase("evaluate after"):
            after = evaluate_with_bar(config, str(trained), "evaluate after")
        result = summarise_run(config, before, after, clock, trained)
        run.write_json("result.json", result)
        learning_curve(read_metrics(out), before.pass_at_k[0], after.pass_at_k[0], out / "learning_curve.png")
    report(before, after, out, trained, clock)
    return result


def summarise_run(
    config: RunConfig, before: Evaluation, after: Evaluation, clock: Clock, trained: Path
) -> dict[str, Any]:
    """What ``result.json`` holds."""
    return {
        "env": config.env,
        "seed": config.seed,
        "policy": str(trained),
        "before": [asdict(estimate) for estimate in before.pass_at_k],
        "after": [asdict(estimate) for estimate in after.pass_at_k],
        "difference": [asdict(comparison) for comparison in compare_evaluations(before, after)],
        "tool_calls": {"before": before.tool_calls, "after": after.tool_calls},
        "seconds": clock.seconds,
        "peak_memory_bytes": peak_memory(),
    }


def report(before: Evaluation, after: Evaluation, out: Path, trained: Path, clock: Clock) -> None:
    """Print the result and what to do next."""
    console.print(table({"before": before, "after": after}, compare_evaluations(before, after)))
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.seconds.items())
    console.print(f"{times}; peak memory {peak_memory() / 2**20:.0f} MiB")
    shown = os.path.relpath(out)
    lines = [
        f"run folder     {shown}   (result.json, metrics.jsonl, rollouts/, checkpoints/)",
        f"learning curve {shown}/learning_curve.png",
        "next:",
        f"  agentrl eval gazetteer --policy {os.path.relpath(trained)} --eval.tasks 200",
        "  agentrl new my_env        # an environment of your own, with its test",
        "  agentrl check my_env",
    ]
    console.print(escape("\n".join(lines)))


class Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)


def peak_memory() -> int:
    """Most memory this process held at once, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_result(out: Path) -> dict[str, Any]:
    """``result.json`` of a finished demo."""
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result
