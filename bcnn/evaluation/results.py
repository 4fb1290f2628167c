"""What evaluation writes and prints: the report with its evidence, figures, tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from rich.table import Table

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.image_io import load_image
from bcnn.data.splits import choose
from bcnn.evaluation.figures import write_figures
from bcnn.evaluation.heatmap import framed, overlay, scaled
from bcnn.evaluation.inference import explain, open_model
from bcnn.evaluation.metrics import NAMES, headline, per_class, shown
from bcnn.evaluation.predictions import Predictions
from bcnn.evaluation.report import MISTAKES, THUMBNAIL, Before, Evidence, Neighbour, write_report
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.errors import UserError
from bcnn.utils.progress import track
from bcnn.utils.terminal import say

STAGES = ("last", "finetune")
PREDICTIONS = "predictions.npz"  # in the folder of a stage, or of a run


def open_split(
    ckpt: Path, images: Path, split: str
) -> tuple[FineGrainedDataModule, list[tuple[str, int]], BCNN]:
    """The images and the model, and the split's samples with the labels that the model uses."""
    place = {"list" if images.is_file() else "root": images}
    data = FineGrainedDataModule(**place, on_invalid_image="skip")  # type: ignore[arg-type]
    layout = data.labelled()
    names = sorted({layout.classes[label] for _, label in layout.samples})
    model = open_model(ckpt, names)
    data.preprocessing = model.preprocessing
    unknown = sorted(set(names) - set(model.classes))
    if unknown:
        raise UserError(
            f"{images} holds classes that {ckpt} does not know: {', '.join(unknown)}; "
            "remove their folders, or name them as in training"
        )
    samples, said = choose(layout, data.content, model.split, split)
    say(*said)
    if not samples:
        raise UserError(f"{images} has no images for split={split}: choose another split")
    return data, [(path, model.classes.index(layout.classes[k])) for path, k in samples], model


def evidence_pictures(model: BCNN, predictions: Predictions) -> dict[int, Evidence]:
    """What spoke for the wrong class, and for the right one, in the mistakes that the report shows.

    Both pictures of an image have one scale of colours.

    Args:
        model: whose predictions these are, in evaluation mode, on any device.
    """
    pictures: dict[int, Evidence] = {}
    mistakes = predictions.confident_mistakes(MISTAKES)
    for index in track(mistakes, "explaining mistakes"):
        photograph = load_image(predictions.paths[index], model.preprocessing.side)
        called, truth = int(predictions.predicted[index]), int(predictions.labels[index])
        found = explain(model, photograph, called, against=truth)
        maps = [found.evidence.numpy(), (found.evidence - found.contrast).numpy()]
        if not all(np.isfinite(shares).all() for shares in maps):
            continue  # of logits so large that their shares overflow
        limit = max(float(abs(shares).max()) for shares in maps) or 1.0
        small = photograph.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        scale = small.width / photograph.width
        crop, box = scaled(found.crop, scale), scaled(found.box, scale)
        wrong, right_one = (framed(overlay(small, box, m, limit), crop) for m in maps)
        pictures[index] = (wrong, right_one)
    return pictures


def write_results(
    folder: Path,
    model: BCNN,
    predictions: Predictions,
    title: str,
    stages: Sequence[tuple[str, Path]],
    configuration: str,
    held_out: Predictions | None = None,
    facts: Mapping[str, str] | None = None,
    before: Before | None = None,
    nearest: Mapping[int, Sequence[Neighbour]] | None = None,
) -> Path:
    """The report and the files of figures.

    Args:
        folder: made where there is none.
        model: whose predictions these are; its mistakes are explained.
        predictions: as `predict_split` returns them.
        title: of the report.
        stages, configuration, held_out, facts, before, nearest: as for `write_report`.

    Returns:
        The report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_figures(folder, predictions)
    report = folder / "report.html"
    evidence = evidence_pictures(model, predictions)
    known = (configuration, held_out, facts, before, nearest)
    write_report(report, predictions, title, stages, evidence, *known)
    return report


def logged_stages(checkpoint: Path) -> list[tuple[str, Path]]:
    """Names and metrics.csv of the stages that led to a checkpoint, as its run left them beside it."""
    stage, run = checkpoint.parent.name, checkpoint.parent.parent
    before = STAGES[: STAGES.index(stage) + 1] if stage in STAGES else ()
    logs = [(name, run / name / "metrics.csv") for name in before]
    return [(name, path) for name, path in logs if path.is_file()]


def kept_predictions(stage: Path) -> Before | None:
    """Name and predictions of the stage whose folder this is, where its run left them."""
    places = [stage]
    if stage.name == STAGES[0] and not (stage.parent / STAGES[1]).exists():
        places.append(stage.parent)  # of a run of this stage alone
    for place in places:
        try:
            return stage.name, Predictions.load(place / PREDICTIONS)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # none, or damaged
            continue
    return None


def headline_table(predictions: Predictions, title: str) -> Table:
    """The figures of the whole, with their intervals."""
    table = Table("", "", "95 % interval", title=f"{title}: {len(predictions.paths)} images")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, figure in headline(predictions).items():
        table.add_row(NAMES[name], *shown(name, figure))
    return table


def weakest_table(predictions: Predictions, count: int = 5) -> Table:
    """The classes of the lowest recall."""
    table = Table("class", "images", "recall", "precision", title="weakest classes")
    present = [row for row in per_class(predictions) if row.images]
    for row in sorted(present, key=lambda row: row.recall.value)[:count]:
        precision = f"{row.precision.value:.1%}" if row.predicted else "–"
        table.add_row(row.name, str(row.images), f"{row.recall.value:.1%}", precision)
    return table
