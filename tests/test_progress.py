"""The table of training steps: what it shows, what it leaves out, and that it fits a terminal."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from agentrl import progress
from agentrl.progress import COLUMNS, TITLE_EVERY, StepTable, progress_bar

PLAYED = {"reward": 0.4375, "entropy": 1.23456}
LEARNT = PLAYED | {
    "clip_ratio/low_mean": 0.004,
    "clip_ratio/high_mean": 0.0123,
    "approx_kl": -0.0012,
    "advantage/min": -1.75,
    "advantage/max": 2.5,
    "advantage/std": 0.98,
    "num_groups/effective": 28.0,
    "num_trajectories/effective": 214.0,
    "sampling/sampling_logp_difference/mean": 2.2e-7,
}


def test_a_row_under_its_titles():
    titles, row = StepTable(30).row(7, LEARNT).splitlines()
    assert titles == "step  reward  entropy   clip -/+  KL step   adv -/+    sd  groups  leaves    gap"
    assert row == "   7   0.438    1.235  0.4%/1.2%   -0.001  -1.8/2.5  0.98      28     214  2e-07"
    assert len(row) == 80


def test_what_was_not_measured_is_left_out():
    table = StepTable(30)
    titles, row = table.row(1, PLAYED | {"approx_kl": None}).splitlines()
    assert titles.split() == ["step", "reward", "entropy"]
    assert row.split() == ["1", "0.438", "1.235"]
    titles, row = table.row(2, LEARNT).splitlines()
    assert "KL step" in titles, "titles come again with a new column"
    bare = table.row(3, PLAYED | {"num_groups/effective": 28.0})
    assert "\n" not in bare
    assert bare.split() == ["3", "0.438", "1.235", "28"]
    assert bare.index("28") == row.index("28"), "a blank keeps its place"
    aloud = table.row(4, PLAYED, "NOTHING TO LEARN FROM")
    assert aloud == "   4   0.438    1.235  NOTHING TO LEARN FROM", "a remark is not pushed off the screen by blanks"
    assert "nan" not in bare + row
    assert "None" not in bare + row


def test_half_of_a_pair_is_not_shown():
    only_min = StepTable(3).row(1, {"reward": 0.5, "advantage/min": -1.0})
    assert only_min.split() == ["step", "reward", "1", "0.500"]


def test_titles_come_back():
    table = StepTable(1000)
    rows = [table.row(step, LEARNT) for step in range(1, 2 * TITLE_EVERY + 2)]
    assert [step for step, row in enumerate(rows) if "reward" in row] == [0, TITLE_EVERY, 2 * TITLE_EVERY]


def test_every_title_is_as_wide_as_its_cells():
    assert all(len(column.title) <= column.width for column in COLUMNS)


def test_a_log_has_every_line_and_a_last_one(capsys):
    with progress_bar("train (dapo)", 2) as advance:
        advance(1, "reward 0.1", "titles\nfirst")
        advance(1, "reward 0.2", "second")
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ["titles", "first", "second"]
    assert last.startswith("train (dapo): 2/2  ")
    assert last.endswith("  reward 0.2")


@pytest.mark.parametrize("width", [80, 100])
def test_a_terminal_keeps_the_lines_above_the_bar(monkeypatch, width):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, soft_wrap=True, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with progress_bar("train (tree_grpo)", 1000) as advance:
        table = StepTable(1000)
        for step in (1, 2):
            advance(1, "reward 0.438  calls 0.44", table.row(step, LEARNT))
    shown = screen.getvalue()
    assert shown.index("step  reward") < shown.index("   1   0.438") < shown.index("   2   0.438")
    bars = [part for part in shown.replace("\n", "\r").split("\r") if "2/1000" in part]
    assert bars
    assert all("reward 0.438" in bar for bar in bars), "the note is not squeezed out of the line"
