"""Figures and predictions as files that other programs read."""

import csv
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bcnn.evaluation.metrics import headline, per_class
from bcnn.evaluation.predictions import Predictions
from bcnn.utils.cells import harmless
from bcnn.utils.files import atomic_write


def write_figures(folder: Path, predictions: Predictions) -> None:
    """`figures.json`, `classes.csv`, `predictions.csv` and `predictions.npz` in a folder.

    Unknown ends of intervals are null in the JSON and empty in the CSV, where names are `harmless`.

    Raises:
        UserError: a file cannot be written.
    """
    figures = {
        name: {key: None if math.isnan(number) else number for key, number in asdict(figure).items()}
        for name, figure in headline(predictions).items()
    }
    content = {"images": len(predictions.paths), **figures}
    with atomic_write(folder / "figures.json") as file:
        file.write_text(json.dumps(content, indent=2) + "\n")
    _write_classes(folder / "classes.csv", predictions)
    write_images(folder / "predictions.csv", predictions)
    with atomic_write(folder / "predictions.npz") as file:
        predictions.save(file)


def _write_classes(path: Path, predictions: Predictions) -> None:
    with table(path) as writer:
        ends = [f"{name}{end}" for name in ("recall", "precision") for end in ("", "_low", "_high")]
        writer.writerow(["class", "images", "predicted", *ends])
        for row in per_class(predictions):
            numbers = [*asdict(row.recall).values(), *asdict(row.precision).values()]
            shown = ["" if math.isnan(number) else f"{number:.4f}" for number in numbers]
            writer.writerow([harmless(row.name), row.images, row.predicted, *shown])


def write_images(path: Path, predictions: Predictions) -> None:
    """A row an image: its class and what it was called, with their probabilities; names `harmless`.

    Raises:
        UserError: the file cannot be written.
    """
    with table(path) as writer:
        writer.writerow(["path", "class", "predicted", "confidence", "of_class", "correct"])
        names = [harmless(name) for name in predictions.classes]
        for image, label, called, confidence, of_truth in zip(
            predictions.paths,
            predictions.labels.tolist(),
            predictions.predicted.tolist(),
            predictions.confidence.tolist(),
            predictions.of_truth.tolist(),
            strict=True,
        ):
            shares = [f"{confidence:.6f}", f"{of_truth:.6f}"]
            writer.writerow(
                [harmless(image), names[label], names[called], *shares, int(label == called)]
            )


@contextmanager
def table(path: Path) -> Iterator[Any]:
    """A csv.writer of a file that is whole or absent."""
    with (
        atomic_write(path) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        yield csv.writer(file)
