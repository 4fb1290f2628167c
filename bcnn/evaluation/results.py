"""An evaluation: the split to evaluate, and the files and tables of its results."""

import json
import math
from dataclasses import asdict, astuple
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.image_files import find_images
from bcnn.data.splits import SplitRecord, choose
from bcnn.data.taxonomy import Taxonomy, is_of_folders
from bcnn.evaluation.answers import common_parent
from bcnn.evaluation.explain import explain_mistakes
from bcnn.evaluation.inference import open_model, predict_split
from bcnn.evaluation.levels import level_metrics
from bcnn.evaluation.metrics import (
    NAMES,
    Estimate,
    UnknownMetrics,
    as_text,
    displayed,
    headline,
    per_class,
    unknown_metrics,
)
from bcnn.evaluation.predictions import Predictions
from bcnn.evaluation.report import MISTAKES, THUMBNAIL, Before, ReportContent, write_report
from bcnn.evaluation.tables import write_csv
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.state_dict import read_state_dict
from bcnn.utils.console import logger
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, checkpoint_of

STAGES = ("last", "finetune")
PREDICTIONS = "predictions.npz"  # in the folder of a stage


def open_split(
    ckpt: Path, images: Path, split: str
) -> tuple[FineGrainedDataModule, list[tuple[str, int]], BCNN]:
    """Open a checkpoint and a split of an image folder or list, matching classes by name.

    Return the data module, (path, label of the model) of the images, and the model. The split is one of
    `bcnn.data.splits.choose`.
    """
    source: dict[str, Any] = {"list" if images.is_file() else "root": images}
    data = FineGrainedDataModule(**source, on_invalid_image="skip")
    data.nested = is_of_folders(read_state_dict(checkpoint_of(ckpt))[1].get("taxonomy"))
    index = data.checked_index()
    names = sorted({index.classes[label] for _, label in index.samples})
    model = open_model(ckpt, names)
    data.use_preprocessing(model.preprocessing)
    if unknown := sorted(set(names) - set(model.classes)):
        raise UserError(
            f"{images} holds classes that {ckpt} does not know: {', '.join(unknown)}; "
            "remove them, or name them as in training"
        )
    record = model.split or SplitRecord()
    samples, remarks = choose(index, record.recognise(data.findings), record, split)
    for remark in remarks:
        logger.info(remark)
    if not samples:
        raise UserError(f"{images} has no images for split={split}: choose another split")
    return data, [(path, model.classes.index(index.classes[k])) for path, k in samples], model


def write_results(folder: Path, model: BCNN, content: ReportContent) -> Path:
    """Write predictions, the report and, last, figures.json; return the report's path."""
    predictions, report = content.predictions, folder / "report.html"
    _write_classes(folder / "classes.csv", predictions)
    write_images(folder / "predictions.csv", predictions, model.taxonomy)
    predictions.save(folder / PREDICTIONS)
    pictures = explain_mistakes(model, predictions, predictions.confident_mistakes(MISTAKES), THUMBNAIL)
    write_report(report, content, pictures, model.taxonomy)
    figures: dict[str, object] = {"images": len(predictions.paths)}
    if content.unknown:
        figures["unknown"] = asdict(content.unknown[1]) | {"images": len(content.unknown[0].paths)}
    figures |= {key: _plain(estimate) for key, estimate in headline(predictions).items()}
    if model.taxonomy:
        figures["levels"] = [
            vars(each) | {"top1": _plain(each.top1), "near": _plain(each.near)}
            for each in level_metrics(predictions, model.taxonomy)
        ]
    with atomic_write(folder / "figures.json") as part:
        part.write_text(json.dumps(figures, indent=2) + "\n")
    return report


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {end: None if math.isnan(x) else x for end, x in asdict(estimate).items()}


