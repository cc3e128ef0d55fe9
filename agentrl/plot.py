"""Learning curves as a PNG, of a run and of methods compared, through matplotlib (the extra ``plots``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentrl.equal_cost import Band
from agentrl.errors import UserError
from agentrl.stats import Estimate

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
_REWARD, _CALLS, _FAILURES, _BEFORE, _AFTER = "#0072B2", "#009E73", "#D55E00", "#7F7F7F", "#000000"
_METHODS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_LINES = ("solid", (0, (5, 2)), (0, (1, 1)), (0, (5, 2, 1, 2)))
_STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def learning_curve(
    metrics: Sequence[Mapping[str, Any]],
    before: Estimate | None,
    after: Estimate | None,
    path: Path | str,
    *,
    title: str = "Learning curve",
    smoothing: float = 0.8,
) -> Path:
    """Draw reward and tool use per step, and pass@k before and after with their intervals; 1000 x 600 pixels.

    Args:
        metrics: the lines of ``metrics.jsonl``; a step without a reward is passed over.
        before: estimate before training, drawn left of the first step.
        after: estimate after training, drawn right of the last step.
        path: where the PNG goes.
        title: heading of the figure.
        smoothing: weight in [0, 1) of the past in the smoothed line, an exponential mean without start-up bias.

    Raises:
        UserError: matplotlib is not installed, or no step has a reward.
    """
    steps, rewards = _series(metrics, "reward")
    if not steps:
        raise UserError(f"nothing to draw: none of {len(metrics)} metrics lines has a reward. Has a step been done?")
    with _figure() as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
        marker = "." if len(steps) < 20 else None
        top.plot(steps, rewards, color=_REWARD, alpha=0.4, linewidth=1, marker=marker, label="reward of the step")
        top.plot(steps, _smooth(rewards, smoothing), color=_REWARD, linewidth=2.2, label="smoothed")
        _draw_estimates(top, steps, before, after)
        top.set(ylabel="mean reward, pass@k", ylim=_extent([rewards, before, after]))
        top.set_title(title, fontsize=13, fontweight="bold", pad=30)
        top.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
        top.xaxis.get_major_locator().set_params(integer=True)
        _draw_tools(bottom, metrics)
        bottom.set_xlabel("training step")
        figure.align_ylabels()
        figure.savefig(path, format="png")
    return Path(path)


def cost_curves(
    bands: Mapping[str, Band], reference: str, path: Path | str, *, unit: str, title: str = "Equal cost"
) -> Path:
    """Draw reward against cost, a line and a band over seeds for each method; 1000 x 600 pixels.

    Args:
        bands: by method, the reference among them; one without points gets no line.
        reference: whose last value is drawn across, since the others are asked when they reach it.
        path: where the PNG goes.
        unit: what the cost is counted in, for the label of the axis.
        title: heading of the figure.

    Raises:
        UserError: matplotlib is not installed, or there is nothing to draw.
    """
    drawn = {method: band for method, band in bands.items() if band.cost}
    if not drawn:
        raise UserError("nothing to draw: no method has a reward on every seed.")
    with _figure() as figure:
        axes = figure.subplots()
        for number, (method, band) in enumerate(drawn.items()):
            color, line = _METHODS[number % len(_METHODS)], _LINES[number % len(_LINES)]
            axes.fill_between(band.cost, band.low, band.high, color=color, alpha=0.12, linewidth=0)
            axes.plot(band.cost, band.mean, color=color, linestyle=line, linewidth=2.2, label=method)
        if reference in drawn:
            axes.axhline(drawn[reference].mean[-1], color="#7F7F7F", linewidth=1, linestyle=(0, (1, 3)))
        axes.set(xlabel=f"{unit} so far", ylabel="mean reward on held-out tasks", xlim=(0, None))
        # Intervals of few seeds may reach far beyond the lines, which are what the scale is for.
        means = [value for band in drawn.values() for value in band.mean]
        ends = [value for band in drawn.values() for value in (*band.low, *band.high)]
        span = max(means) - min(means) or 0.2
        low, high = max(min(ends), min(means) - span / 2), min(max(ends), max(means) + span / 2)
        axes.set_ylim(low - 0.04 * span, high + 0.04 * span)
        axes.set_title(title, fontsize=13, fontweight="bold", pad=30)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
        figure.savefig(path, format="png")
    return Path(path)


@contextmanager
def _figure() -> Iterator[Any]:
    """A figure in our style, while the block lasts.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError('drawing needs matplotlib: pip install "agentrl[plots]"') from error
    # A Figure of its own draws with Agg and leaves pyplot's backend and open figures, which are the user's, alone.
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(10, 6), dpi=100, layout="constrained")


def _draw_estimates(axes: Any, steps: Sequence[int], before: Estimate | None, after: Estimate | None) -> None:
    """A bar at the mean over the interval, just outside of the steps, with the figures in the legend."""
    margin = max(1.0, 0.03 * (steps[-1] - steps[0]))
    for name, estimate, x, color, marker in (
        ("before", before, steps[0] - margin, _BEFORE, "o"),
        ("after", after, steps[-1] + margin, _AFTER, "D"),
    ):
        if estimate is None:
            continue
        e = estimate
        label = f"pass@{e.k} {name}: {e.value:.2f}  [{e.low:.2f}, {e.high:.2f}]"
        axes.axhline(e.value, color=color, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
        axes.errorbar(
            [x], [e.value], yerr=[[e.value - e.low], [e.high - e.value]], color=color, marker=marker, markersize=7,
            capsize=5, linewidth=1.8, linestyle="none", label=label,
        )  # fmt: skip


def _draw_tools(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Tool calls on the left scale, the share of failed ones on the right."""
    steps, calls = _series(metrics, "tools/call_frequency")
    axes.plot(steps, calls, color=_CALLS, linewidth=1.6)
    axes.set_ylabel("tool calls\nper episode", color=_CALLS)
    axes.set_ylim(0, max([1.0, *calls]) * 1.15)
    steps, failures = _series(metrics, "tools/failure_frequency")
    right = axes.twinx()
    right.plot(steps, [100 * share for share in failures], color=_FAILURES, linewidth=1.6)
    right.set_ylabel("failed calls (%)", color=_FAILURES)
    right.set_ylim(0, max([0.1, *failures]) * 115)
    right.spines["right"].set_visible(True)
    right.grid(False)


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have a value under ``name``."""
    found = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float], weight: float) -> list[float]:
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + value, weight * norm + 1.0
        smoothed.append(total / norm)
    return smoothed


def _extent(parts: Sequence[Sequence[float] | Estimate | None]) -> tuple[float, float]:
    """Limits that hold everything, with some room, and at least the scale from 0 to 1."""
    values = [0.0, 1.0]
    for part in parts:
        if isinstance(part, Estimate):
            values += [part.low, part.high]
        elif part is not None:
            values += part
    room = 0.04 * (max(values) - min(values))
    return min(values) - room, max(values) + room
