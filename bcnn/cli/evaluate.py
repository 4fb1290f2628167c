"""`bcnn evaluate`: metrics of a trained model on labelled images, and a report."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bcnn.cli.arguments import Checkpoint, LabelledImages, Mirror, OutputFolder
from bcnn.utils.console import console, progress
from bcnn.utils.files import atomic_folder, make_way, new_output

if TYPE_CHECKING:
    import torch

    from bcnn.models.bilinear_cnn import BCNN

CHOICE = "That of the folder or list; without one, that of the checkpoint; else, for test, all images."
SPLIT = typer.Option(help=CHOICE)
UNKNOWN = typer.Option(exists=True, help="Images of none of the classes: how many are marked as such?")


def evaluate(
    ckpt: Checkpoint,
    images: LabelledImages,
    split: Annotated[Literal["test", "val", "train", "all"], SPLIT] = "test",
    mirror: Mirror = False,
    unknown: Annotated[Path | None, UNKNOWN] = None,
    output: OutputFolder = None,
) -> None:
    """Measure a model on labelled images, with 95 % intervals, and write a report.

    Classes are matched by name. Broken files are left out and counted. test and val leave out the
    images that the model was trained on, and test also those that it was validated on.

    Writes report.html, figures.json, classes.csv (precision and recall of each class),
    predictions.csv and predictions.npz (every probability).
    """
    folder = output or new_output("evaluate")
    make_way(folder)
    with progress("loading PyTorch"):
        from bcnn.evaluation import levels, results
        from bcnn.evaluation.inference import predict_split
        from bcnn.evaluation.report import ReportContent
        from bcnn.utils.device import best_device
        from bcnn.utils.environment import software

    versions = software()  # before anything is computed: the clone may change meanwhile
    data, samples, model = results.open_split(ckpt, images, split)
    device, loader = best_device(), data.evaluation_dataloader(samples)
    predictions = predict_split(model.to(device), samples, loader, mirror=mirror)
    digests = [data.digests[path] for path in predictions.paths]
    predictions = replace(predictions, digests=digests, split=split)
    console.print(results.headline_table(predictions, f"{images}, {split}"))
    console.print(results.weakest_table(predictions))
    if model.taxonomy:
        console.print(levels.levels_table(predictions, model.taxonomy))
    facts = _facts(model, device) | {
        "images": f"{images.absolute()}, split {split}",
        "checkpoint": str(ckpt.absolute()),
        **versions,
    }
    last = ckpt.parent.parent / "last"
    before = results.kept_predictions(last) if ckpt.parent.name == "finetune" else None
    found = results.predict_unknown(model, unknown, data, predictions, mirror) if unknown else None
    if found:
        console.print(results.unknown_table(*found, str(unknown)))
    title, stages = f"{images.resolve().name}, {split}", results.logged_stages(ckpt)
    content = ReportContent(predictions, title, stages, facts=facts, unknown=found, before=before)
    with atomic_folder(folder) as part:
        report = results.write_results(part, model, content)
    console.print(f"figures and predictions: {folder}\nreport: {folder / report.name}")


def _facts(model: "BCNN", device: "torch.device") -> dict[str, str]:
    """Return how the evaluation was made, for its report."""
    from bcnn.utils.device import about_device, fastest_precision

    return {
        "command": shlex.join(["bcnn", *sys.argv[1:]]),
        "preprocessing": str(model.preprocessing),
        "trained on": f"{len(model.split.train)} different images" if model.split else "not recorded",
        "computed on": about_device(device, fastest_precision(device.type), ranks=1),
    }
