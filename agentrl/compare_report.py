"""What ``agentrl compare`` prints and saves: tables, what must not be overlooked in them, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from agentrl._durable import disk_full_explained, write_atomic
from agentrl.compare import Plan
from agentrl.equal_cost import CLAIM, UNITS, Interval, Row, Run, mean_curve, reward_at
from agentrl.plot import cost_curves


def tables(rows: Sequence[Row], plan: Plan) -> list[Table]:
    """What came out at the budget, and what it cost to get where the reference got."""
    end = Table(
        title=f"at {plan.budget:g} {_words(plan.unit)}: mean over seeds [95 % interval], p against the reference"
    )
    for title in ("method", "seeds", "reward", "p", "steps", "calls", "tokens", "learnt", "seconds"):
        end.add_column(title, justify="left" if title == "method" else "right")
    for row in rows:
        costs = [f"{row.spent[unit]:,.0f}" if row.spent else "" for unit in UNITS]
        end.add_row(row.method, _seeds(row), _cell(row.reward), _p(row.reward_p), f"{row.steps:.1f}", *costs)
    reach = Table(title=f"share of the {_words(plan.unit)} until {plan.reference}'s reward at the budget")
    for title in ("method", "reached", "share", "p", "by seed", "mean curve", f"at most {CLAIM:g}"):
        reach.add_column(title, justify="left" if title in ("method", "by seed") else "right")
    for row in rows:
        got = [share for share in row.shares.values() if share is not None]
        below = ">= " if len(got) < len(row.shares) else ""
        each = " ".join("never" if share is None else f"{share:.2f}" for share in row.shares.values())
        curve = "never" if row.mean_curve_share is None else f"{row.mean_curve_share:.2f}"
        reached = f"{len(got)} of {len(row.shares)}"
        reach.add_row(row.method, reached, below + _cell(row.share), _p(row.share_p), each, curve, row.claim)
    return [end, reach]


def remarks(rows: Sequence[Row], runs: Sequence[Run], plan: Plan) -> list[str]:
    """What must not be overlooked in the tables."""
    lines = []
    for row in rows:
        lines += [f"{row.method} seed {seed} FAILED and is left out: {why}" for seed, why in row.failures.items()]
        if row.unspent:
            shares = ", ".join(f"{share:.0%} (seed {seed})" for seed, share in row.unspent.items())
            lines.append(
                f"{row.method} DID NOT SPEND THE BUDGET: train.steps ended its runs at {shares} of "
                f"{plan.budget:g} {_words(plan.unit)}; give --train.steps a larger number."
            )
    base = [run for run in runs if run.method == plan.reference and not run.failure]
    flat = [run.seed for run in base if reward_at(run, plan.unit, plan.budget) <= run.points[0].reward]
    if flat:
        lines.append(
            f"{plan.reference} ended NO BETTER than it began on seed {', '.join(map(str, flat))}: everyone has reached "
            "its reward at the start there, and the shares say nothing."
        )
    if count := max(row.finished for row in rows):
        lines.append(f"The smallest p that the exact sign-flip test of {count} seeds can give is {2 / 2**count:.4g}.")
    return lines


def write_comparison(plan: Plan, runs: Sequence[Run], rows: Sequence[Row], out: Path) -> list[Path]:
    """Save ``compare.json`` and ``compare.png``; the paths of what was written, no plot where nothing can be drawn."""
    written = [out / "compare.json"]
    payload = {
        "reference": plan.reference,
        "unit": plan.unit,
        "budget": plan.budget,
        "probes": plan.probes,
        "rows": [asdict(row) for row in rows],
        "configs": {row.method: _config_of(plan, row.method) for row in rows},
        "runs": [asdict(run) for run in runs],
    }
    with disk_full_explained("the comparison", out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(written[0], json.dumps(payload, indent=1) + "\n")
    whole = {row.method: [run for run in runs if run.method == row.method and not run.failure] for row in rows}
    bands = {method: mean_curve(found, plan.unit, plan.budget) for method, found in whole.items()}
    if any(band.cost for band in bands.values()):
        env = next(iter(plan.configs.values())).env
        title = f"{env}: reward at equal cost"
        written.append(cost_curves(bands, plan.reference, out / "compare.png", unit=_words(plan.unit), title=title))
    return written


def _config_of(plan: Plan, method: str) -> dict[str, Any]:
    """The method's configuration; its runs differ in the seed alone."""
    config = next(config for (name, _), config in plan.configs.items() if name == method)
    return config.model_dump(mode="json", exclude={"seed"})


def _words(unit: str) -> str:
    return {"calls": "tool calls", "tokens": "generated tokens", "learner_tokens": "learner tokens"}[unit]


def _seeds(row: Row) -> str:
    return f"{row.finished} of {row.finished + len(row.failures)}"


def _cell(found: Interval | None) -> str:
    return "" if found is None else str(found)


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
