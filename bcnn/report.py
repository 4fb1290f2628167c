"""Figures from what a run logged: no model, no trainer."""

import csv
from pathlib import Path

from matplotlib.figure import Figure


def plot_curves(metrics_csv: Path, picture: Path) -> None:
    """Loss and top-1 of training and validation over the epochs, as a PNG.

    Epoch 0 is what a finetune starts from, validated before its first step.

    Args:
        metrics_csv: as Lightning's CSVLogger writes it.
        picture: the file to write.
    """
    with metrics_csv.open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "top1"), strict=True):
        for split, colour in (("train", "tab:blue"), ("val", "tab:orange")):
            points = [
                (int(row["epoch"]) + 1 if row["epoch"] else 0, float(row[f"{split}_{metric}"]))
                for row in rows
                if row.get(f"{split}_{metric}")
            ]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", ms=3, color=colour, label=split)
        axes.set(xlabel="epoch", title={"loss": "cross-entropy", "top1": "top-1"}[metric])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(picture, dpi=120)
