"""Plots of training curves, calibration and swept options: PNG files, or SVG for a page."""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

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

Rows = list[dict[str, str]]


def plot_curves(metrics_csv: Path, picture: Path) -> None:
    """Plot loss and top-1 of training and validation over the epochs (or λ) of a stage, as a PNG.

    Epoch 0 is the validation before the first step. No file is written where nothing was logged.
    """
    rows = _rows(metrics_csv)
    panels = [(title, rows, metric) for metric, title in TITLES.items() if _logged(rows, metric)]
    if panels:
        figure = _curves(panels, ("tab:blue", "tab:orange"), sharey=False)
        with atomic_write(picture) as part:
            figure.savefig(part, dpi=120)


def curves_svg(stages: Sequence[tuple[str, Path]], metric: str) -> str:
    """Plot "loss" or "top1" over the epochs (or λ) of each stage that logged it; "" if none did.

    Args:
        stages: name and Lightning's metrics.csv of each.
        metric: "loss" or "top1".
    """
    logs = [(name, _rows(path), metric) for name, path in stages]
    panels = [panel for panel in logs if _logged(panel[1], metric)]
    if not panels:
        return ""
    with rc_context(fname=STYLE):
        figure = _curves(panels, (SOFT, HIT), sharey=True)
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


def option_svg(name: str, values: Sequence[str], top1: Sequence[float]) -> str:
    """Plot validation top-1 over the values of an option, a dot per job, the best of which comes first.

    If all values are numbers the axis is numeric, and logarithmic where they span a decade. Where jobs
    share a value, a line connects the means.
    """
    texts = sorted(set(values))
    try:
        positions = {text: float(text) for text in texts}
    except ValueError:
        positions = {}
    if not (numeric := bool(positions) and all(map(math.isfinite, positions.values()))):
        positions = {text: float(index) for index, text in enumerate(texts)}
    x = [positions[value] for value in values]
    at = {place: [y for p, y in zip(x, top1, strict=True) if p == place] for place in sorted(set(x))}
    with rc_context(fname=STYLE):
        figure = Figure(figsize=(4.4, 2.8), layout="constrained")
        axes = figure.subplots()
        if numeric:
            _scale(axes, list(at))
        else:
            names = [text if len(text) <= 14 else f"{text[:13]}…" for text in texts]
            axes.set_xticks(range(len(texts)), names)
            axes.set_xlim(-0.5, len(texts) - 0.5)
        if len(at) < len(values):
            axes.plot(list(at), [mean(each) for each in at.values()], color=SOFT, lw=1.2, zorder=1)
        axes.scatter(x[1:], top1[1:], 30, color=HIT, alpha=0.7, lw=0, zorder=2, clip_on=False)
        axes.scatter(x[:1], top1[:1], 44, color=MISS, lw=0, zorder=3, clip_on=False)
        axes.set_title(name)
        axes.set_ylabel("validation top-1")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y")
        return _svg(figure)


def _scale(axes: Axes, numbers: list[float]) -> None:
    """Make the axis logarithmic where ascending numbers span a decade."""
    above = [number for number in numbers if number > 0]
    if numbers[0] >= 0 and above and above[-1] >= 10 * above[0]:  # 0 is a decade below the least
        axes.set_xscale("symlog", linthresh=above[0])
    if len(numbers) <= 6:
        axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axes.minorticks_off()


def _curves(panels: Sequence[tuple[str, Rows, str]], colours: tuple[str, str], sharey: bool) -> Figure:
    """Draw panels of (title, rows, metric): training and validation over the epochs.

    Each epoch of the convex stage is the optimum for one λ, which is then on the axis.
    """
    figure = Figure(figsize=(5 if sharey else 4.5 * len(panels), 3), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=sharey, squeeze=False)[0]
    for axes, (title, rows, metric) in zip(grid, panels, strict=True):
        for split, colour in zip(("train", "val"), colours, strict=True):
            logged = [row for row in rows if row.get(f"{split}_{metric}")]
            if logged:
                y = [float(row[f"{split}_{metric}"]) for row in logged]
                axes.plot([*map(_epoch, logged)], y, "o-", ms=3, lw=1.6, color=colour, label=split)
        weights = {_epoch(row): f"{float(row['l2']):.2g}" for row in rows if row.get("l2")}
        if weights:
            step = -(-len(weights) // 5)  # more labels would overlap
            axes.set_xticks(list(weights)[::step], list(weights.values())[::step])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set(title=title, xlabel="λ, weight of ‖W‖²/2" if weights else "epoch")
        axes.grid(axis="y")
        if metric == "top1":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
    handles = {line.get_label(): line for axes in grid for line in axes.lines}
    grid[-1].legend(handles=list(handles.values()))
    return figure


def _rows(metrics_csv: Path) -> Rows:
    """Return what was logged; nothing where there was no CSV logger."""
    if not metrics_csv.is_file():
        return []
    with metrics_csv.open() as file:
        return list(csv.DictReader(file))


def _logged(rows: Rows, metric: str) -> bool:
    return any(row.get(f"{split}_{metric}") for row in rows for split in ("train", "val"))


def _epoch(row: dict[str, str]) -> int:
    """Return the epoch, from 1 on; 0 is before the first step."""
    return int(row["epoch"]) + 1 if row.get("epoch") else 0


def _svg(figure: Figure) -> str:
    """Return the figure as an <svg> element in the colours of the page."""
    buffer = io.StringIO()
    none = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=none, transparent=True)
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return re.sub("|".join(PAGE), lambda colour: f"var(--{PAGE[colour[0]]})", svg)
