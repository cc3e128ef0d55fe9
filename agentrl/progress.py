"""Progress for people: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_EVERY = 15.0
"""Seconds between two lines where there is no terminal."""

console = Console(soft_wrap=True)


class Advance(Protocol):
    """Report ``steps`` more done, and what to show beside the bar."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Move the bar."""
        ...


@contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar from ``done`` to ``total``; call what it yields to move it."""
    if sys.stdout.isatty():
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(title, total=total, completed=done, note="")
            yield lambda steps=1, note="": bars.update(task, advance=steps, note=note)
    else:
        with _log_lines(title, total, done) as advance:
            yield advance


@contextmanager
def _log_lines(title: str, total: int, done: int) -> Iterator[Advance]:
    began = last = time.monotonic()
    latest, printed = "", -1

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last, latest, printed
        done += steps
        latest = note or latest
        if time.monotonic() - last >= LOG_EVERY:
            last, printed = time.monotonic(), done
            print(f"{title}: {done}/{total}  {last - began:.0f} s  {latest}", flush=True)

    yield advance
    if printed != done:
        print(f"{title}: {done}/{total}  {time.monotonic() - began:.0f} s  {latest}", flush=True)
