"""Progress for people: a live bar on a terminal, a line now and then in a log file, and a table of training steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column as Cell

LOG_EVERY = 15.0
"""Seconds between two lines where there is no terminal."""
TITLE_EVERY = 25
"""Rows of the table of training steps below each line of titles."""

console = Console(soft_wrap=True)


class Advance(Protocol):
    """Report ``steps`` more done, what to show beside the bar, and lines to leave above it."""

    def __call__(self, steps: int = 1, note: str = "", lines: str = "") -> None:
        """Move the bar."""
        ...


@contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar from ``done`` to ``total``; call what it yields to move it."""
    show = _live_bar if sys.stdout.isatty() else _log_lines
    with show(title, total, done) as advance:
        yield advance


@contextmanager
def _live_bar(title: str, total: int, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", table_column=Cell(no_wrap=True)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        # What does not fit is cut off, because a second line would make the bar jump.
        TextColumn("{task.fields[note]}", table_column=Cell(no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total, completed=done, note="")

        def advance(steps: int = 1, note: str = "", lines: str = "") -> None:
            if lines:
                bars.console.print(lines, markup=False, highlight=False)
            bars.update(task, advance=steps, note=note)

        yield advance


@contextmanager
def _log_lines(title: str, total: int, done: int) -> Iterator[Advance]:
    began = last = time.monotonic()
    latest, printed = "", -1

    def advance(steps: int = 1, note: str = "", lines: str = "") -> None:
        nonlocal done, last, latest, printed
        done += steps
        latest = note or latest
        if lines:
            print(lines, flush=True)
        elif time.monotonic() - last >= LOG_EVERY:
            last, printed = time.monotonic(), done
            print(f"{title}: {done}/{total}  {last - began:.0f} s  {latest}", flush=True)

    yield advance
    if printed != done:
        print(f"{title}: {done}/{total}  {time.monotonic() - began:.0f} s  {latest}", flush=True)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table of steps.

    Attributes:
        title: what stands above it.
        width: characters of its cells, the title's at least.
        form: how the numbers are written.
        keys: the metrics that it shows, one for each number of ``form``.
    """

    title: str
    width: int
    form: str
    keys: tuple[str, ...]

    def cell(self, metrics: Mapping[str, float | None]) -> str | None:
        """What to show of ``metrics``; None where one of them was not measured."""
        values = [value for key in self.keys if (value := metrics.get(key)) is not None]
        return self.form.format(*values) if len(values) == len(self.keys) else None


COLUMNS = (
    Column("reward", 6, "{:.3f}", ("reward",)),
    Column("entropy", 7, "{:.3f}", ("entropy",)),
    Column("clip -/+", 9, "{:.1%}/{:.1%}", ("clip_ratio/low_mean", "clip_ratio/high_mean")),
    Column("KL step", 7, "{:.1g}", ("approx_kl",)),
    Column("KL ref", 7, "{:.2g}", ("kl",)),
    Column("adv -/+", 8, "{:.1f}/{:.1f}", ("advantage/min", "advantage/max")),
    Column("sd", 4, "{:.2f}", ("advantage/std",)),
    Column("groups", 6, "{:.0f}", ("num_groups/effective",)),
    Column("leaves", 6, "{:.0f}", ("num_trajectories/effective",)),
    Column("gap", 5, "{:.0e}", ("sampling/sampling_logp_difference/mean",)),
)
"""What tells whether a run goes well; ``metrics.jsonl`` has the rest. 80 characters without the KL to a reference.

``clip -/+``: share of tokens whose ratio was clipped from below and from above. ``KL step``: to the policy that
sampled. ``KL ref``: to the reference policy, where there is a penalty. ``adv -/+`` and ``sd``: range and standard
deviation of the advantages. ``groups`` and ``leaves``: with an advantage, after all filters. ``gap``: the mean
difference between the log-probs of the sampler and the learner.
"""


class StepTable:
    """A row for each training step, and titles above the first, where a column is new, and every so many rows.

    A column appears when its metrics are first measured; later steps without them leave it blank.

    Args:
        steps: the number of the last step, which sets the width of the first column.
    """

    def __init__(self, steps: int) -> None:
        self._digits = max(len(str(steps)), len("step"))
        self._shown: list[Column] = []
        self._rows = 0

    def row(self, step: int, metrics: Mapping[str, float | None], remark: str = "") -> str:
        """The line of ``step``, with a line of titles above it where one is due.

        Args:
            step: its number.
            metrics: what was measured.
            remark: what has to be said aloud, at the end of the line.
        """
        cells = {column: cell for column in COLUMNS if (cell := column.cell(metrics)) is not None}
        shown = [column for column in COLUMNS if column in cells or column in self._shown]
        titled = shown != self._shown or self._rows % TITLE_EVERY == 0
        self._rows = 1 if titled else self._rows + 1
        self._shown = shown
        line = self._line(str(step), {column: cells.get(column, "") for column in shown})
        line += f"  {remark}" if remark else ""
        return self._line("step", {column: column.title for column in shown}) + "\n" + line if titled else line

    def _line(self, first: str, cells: Mapping[Column, str]) -> str:
        words = (f"{text:>{column.width}}" for column, text in cells.items())
        return "  ".join([f"{first:>{self._digits}}", *words]).rstrip()
