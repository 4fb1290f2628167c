"""Curves of what a run logged, and of how far its confidence can be trusted."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bcnn.report.metrics import Bin

TITLES = {"loss": "cross-entropy", "top1": "top-1"}

# Drawn in these colours, which no plot needs otherwise, and shown in those of the page's style sheet.
PAGE = {"#000001": "ink", "#000002": "soft", "#000003": "line", "#000004": "hit", "#000005": "miss"}
INK, SOFT, LINE, HIT, MISS = PAGE
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bcnn",
    "font.size": 10,
    "text.color": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlepad": 20,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "grid.color": LINE,
    "legend.frameon": False,
}

Point = tuple[int, float]


def plot_curves(metrics_csv: Path, picture: Path) -> None:
    """Loss and top-1 of training and validation over the epochs, as a PNG.

    Epoch 0 is what a finetune starts from, validated before its first step.

    Args:
        metrics_csv: as Lightning's CSVLogger writes it.
        picture: the file to write.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), TITLES, strict=True):
        _draw_curves(axes, [metrics_csv], metric, ("tab:blue", "tab:orange"))
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def curves_svg(stages: Sequence[tuple[str, Path]], metric: str) -> str:
    """`metric` ("loss" or "top1") over the epochs of one stage after the other.

    A dashed line marks where a stage hands over to the next.

    Args:
        stages: name and Lightning's metrics.csv of each.
        metric: "loss" or "top1".
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        ends = _draw_curves(axes, [path for _, path in stages], metric, (SOFT, HIT))
        for (name, _), start, end in zip(stages, [0, *ends], ends, strict=False):
            if start:
                axes.axvline(start, color=SOFT, lw=1, ls=(0, (3, 3)))
            middle = (start + end) / 2
            axes.text(middle, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", color=SOFT)
        axes.grid(axis="y", lw=0.6)
        if metric == "top1":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        return _svg(figure)


def calibration_svg(bins: Sequence[Bin]) -> str:
    """Accuracy over confidence, a dot a bin whose area is its share of the images."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=SOFT, lw=1, ls=(0, (3, 3)))
        filled = [each for each in bins if each.images]
        total = sum(each.images for each in filled)
        x = [each.confidence for each in filled]
        y = [each.accuracy for each in filled]
        axes.vlines(x, x, y, color=MISS, lw=1.5)
        sizes = [20 + 400 * each.images / total for each in filled]
        axes.scatter(x, y, sizes, color=HIT, alpha=0.85, zorder=3, clip_on=False)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(lw=0.6)
        return _svg(figure)


def _draw_curves(axes: Axes, files: Sequence[Path], metric: str, colours: tuple[str, str]) -> list[int]:
    """Training and validation over the epochs of each file, each from where the last one ended.

    Returns:
        The last epoch of each file.
    """
    ends: list[int] = []
    for file in files:
        start = ends[-1] if ends else 0
        ends.append(start)
        for split, colour in zip(("train", "val"), colours, strict=True):
            points = [(start + epoch, value) for epoch, value in _points(file, f"{split}_{metric}")]
            label = split if len(ends) == 1 else None
            if points:
                axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.6, color=colour, label=label)
                ends[-1] = max(ends[-1], points[-1][0])
    axes.set(xlabel="epoch", title=TITLES[metric])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.legend()
    return ends


def _points(metrics_csv: Path, column: str) -> list[Point]:
    """(epoch, value) as logged; epoch 0 is before the first step."""
    with metrics_csv.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get(column)]
    return [(int(row["epoch"]) + 1 if row["epoch"] else 0, float(row[column])) for row in rows]


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element in the colours of the page."""
    buffer = io.StringIO()
    none = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=none, transparent=True)
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return re.sub("|".join(PAGE), lambda colour: f"var(--{PAGE[colour[0]]})", svg)
