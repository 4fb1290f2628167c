"""How good a trained model is on labelled images: figures with 95 % intervals, and a report."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bcnn.data.decoding import load_image
from bcnn.data.folder import ImageFolderData
from bcnn.data.splits import choose
from bcnn.errors import UserError
from bcnn.explain import explain
from bcnn.model.network import BCNN
from bcnn.model.weights import load_model
from bcnn.options import command
from bcnn.precision import AUTOCAST, fastest_precision
from bcnn.report.files import write_figures
from bcnn.report.heatmap import overlay
from bcnn.report.metrics import NAMES, headline, per_class, shown
from bcnn.report.page import MISTAKES, THUMBNAIL, Evidence, write_report
from bcnn.report.predictions import Predictions

USAGE = """
How good a trained model is on labelled images: figures with 95 % intervals, and a report.

python -m bcnn.evaluate ckpt=FILE data=FOLDER [OPTION=VALUE ...]

  ckpt=FILE        a checkpoint of this project's, or a .pth / .safetensors state dict
  data=FOLDER      an image folder as for training, or a list of `path,label[,split]`; classes are
                   matched by name, broken files are left out and counted
  split=test       test | val | train | all: as the folder or the list has it, else as the checkpoint
                   records it, else (test) all images. Images that were trained on are left out of
                   test and val
  output=FOLDER    default: a new folder under outputs/; written there:
                     report.html       the whole, as one page that opens from disk
                     figures.json      the figures and their intervals
                     classes.csv       precision and recall of every class
                     predictions.csv   a row an image; predictions.npz has every probability

Top-1, top-5, precision and recall have Wilson intervals, macro top-1 Wilson's for an effective number
of images, and negative log-likelihood a t-interval; calibration error has none that would hold.
"""

SPLITS = ("test", "val", "train", "all")
STAGES = ("last", "finetune")


@dataclass
class Options:
    """See the usage."""

    ckpt: Path
    data: Path
    split: str = "test"
    output: Path | None = None


@torch.no_grad()
def predict_split(
    model: BCNN,
    samples: Sequence[tuple[str, int]],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    precision: str,
) -> Predictions:
    """The model's class probabilities for labelled images, with a progress bar.

    Args:
        model: moved to `device`, and left there in evaluation mode.
        samples: (path, label) of the images, in the order of `batches`.
        batches: of (inputs, labels); inputs are images, or descriptors (batch, 131328) that
            skip the features.
        precision: Lightning's name, as `fastest_precision` returns it.
    """
    model.to(device).eval()
    dtype = AUTOCAST.get(precision)

    def probabilities(inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model.head(inputs) if inputs.ndim == 2 else model(inputs)
        return logits.float().softmax(dim=1).cpu()

    shown = track(batches, "predicting", console=Console(stderr=True), transient=True)
    parts = [probabilities(inputs.to(device)) for inputs, _ in shown]
    paths, labels = zip(*samples, strict=True)
    return Predictions(model.classes, list(paths), torch.tensor(labels), torch.cat(parts))


def evidence_pictures(model: BCNN, predictions: Predictions) -> dict[int, Evidence]:
    """What spoke for the wrong class, and for the right one, in the mistakes that the report shows.

    Both pictures of an image have one scale of colours.

    Args:
        model: whose predictions these are, in evaluation mode, on any device.
    """
    pictures: dict[int, Evidence] = {}
    mistakes = predictions.confident_mistakes(MISTAKES)
    for index in track(mistakes, "explaining", console=Console(stderr=True), transient=True):
        photograph = load_image(predictions.paths[index], model.framing.side)
        called, truth = int(predictions.predicted[index]), int(predictions.labels[index])
        found = explain(model, photograph, called, against=truth)
        maps = [found.evidence.numpy(), (found.evidence - found.contrast).numpy()]
        limit = max(float(abs(shares).max()) for shares in maps) or 1.0
        small = photograph.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        scale = small.width / photograph.width
        left, top, right, bottom = (edge * scale for edge in found.box)
        wrong, right_one = (overlay(small, (left, top, right, bottom), m, limit) for m in maps)
        pictures[index] = (wrong, right_one)
    return pictures


def write_results(
    folder: Path,
    model: BCNN,
    predictions: Predictions,
    title: str,
    stages: Sequence[tuple[str, Path]],
    configuration: str,
) -> Path:
    """The report and the files of figures.

    Args:
        folder: made where there is none.
        model: whose predictions these are; its mistakes are explained.
        predictions: as `predict_split` returns them.
        title: of the report.
        stages: as for `write_report`.
        configuration: shown in the report as it is.

    Returns:
        The report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_figures(folder, predictions)
    report = folder / "report.html"
    evidence = evidence_pictures(model, predictions)
    write_report(report, predictions, title, stages, evidence, configuration)
    return report