def write_images(path: Path, predictions: Predictions, taxonomy: Taxonomy | None = None) -> None:
    """Write a CSV row per image: its class and the predicted one, with their probabilities.

    Of a calibrated model also the prediction set, and whether the image is unlike the training images.
    With a taxonomy, the deepest level on which the prediction is right.
    """
    heading = ["image", "class", "top1", "probability", "probability_of_class", "correct"]
    columns: tuple[list[Any], ...] = (
        predictions.paths,
        [predictions.classes[label] for label in predictions.labels.tolist()],
        [predictions.classes[label] for label in predictions.predicted.tolist()],
        [f"{share:.6f}" for share in predictions.confidence.tolist()],
        [f"{share:.6f}" for share in predictions.true_probability.tolist()],
        predictions.correct.int().tolist(),
    )
    if predictions.sets is not None and predictions.novelty is not None:
        heading += ["prediction_set", "unlike_training"]
        sizes = predictions.sets.sum(dim=1).tolist()  # a set is of the likeliest classes
        orders = (row.argsort(descending=True, stable=True) for row in predictions.probabilities)
        sets = [
            "; ".join(predictions.classes[k] for k in order[:size].tolist())
            for order, size in zip(orders, sizes, strict=True)
        ]
        marks = ["yes" if score > 0 else "no" for score in predictions.novelty.tolist()]
        columns = (*columns, sets, marks)
    if taxonomy:
        heading.append("right_level")
        pairs = zip(predictions.labels.tolist(), predictions.predicted.tolist(), strict=True)
        columns = (*columns, [common_parent(pair, taxonomy)[0] for pair in pairs])
    write_csv(path, heading, zip(*columns, strict=True))


def headline_table(predictions: Predictions, title: str) -> Table:
    """Return the metrics of all images with their intervals."""
    table = Table("", "", "95 % interval", title=f"{title}: {len(predictions.paths)} images")
    table.columns[1].justify = table.columns[2].justify = "right"
    for key, estimate in displayed(predictions).items():
        table.add_row(NAMES[key], *as_text(key, estimate))
    return table


def predict_unknown(
    model: BCNN, images: Path, data: FineGrainedDataModule, known: Predictions, mirror: bool = False
) -> tuple[Predictions, UnknownMetrics]:
    """Return predictions of images of no known class, whose labels mean nothing, and metrics."""
    if known.novelty is None:
        raise UserError("--unknown: this model is not calibrated, so that it cannot mark images")
    samples = [(path, 0) for path in find_images([str(images)])]
    unknown = predict_split(model, samples, data.evaluation_dataloader(samples), mirror=mirror)
    assert unknown.novelty is not None
    return unknown, unknown_metrics(known.novelty, unknown.novelty)


def unknown_table(unknown: Predictions, found: UnknownMetrics, title: str) -> Table:
    """Return how well images of no known class are separated from those of known classes."""
    table = Table("", "", title=f"{title}: {len(unknown.paths)} images of no known class")
    table.add_row("area under the ROC curve", f"{found.auroc:.3f}")
    table.add_row("accepted where 95 % of the known are", f"{found.fpr95:.1%}")
    table.add_row("accepted by the model's own limit", f"{found.accepted.value:.1%}")
    return table


def weakest_table(predictions: Predictions) -> Table:
    """Return the five classes of the lowest recall."""
    table = Table("class", "images", "recall", "precision", title="weakest classes")
    present = [row for row in per_class(predictions) if row.images]
    for row in sorted(present, key=lambda row: row.recall.value)[:5]:
        precision, _ = as_text("precision", row.precision)
        table.add_row(row.name, str(row.images), f"{row.recall.value:.1%}", precision)
    return table


def logged_stages(checkpoint: Path) -> list[tuple[str, Path]]:
    """Return names and metrics.csv of the stages that led to a checkpoint in the folder of a run."""
    stage, run = checkpoint.parent.name, checkpoint.parent.parent
    stages = STAGES[: STAGES.index(stage) + 1] if stage in STAGES else ()
    return [(name, log) for name in stages if (log := run / name / "metrics.csv").is_file()]


def kept_predictions(stage: Path) -> Before | None:
    """Return the name and the predictions of the stage with this folder, None where it has none."""
    file = stage / PREDICTIONS
    return (stage.name, Predictions.load(file)) if file.is_file() else None


def _write_classes(path: Path, predictions: Predictions) -> None:
    """Write `per_class` as CSV, unknown numbers as empty cells."""
    names = ("recall", "precision", "coverage")
    ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    rows = []
    for row in per_class(predictions):
        estimates = (row.recall, row.precision, row.coverage)
        numbers = [*chain(*map(astuple, estimates)), row.set_size]
        cells = ["" if math.isnan(number) else f"{number:.4f}" for number in numbers]
        rows.append([row.name, row.images, row.predicted, *cells])
    write_csv(path, ["class", "images", "predicted", *ends, "set_size"], rows)
