"""Figures and predictions as files that other programs read."""

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path

from bcnn.report.metrics import headline, per_class
from bcnn.report.predictions import Predictions


def write_figures(folder: Path, predictions: Predictions) -> None:
    """`figures.json`, `classes.csv`, `predictions.csv` and `predictions.npz` in an existing folder.

    Unknown ends of intervals are null in the JSON and empty in the CSV.
    """
    figures = {
        name: {key: None if math.isnan(number) else number for key, number in asdict(figure).items()}
        for name, figure in headline(predictions).items()
    }
    content = {"images": len(predictions.paths), **figures}
    (folder / "figures.json").write_text(json.dumps(content, indent=2) + "\n")
    _write_classes(folder / "classes.csv", predictions)
    _write_images(folder / "predictions.csv", predictions)
    predictions.save(folder / "predictions.npz")


def _write_classes(path: Path, predictions: Predictions) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        ends = [f"{name}{end}" for name in ("recall", "precision") for end in ("", "_low", "_high")]
        writer.writerow(["class", "images", "predicted", *ends])
        for row in per_class(predictions):
            numbers = [*asdict(row.recall).values(), *asdict(row.precision).values()]
            shown = ["" if math.isnan(number) else f"{number:.4f}" for number in numbers]
            writer.writerow([row.name, row.images, row.predicted, *shown])


def _write_images(path: Path, predictions: Predictions) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "predicted", "confidence", "of_class", "correct"])
        names = predictions.classes
        for image, label, called, confidence, of_truth in zip(
            predictions.paths,
            predictions.labels.tolist(),
            predictions.predicted.tolist(),
            predictions.confidence.tolist(),
            predictions.of_truth.tolist(),
            strict=True,
        ):
            shares = [f"{confidence:.6f}", f"{of_truth:.6f}"]
            writer.writerow([image, names[label], names[called], *shares, int(label == called)])
