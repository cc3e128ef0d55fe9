"""What ``agentrl compare`` prints and saves: tables, what must not be overlooked in them, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from agentrl._durable import disk_full_explained, write_atomic
from agentrl.compare import Plan
from agentrl.equal_cost import CLAIM, Interval, Row, Run, mean_curve, reward_at
from agentrl.plot import cost_curves

COLUMNS = {"calls": "calls", "tokens": "tokens", "learner_tokens": "learnt", "seconds": "s"}
"""Titles of the costs."""


def tables(rows: Sequence[Row], plan: Plan) -> list[Table]:
    """What came out at the budget, and what it cost to get where the reference got; 80 characters wide."""
    end = _table(f"after {plan.budget:g} {_words(plan.unit)}", "seeds", "reward", "p", "steps", *COLUMNS.values())
    for row in rows:
        costs = [_number(row.spent[unit]) if row.spent else "" for unit in COLUMNS]
        seeds = f"{row.finished}/{row.finished + len(row.failures)}"
        steps = f"{row.steps:.1f}" if row.finished else ""
        end.add_row(row.method, seeds, _cell(row.reward), _p(row.reward_p), steps, *costs)
    title = f"{_words(plan.unit)} until {plan.reference}'s reward, as a share of what {plan.reference} took"
    reach = _table(title, "share", "p", "by seed", "curve", f"<= {CLAIM:g}")
    for row in rows:
        got = [share for share in row.shares.values() if share is not None]
        below = ">= " if len(got) < len(row.shares) else ""
        each = " ".join("never" if share is None else f"{share:.2f}" for share in row.shares.values())
        curve = "never" if row.mean_curve_share is None else f"{row.mean_curve_share:.2f}"
        cells = (below + _cell(row.share), _p(row.share_p), each, curve if row.shares else "", row.claim)
        reach.add_row(row.method, *cells)
    return [end, reach]


def _table(title: str, *columns: str) -> Table:
    view = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    view.add_column("method", no_wrap=True)
    for column in columns:
        view.add_column(column, justify="right", max_width=15, no_wrap=column != "by seed")
    return view


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
            f"{plan.reference} ended NO BETTER than it began on seed {', '.join(map(str, flat))}: there is nothing to "
            "reach there, and it is left out of the shares."
        )
    if count := max(row.finished for row in rows):
        lines.append(
            f"Means over seeds with 95 % intervals; p against {plan.reference}, paired by seed: with {count} seeds the "
            f"exact sign-flip test knows none below {2 / 2**count:.4g}."
        )
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


def _cell(found: Interval | None) -> str:
    """The mean, and its interval below it."""
    if found is None:
        return ""
    around = "" if found.low is None or found.high is None else f"\n[{found.low:.2f}, {found.high:.2f}]"
    return f"{found.mean:.3f}{around}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f}k"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
