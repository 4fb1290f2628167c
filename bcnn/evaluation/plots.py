"""Curves of what a run logged, and of how far its confidence can be trusted."""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bcnn.evaluation.metrics import Bin
from bcnn.utils.files import atomic_write

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
    "axes.titlepad": 24,
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

Rows = list[dict[str, str]]


def plot_curves(metrics_csv: Path, picture: Path) -> None:
    """Loss and top-1 of training and validation over the epochs (or λ) of a stage, as a PNG.

    Epoch 0 is what a finetune starts from, validated before its first step. Nothing is written where
    nothing was logged.

    Args:
        metrics_csv: as Lightning's CSVLogger writes it.
        picture: the file to write.
    """
    rows = _rows(metrics_csv)
    metrics = [metric for metric in TITLES if _logged(rows, metric)]
    if not metrics:
        return
    figure = Figure(figsize=(4.5 * len(metrics), 3.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        _draw_curves(axes, rows, metric, ("tab:blue", "tab:orange"))
        axes.set_title(TITLES[metric])
        axes.legend()
        axes.grid(alpha=0.3)
    with atomic_write(picture) as part:
        figure.savefig(part, dpi=120)


def curves_svg(stages: Sequence[tuple[str, Path]], metric: str) -> str:
    """`metric` ("loss" or "top1") over the epochs (or λ) of each stage, a panel a stage.

    Stages that did not log it are left out; empty if none did.

    Args:
        stages: name and Lightning's metrics.csv of each.
        metric: "loss" or "top1".
    """
    logs = [(name, _rows(path)) for name, path in stages]
    logs = [(name, rows) for name, rows in logs if _logged(rows, metric)]
    if not logs:
        return ""
    with rc_context(STYLE):
        figure = Figure(figsize=(5, 3), layout="constrained")
        panels = figure.subplots(1, len(logs), sharey=True, squeeze=False)[0]
        for axes, (name, rows) in zip(panels, logs, strict=True):
            _draw_curves(axes, rows, metric, (SOFT, HIT))
            axes.text(
                0.5, 1.05, name, transform=axes.transAxes, ha="center", color=SOFT, parse_math=False
            )
            axes.grid(axis="y", lw=0.6)
        panels[0].set_title(TITLES[metric])
        lines = {line.get_label(): line for axes in panels for line in axes.lines}
        panels[-1].legend(handles=list(lines.values()))
        if metric == "top1":
            panels[0].set_ylim(top=min(1, panels[0].get_ylim()[1]))
            panels[0].yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
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


def option_svg(name: str, values: Sequence[str], top1: Sequence[float]) -> str:
    """Validation top-1 over the values of an option, a dot a job, a line through the means.

    Args:
        name: of the option.
        values: of the jobs, the best first, as text; numbers are put on an axis, which is logarithmic
            where they span decades.
        top1: of the jobs.
    """
    texts = list(dict.fromkeys(values))
    try:
        places = {text: float(text) for text in texts}
    except ValueError:
        places = {}
    numbers = bool(places) and all(map(math.isfinite, places.values()))
    if not numbers:
        texts.sort()
        places = {text: float(index) for index, text in enumerate(texts)}
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.8), layout="constrained")
        axes = figure.subplots()
        if numbers:
            _scale(axes, sorted(set(places.values())))
        else:
            names = [text if len(text) <= 14 else f"{text[:13]}…" for text in texts]
            axes.set_xticks(range(len(texts)), names, parse_math=False)
            axes.set_xlim(-0.5, len(texts) - 0.5)
        means = [
            (
                places[text],
                mean(share for value, share in zip(values, top1, strict=True) if value == text),
            )
            for text in sorted(texts, key=places.__getitem__)
        ]
        if len(texts) < len(values):  # a grid
            axes.plot(*zip(*means, strict=True), color=SOFT, lw=1.2, zorder=1)
        x = [places[value] for value in values]
        axes.scatter(x[1:], top1[1:], 30, color=HIT, alpha=0.7, lw=0, zorder=2, clip_on=False)
        axes.scatter(x[:1], top1[:1], 44, color=MISS, lw=0, zorder=3, clip_on=False)
        axes.set_title(name, pad=10, parse_math=False)
        axes.set_ylabel("validation top-1")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
        axes.grid(axis="y", lw=0.6)
        return _svg(figure)


def _scale(axes: Axes, numbers: list[float]) -> None:
    """Logarithmic where the numbers span a decade, zero a decade below the least."""
    above = [number for number in numbers if number > 0]
    if numbers[0] >= 0 and above and above[-1] >= 10 * above[0]:
        if numbers[0] > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=above[0], linscale=1)
    if len(numbers) <= 6:
        axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axes.minorticks_off()


def _draw_curves(axes: Axes, rows: Rows, metric: str, colours: tuple[str, str]) -> None:
    """Training and validation over the epochs; or over λ, where each epoch is the optimum for one."""
    for split, colour in zip(("train", "val"), colours, strict=True):
        logged = [row for row in rows if row.get(f"{split}_{metric}")]
        if logged:
            values = [float(row[f"{split}_{metric}"]) for row in logged]
            style: dict[str, Any] = {"ms": 3, "lw": 1.6, "color": colour, "clip_on": False}
            axes.plot([_epoch(row) for row in logged], values, "o-", label=split, **style)
    weights = {_epoch(row): _scientific(float(row["l2"])) for row in rows if row.get("l2")}
    if weights:
        step = -(-len(weights) // 5)  # more names would run into each other
        axes.set_xticks(list(weights)[::step], list(weights.values())[::step])
        axes.set_xlabel("λ, weight of ‖W‖²/2")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")


def _rows(metrics_csv: Path) -> Rows:
    """What was logged; nothing where the logger was left out."""
    if not metrics_csv.is_file():
        return []
    with metrics_csv.open() as file:
        return list(csv.DictReader(file))


def _logged(rows: Rows, metric: str) -> bool:
    return any(row.get(f"{split}_{metric}") for row in rows for split in ("train", "val"))


def _epoch(row: dict[str, str]) -> int:
    """Counted from 1; 0 is before the first step."""
    return int(row["epoch"]) + 1 if row.get("epoch") else 0


def _scientific(number: float) -> str:
    """1e-4 and 2.5e-3, also of numbers that went through float32."""
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element in the colours of the page."""
    buffer = io.StringIO()
    none = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=none, transparent=True)
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return re.sub("|".join(PAGE), lambda colour: f"var(--{PAGE[colour[0]]})", svg)
