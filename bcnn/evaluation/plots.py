"""Plots of training curves, calibration and swept options: PNG files, or SVG for a page."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bcnn.evaluation.metrics import Array
from bcnn.utils.files import atomic_write

TITLES = {"loss": "cross-entropy", "top1": "top-1"}

STYLE = Path(__file__).with_name("templates") / "plots.mplstyle"
# An SVG is drawn in these colours, which `_svg` replaces by those of the page's style sheet.
PAGE = {"#000001": "ink", "#000002": "soft", "#000003": "line", "#000004": "hit", "#000005": "miss"}
_, SOFT, _, HIT, MISS = PAGE


def plot_curves(metrics_csv: Path, picture: Path) -> None:
    """Plot loss and top-1 over the epochs (or λ) of a stage, as a PNG; nothing if none was logged."""
    if figure := _curves([(title, metrics_csv, metric) for metric, title in TITLES.items()]):
        with atomic_write(picture) as part:
            figure.savefig(part, dpi=120)


def curves_svg(stages: Sequence[tuple[str, Path]], metric: str) -> str:
    """Plot a metric over the epochs (or λ) of the stages (name, metrics.csv); "" if none logged it."""
    with rc_context(fname=STYLE):
        figure = _curves([(name, path, metric) for name, path in stages], sharey=True)
        if not figure:
            return ""
        figure.axes[0].set_ylabel(TITLES[metric])
        return _svg(figure)


def calibration_svg(images: Array, confidence: Array, accuracy: Array) -> str:
    """Plot accuracy over confidence, a dot per bin whose area is its share of the images."""
    with rc_context(fname=STYLE):
        figure = Figure(figsize=(4.4, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=SOFT, lw=1, ls=(0, (3, 3)))
        axes.vlines(confidence, confidence, accuracy, color=MISS, lw=1.5)
        sizes = 20 + 400 * images / images.sum()
        axes.scatter(confidence, accuracy, sizes, color=HIT, alpha=0.85, zorder=3, clip_on=False)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid()
        return _svg(figure)


def selective_svg(answered: Array, accuracy: Array) -> str:
    """Plot the accuracy of the most confident images over their share of all."""
    with rc_context(fname=STYLE):
        figure = Figure(figsize=(4.4, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(answered, accuracy, color=HIT, lw=1.6)
        axes.set(xlabel="share of images answered", ylabel="accuracy of these", xlim=(0, 1))
        axes.set_ylim(min(0.98, accuracy[len(accuracy) // 20 :].min()), 1.002)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        axes.grid()
        return _svg(figure)


def option_svg(name: str, values: Sequence[str], top1: Sequence[float]) -> str:
    """Plot validation top-1 over the values of an option, a dot per configuration, the best one first.

    A line connects the means of numbers that repeat; other values have no order.
    """
    texts, places = np.unique(values, return_inverse=True)
    try:
        x = np.array(values, float)
        numeric = np.isfinite(x).all()
    except ValueError:
        numeric = False
    if not numeric:
        x = places.astype(float)
    distinct, jobs = np.unique(x, return_inverse=True)
    with rc_context(fname=STYLE):
        figure = Figure(figsize=(4.4, 2.8), layout="constrained")
        axes = figure.subplots()
        if numeric:
            _numeric_axis(axes, distinct)
        else:
            axes.set_xticks(distinct, [text if len(text) <= 14 else f"{text[:13]}…" for text in texts])
            axes.set_xlim(-0.5, len(texts) - 0.5)
        if numeric and len(distinct) < len(values):
            means = np.bincount(jobs, top1) / np.bincount(jobs)
            axes.plot(distinct, means, color=SOFT, lw=1.2, zorder=1)
        axes.scatter(x[1:], top1[1:], 30, color=HIT, alpha=0.7, lw=0, zorder=2, clip_on=False)
        axes.scatter(x[:1], top1[:1], 44, color=MISS, lw=0, zorder=3, clip_on=False)
        axes.set(title=name, ylabel="validation top-1")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y")
        return _svg(figure)


def learning_svg(title: str, curves: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> str:
    """Plot named curves of (share of the training images, top-1, its low end, its high end)."""
    with rc_context(fname=STYLE):
        figure = Figure(figsize=(4.4, 2.8 + 0.2 * len(curves)), layout="constrained")
        axes = figure.subplots()
        looks = cycle(product(("-", "--", ":"), (HIT, MISS, SOFT)))
        for (name, points), (line, colour) in zip(curves.items(), looks, strict=False):
            x, y, low, high = np.array(sorted(points)).T
            axes.plot(x, y, color=colour, ls=line, marker="o", ms=4, lw=1.4, label=name)
            axes.vlines(x, low, high, color=colour, lw=1)
        _numeric_axis(axes, np.unique([share for each in curves.values() for share, *_ in each]))
        axes.set(xlabel="share of the training images", ylabel=title)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y")
        if len(curves) > 1:
            figure.legend(loc="outside lower left")
        return _svg(figure)


def _numeric_axis(axes: Axes, distinct: Array) -> None:
    """Mark up to six sorted numbers on the x axis, which is logarithmic where they span a decade."""
    above = distinct[distinct > 0]
    if distinct[0] >= 0 and len(above) and above[-1] >= 10 * above[0]:
        axes.set_xscale("symlog", linthresh=above[0])  # 0 is a decade below the least
    if len(distinct) <= 6:
        axes.set_xticks(distinct, [f"{number:g}" for number in distinct])
        axes.minorticks_off()


def _curves(logs: Sequence[tuple[str, Path, str]], sharey: bool = False) -> Figure | None:
    """Draw a panel for each (title, metrics.csv, metric) that was logged; None where none was.

    Each step of the convex stage is the optimum for one λ, which is then on the axis.
    """
    panels = [(title, metric, _columns(path)) for title, path, metric in logs]
    panels = [panel for panel in panels if {f"train_{panel[1]}", f"val_{panel[1]}"} & set(panel[2])]
    if not panels:
        return None
    figure = Figure(figsize=(5 if sharey else 4.5 * len(panels), 3), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=sharey, squeeze=False)[0]
    for axes, (title, metric, columns) in zip(grid, panels, strict=True):
        for split, colour in (("train", "C0"), ("val", "C1")):
            if curve := columns.get(f"{split}_{metric}"):
                axes.plot(*zip(*curve, strict=True), "o-", ms=3, lw=1.6, color=colour, label=split)
        if weights := columns.get("l2", []):
            labelled = weights[:: -(-len(weights) // 5)]  # more labels would overlap
            ticks = [(number, f"{weight:.2g}") for number, weight in labelled]
            axes.set_xticks(*zip(*ticks, strict=True))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set(title=title, xlabel="λ, weight of ‖W‖²/2" if weights else "epoch")
        axes.grid(axis="y")
        if metric == "top1":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
    handles = {line.get_label(): line for axes in grid for line in axes.lines}
    grid[-1].legend(handles=list(handles.values()))
    return figure


def _columns(metrics_csv: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (epoch, or number of λ; value) of what was logged, by column; epoch 0 is before step 1."""
    columns: dict[str, list[tuple[int, float]]] = {}
    lines = metrics_csv.read_text().splitlines() if metrics_csv.is_file() else []  # of a CSV logger
    for row in csv.DictReader(lines):
        position = int(row["epoch"]) + 1 if row.get("epoch") else 0
        if row.get("l2"):
            position = int(row["step"])
        for name, value in row.items():
            if value:
                columns.setdefault(name, []).append((position, float(value)))
    return columns


def _svg(figure: Figure) -> str:
    """Return the figure as an <svg> element in the colours of the page."""
    buffer = io.StringIO()
    none = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=none, transparent=True)
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return re.sub("|".join(PAGE), lambda colour: f"var(--{PAGE[colour[0]]})", svg)
