from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from agentrl.equal_cost import Band
from agentrl.errors import UserError
from agentrl.plot import cost_curves, learning_curve
from agentrl.stats import Estimate

METRICS: list[dict[str, Any]] = [
    {"step": n, "reward": n / 40, "tools/call_frequency": 1.5, "tools/failure_frequency": 0.1} for n in range(1, 41)
]
BEFORE, AFTER = Estimate(1, 0.45, 0.39, 0.52, 64, 512), Estimate(1, 0.93, 0.9, 0.96, 64, 512)


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that ``learning_curve`` saves from now on."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved: list[Any] = []
    save = figure.savefig

    def savefig(self: Any, path: Path, **options: Any) -> None:
        saved.append(self)
        save(self, path, **options)

    monkeypatch.setattr(figure, "savefig", savefig)
    return saved


def test_the_png_is_readable_and_of_the_promised_size(tmp_path: Path) -> None:
    path = learning_curve(METRICS, BEFORE, AFTER, tmp_path / "curve.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1000, 600)


def test_it_shows_the_curve_and_both_estimates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = drawn(monkeypatch)
    learning_curve(METRICS, BEFORE, AFTER, tmp_path / "curve.png", title="gazetteer")
    (figure,) = saved
    top, bottom, right = figure.axes
    assert top.get_title() == "gazetteer"
    assert list(top.lines[0].get_ydata()) == [row["reward"] for row in METRICS]
    words = [text.get_text() for text in top.get_legend().get_texts()]
    assert "pass@1 before: 0.45  [0.39, 0.52]" in words
    assert "pass@1 after: 0.93  [0.90, 0.96]" in words
    assert bottom.get_xlabel() == "training step"
    assert [axes.get_ylabel() for axes in (top, bottom, right)] == [
        "mean reward, pass@k",
        "tool calls\nper episode",
        "failed calls (%)",
    ]
    assert list(right.lines[0].get_ydata()) == pytest.approx([10.0] * 40)


def test_everything_is_inside_of_the_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = drawn(monkeypatch)
    metrics = [{"step": 1, "reward": -2.5}, {"step": 2, "reward": 3.5}]
    learning_curve(metrics, None, None, tmp_path / "curve.png")
    low, high = saved[0].axes[0].get_ylim()
    assert low < -2.5
    assert high > 3.5


def test_the_smoothed_line_starts_without_bias_and_lags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = drawn(monkeypatch)
    learning_curve(METRICS, None, None, tmp_path / "curve.png", smoothing=0.5)
    smooth = list(saved[0].axes[0].lines[1].get_ydata())
    first, second = METRICS[0]["reward"], METRICS[1]["reward"]
    assert smooth[:2] == pytest.approx([first, (0.5 * first + second) / 1.5])


def test_a_step_without_a_reward_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = drawn(monkeypatch)
    learning_curve([*METRICS[:3], {"step": 4, "reward": None}, {"step": 5}], None, AFTER, tmp_path / "curve.png")
    assert list(saved[0].axes[0].lines[0].get_xdata()) == [1, 2, 3]


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of 1 metrics lines has a reward"):
        learning_curve([{"step": 1, "reward": None}], BEFORE, AFTER, tmp_path / "curve.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'pip install "agentrl\[plots\]"'):
        learning_curve(METRICS, BEFORE, AFTER, tmp_path / "curve.png")


# -- methods compared -------------------------------------------------------------------------------------------------

BANDS = {
    "group": Band([0.0, 50.0, 100.0], [0.2, 0.4, 0.7], [0.1, 0.2, 0.4], [0.3, 0.6, 1.0]),
    "tree": Band([0.0, 90.0], [0.2, 0.8], [-0.1, 0.7], [0.5, 0.9]),
    "lost": Band([], [], [], []),
}


def test_each_method_that_has_a_curve_gets_a_line_and_a_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = drawn(monkeypatch)
    path = cost_curves(BANDS, "group", tmp_path / "cost.png", unit="tool calls", title="gazetteer")
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1000, 600)
    axes = saved[0].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert {name: (list(lines[name].get_xdata()), list(lines[name].get_ydata())) for name in ("group", "tree")} == {
        name: (BANDS[name].cost, BANDS[name].mean) for name in ("group", "tree")
    }
    assert "lost" not in lines
    assert len(axes.collections) == 2
    assert lines["group"].get_color() != lines["tree"].get_color()
    assert (axes.get_xlabel(), axes.get_title()) == ("tool calls so far", "gazetteer")
    assert [list(line.get_ydata()) for line in axes.lines[2:]] == [[0.7, 0.7]], "where the reference ended"


def test_methods_without_a_curve_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no method has a reward on every seed"):
        cost_curves({"lost": BANDS["lost"]}, "lost", tmp_path / "cost.png", unit="tool calls")