def logged_stages(checkpoint: Path) -> list[tuple[str, Path]]:
    """Names and metrics.csv of the stages that led to a checkpoint, as its run left them beside it."""
    stage, run = checkpoint.parent.name, checkpoint.parent.parent
    before = STAGES[: STAGES.index(stage) + 1] if stage in STAGES else ()
    logs = [(name, run / name / "metrics.csv") for name in before]
    return [(name, path) for name, path in logs if path.is_file()]


def main(options: Options) -> int:
    """Predict the split, and print and write what came of it."""
    folder = _output(options)
    data, samples, model = _open(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = fastest_precision()
    loader = data.evaluation_dataloader(samples)
    predictions = predict_split(model, samples, loader, device, precision)
    console = Console(markup=False, emoji=False)  # names of classes are no markup
    console.print(_headline_table(predictions, f"{options.data}, {options.split}"))
    console.print(_weakest_table(predictions))
    title = f"{data.root.resolve().name}, {options.split}"
    settings = {
        **asdict(options),
        "framing": str(model.framing),
        "device": str(device),
        "precision": precision,
    }
    configuration = "\n".join(f"{name}: {value}" for name, value in settings.items())
    stages = logged_stages(options.ckpt)
    report = write_results(folder, model, predictions, title, stages, configuration)
    print(f"figures and predictions: {folder}\nreport: {report}")
    return 0


def _output(options: Options) -> Path:
    if options.split not in SPLITS:
        raise UserError(f"split={options.split}: choose from {', '.join(SPLITS)}")
    now = datetime.now()
    folder = options.output or Path(f"outputs/{now:%Y-%m-%d}/{now:%H-%M-%S-%f}-evaluate")
    if (folder / "figures.json").exists():
        raise UserError(f"{folder} holds an evaluation already: name another folder with output=…")
    return folder


def _open(options: Options) -> tuple[ImageFolderData, list[tuple[str, int]], BCNN]:
    """The images and the model, and the split's samples with the labels that the model uses."""
    place = {"list" if options.data.is_file() else "root": options.data}
    data = ImageFolderData(**place, broken="skip")  # type: ignore[arg-type]
    layout = data.labelled()
    names = sorted({layout.classes[label] for _, label in layout.samples})
    model = load_model(options.ckpt, names)
    data.framing = model.framing
    unknown = sorted(set(names) - set(model.classes))
    if unknown:
        raise UserError(
            f"{options.data} holds classes that {options.ckpt} does not know: {', '.join(unknown)}; "
            "remove their folders, or name them as in training"
        )
    samples, said = choose(layout, data.content, model.split, options.split)
    for sentence in said:
        print(sentence)
    if not samples:
        raise UserError(f"{options.data} has no images for split={options.split}: choose another split")
    return data, [(path, model.classes.index(layout.classes[k])) for path, k in samples], model


def _headline_table(predictions: Predictions, title: str) -> Table:
    table = Table("", "", "95 % interval", title=f"{title}: {len(predictions.paths)} images")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, figure in headline(predictions).items():
        table.add_row(NAMES[name], *shown(name, figure))
    return table


def _weakest_table(predictions: Predictions, count: int = 5) -> Table:
    table = Table("class", "images", "recall", "precision", title="weakest classes")
    present = [row for row in per_class(predictions) if row.images]
    for row in sorted(present, key=lambda row: row.recall.value)[:count]:
        precision = f"{row.precision.value:.1%}" if row.predicted else "–"
        table.add_row(row.name, str(row.images), f"{row.recall.value:.1%}", precision)
    return table


if __name__ == "__main__":
    sys.exit(command(Options, main, USAGE))
