"""`bcnn evaluate`: metrics of a trained model on labelled images, and a report."""

import shlex
from typing import Annotated, Literal

import typer

from bcnn.cli.arguments import Checkpoint, LabelledImages, Mirror, OutputFolder
from bcnn.utils.console import console, progress
from bcnn.utils.errors import UserError
from bcnn.utils.files import new_output, validate_writable

SPLIT = typer.Option(
    help="As the folder or list has it, else as the checkpoint records it, else (test) all images."
)


def evaluate(
    ckpt: Checkpoint,
    images: LabelledImages,
    split: Annotated[Literal["test", "val", "train", "all"], SPLIT] = "test",
    mirror: Mirror = False,
    output: OutputFolder = None,
) -> None:
    """Measure a model on labelled images, with 95 % intervals, and write a report.

    Classes are matched by name. Broken files are left out and counted; test and val leave out the
    images that the model was trained on.

    Writes report.html, figures.json, classes.csv (precision and recall of each class),
    predictions.csv and predictions.npz (every probability).
    """
    folder = output or new_output("evaluate")
    if (folder / "figures.json").exists():
        raise UserError(f"--output {folder} holds an evaluation: name another folder")
    validate_writable(folder)
    with progress("loading PyTorch"):
        from bcnn.evaluation import results
        from bcnn.evaluation.inference import predict_split
        from bcnn.evaluation.report import ReportContent
        from bcnn.utils.device import about_device, best_device, fastest_precision
        from bcnn.utils.environment import software

    versions = software()  # before anything is computed: the clone may change meanwhile
    data, samples, model = results.open_split(ckpt, images, split)
    device = best_device()
    loader = data.evaluation_dataloader(samples)
    predictions = predict_split(model.to(device), samples, loader, mirror=mirror)
    console.print(results.headline_table(predictions, f"{images}, {split}"))
    console.print(results.weakest_table(predictions))
    trained_on = f"{len(model.split.train)} different images" if model.split else "not recorded"
    precision = fastest_precision(device.type)
    words = ["bcnn", "evaluate", str(ckpt), str(images), f"--split={split}", *["--mirror"] * mirror]
    facts = {
        "command": shlex.join(words),
        "images": f"{images.absolute()}, split {split}",
        "preprocessing": str(model.preprocessing),
        "trained on": trained_on,
        "computed on": about_device(device, precision, ranks=1),
        "checkpoint": str(ckpt.absolute()),
        **versions,
    }
    before = None
    if ckpt.parent.name == "finetune":
        before = results.kept_predictions(ckpt.parent.with_name("last"))
    title = f"{images.resolve().name}, {split}"
    stages = results.logged_stages(ckpt)
    content = ReportContent(predictions, title, stages, facts=facts, before=before)
    report = results.write_results(folder, model, content)
    console.print(f"figures and predictions: {folder}\nreport: {report}")
