"""The demo, as a user runs it: when does it start to train, how long does each phase take, how much memory?

Starts ``agentrl demo`` with the Python given and watches its run folder from outside:

- ``time to first trained step``: wall seconds from the start of the process until ``metrics.jsonl`` tells of the first
  update: imports, demonstrations, tokenizer, warm start and first evaluation included, ``pip install`` not.
- ``peak memory``: the most that the demo's own process held, by its ``result.json``. The sandbox's processes come on
  top, with about the memory of a bare Python each.
- ``phase ...``: wall seconds, by ``result.json``. ``whole job``: from start to exit.
- ``training step``, and ``update`` in it, without which it only plays: medians over the steps that trained.
- ``pass@1 before``, ``pass@1 after``: so that nobody reads the times of a run that did not learn.

    python benchmarks/demo.py [--python PYTHON] [--short] [--out DIR] [--json FILE] [--check] [-- --seed 1]

Everything after ``--`` goes to the demo.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from _bench import Row, parser, report

from agentrl.demo import read_result
from agentrl.trace import read_metrics

WHOLE_JOB = 480.0
"""Seconds the demo may take on 2 cores."""


def watch(command: Sequence[str], out: Path) -> tuple[float | None, float]:
    """Run the demo; seconds until its first trained step, if there is one, and until its end."""
    began = time.perf_counter()
    first: float | None = None
    with subprocess.Popen(command) as demo:
        while demo.poll() is None:
            if first is None and trained(out):
                first = time.perf_counter() - began
            time.sleep(0.05)
    total = time.perf_counter() - began
    if demo.returncode:
        sys.exit(f"the demo ended with status {demo.returncode}: {' '.join(command)}")
    return first, total


def trained(out: Path) -> list[dict[str, Any]]:
    """The metrics of the steps that made an update; a step whose groups were all won or all lost makes none."""
    steps = read_metrics(out) if (out / "metrics.jsonl").is_file() else []
    return [step for step in steps if "grad_norm" in step]


def results(out: Path, first: float | None, total: float, target: float | None) -> list[Row]:
    """The rows of a finished demo."""
    result, steps = read_result(out), trained(out)
    rows = [] if first is None else [Row("time to first trained step", first, "s")]
    rows.append(Row("peak memory", result["peak_memory_bytes"] / 2**20, "MiB"))
    rows.append(Row("whole job", total, "s", target))
    rows += [Row(f"phase {name}", seconds, "s") for name, seconds in result["seconds"].items()]
    if steps:
        rows.append(Row("training step", median(step["time/rollout"] + step["time/update"] for step in steps), "s"))
        rows.append(Row("update", median(step["time/update"] for step in steps), "s"))
    rows += [Row(f"pass@1 {when}", estimate_of(result[when], k=1), "") for when in ("before", "after")]
    return rows


def estimate_of(estimates: Sequence[dict[str, Any]], *, k: int) -> float:
    """The value of pass@k among ``estimates``."""
    return next(float(estimate["value"]) for estimate in estimates if estimate["k"] == k)


def main() -> int:
    words = parser(__doc__, rounds=None)
    words.add_argument("--python", default=sys.executable, help="a Python that has agentrl (this one)")
    words.add_argument("--short", action="store_true", help="the demo's short form")
    words.add_argument("--out", type=Path, help="keep the run folder here; default: a temporary one")
    words.add_argument("flags", nargs="*", help="passed on to the demo, after --")
    options = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out: Path = options.out or Path(folder) / "run"
        command = [options.python, "-m", "agentrl.cli", "demo", "--out", str(out), *options.flags]
        command += ["--short"] * options.short
        rows = results(out, *watch(command, out), None if options.short else WHOLE_JOB)
        notes = [] if trained(out) else ["No step made an update: in every group all answers were equally good."]
    return report("agentrl demo", rows, options, notes)


if __name__ == "__main__":
    sys.exit(main())
