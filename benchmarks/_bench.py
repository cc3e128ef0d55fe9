"""What the benchmarks share: clocks, interleaving, a table, JSON rows.

Speeds are compared as ratios inside one run, never with a number from another day: the contestants take turns, every
round gives one ratio, and the median over the rounds is reported. A machine that slows down slows both. An absolute
time is the median too, or, where its target is absolute, the best of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Better = Literal["lower", "higher"]


class Seconds(NamedTuple):
    """One measurement: CPU seconds of the whole process, which other people's load hardly moves, and wall seconds."""

    cpu: float
    wall: float


@dataclass(frozen=True, slots=True)
class Row:
    """One result.

    Attributes:
        name: what was measured.
        value: the figure.
        unit: its unit; ``x`` is a ratio.
        target: the bound it should keep; None where it is only reported.
        better: the side of the target that is good.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    better: Better = "lower"

    @property
    def ok(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target

    def to_json(self) -> dict[str, Any]:
        """The row as ``--json`` writes it."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "target": self.target,
            "better": self.better,
            "ok": self.ok,
        }


def measure(work: Callable[[], object]) -> Seconds:
    """Run ``work`` once."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def interleave(rounds: int, contestants: Mapping[str, Callable[[], Seconds]]) -> dict[str, list[Seconds]]:
    """Let the contestants, who have warmed up, take turns.

    Args:
        rounds: measurements per contestant.
        contestants: each runs its work and says what it took.
    """
    taken: dict[str, list[Seconds]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            taken[name].append(contestant())
    return taken


def typical(taken: Sequence[Seconds]) -> Seconds:
    """The medians."""
    return Seconds(median(t.cpu for t in taken), median(t.wall for t in taken))


def best(taken: Sequence[Seconds]) -> Seconds:
    """The minima: for absolute times, which other people's load can only lengthen."""
    return Seconds(min(t.cpu for t in taken), min(t.wall for t in taken))


def ratio(ours: Sequence[Seconds], theirs: Sequence[Seconds]) -> Seconds:
    """The medians of ours over theirs, round by round."""
    pairs = list(zip(ours, theirs, strict=True))
    return Seconds(median(a.cpu / b.cpu for a, b in pairs), median(a.wall / b.wall for a, b in pairs))


def parser(description: str | None, *, rounds: int | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes.

    Args:
        description: the module's docstring.
        rounds: default measurements of each contestant; None where nothing is repeated.
    """
    words = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    words.add_argument("--check", action="store_true", help="exit with status 1 where a target is missed")
    if rounds is not None:
        words.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each contestant ({rounds})")
    return words


def report(title: str, rows: Sequence[Row], options: argparse.Namespace, notes: Sequence[str] = ()) -> int:
    """Print the table, write the JSON; the exit status."""
    table = Table("measured", "value", "target", "", title=title, title_justify="left")
    for column in (1, 2):
        table.columns[column].justify = "right"
    verdicts = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}
    for row in rows:
        bound = "" if row.target is None else f"{'<=' if row.better == 'lower' else '>='} {row.target:g} {row.unit}"
        table.add_row(escape(row.name), f"{row.value:.4g} {row.unit}", bound, verdicts[row.ok])
    console = Console()
    console.width = max(console.width, 110)  # a log file has 80 columns, which would break names
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    rounds = f", {options.rounds} rounds" if "rounds" in options else ""
    console.print(f"{os.cpu_count()} cores, load {load}{rounds}", highlight=False)
    if options.json is not None:
        options.json.write_text(json.dumps([row.to_json() for row in rows], indent=2) + "\n")
    return int(options.check and any(row.ok is False for row in rows))


def tiny_qwen3(positions: int = 1024) -> Any:
    """A Qwen3 of 1.1 M parameters with random weights, the shape that the TRL peer uses. The seed is fixed.

    Args:
        positions: longest sequence, in tokens.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=1000,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
