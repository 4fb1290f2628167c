"""How good a trained model is on labelled images: the command."""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from bcnn.utils.errors import UserError
from bcnn.utils.files import new_output, refuse_unwritable
from bcnn.utils.options import command, program
from bcnn.utils.progress import progress
from bcnn.utils.terminal import Console, say

USAGE = """
How good a trained model is on labelled images: figures with 95 % intervals, and a report.

python -m bcnn.cli.evaluate ckpt=FILE data=FOLDER [OPTION=VALUE ...]

  ckpt=FILE        a checkpoint of this project's, or a .pth / .safetensors state dict
  data=FOLDER      an image folder as for training, or a list of `path,label[,split]`; classes are
                   matched by name, broken files are left out and counted
  split=test       test | val | train | all: as the folder or the list has it, else as the checkpoint
                   records it, else (test) all images. Images that were trained on are left out of
                   test and val
  mirror=false     true: of each image and its mirror image together; twice the time, often a bit better
  output=FOLDER    default: a new folder under outputs/; written there:
                     report.html       the whole, as one page that opens from disk
                     figures.json      the figures and their intervals
                     classes.csv       precision and recall of every class
                     predictions.csv   a row an image; predictions.npz has every probability

Top-1, top-5, precision and recall have Wilson intervals, macro top-1 Wilson's for an effective number
of images, and negative log-likelihood a t-interval; calibration error has none that would hold.
"""

SPLITS = ("test", "val", "train", "all")


@dataclass
class Options:
    """See the usage."""

    ckpt: Path
    data: Path
    split: str = "test"
    mirror: bool = False
    output: Path | None = None


def main(options: Options) -> int:
    """Predict the split, and print and write what came of it."""
    folder = _output(options)
    with progress("loading PyTorch"):  # takes seconds that --help and mistakes need not wait for
        from bcnn.evaluation import results as evaluation
        from bcnn.evaluation.inference import predict_split
        from bcnn.utils.device import about_device, best_device, fastest_precision
        from bcnn.utils.software import software

    made_with = software()
    data, samples, model = evaluation.open_split(options.ckpt, options.data, options.split)
    device = best_device()
    precision = fastest_precision(device.type)
    loader = data.evaluation_dataloader(samples)
    predictions = predict_split(model.to(device), samples, loader, mirror=options.mirror)
    console = Console()
    console.print(evaluation.headline_table(predictions, f"{options.data}, {options.split}"))
    console.print(evaluation.weakest_table(predictions))
    title = f"{data.root.resolve().name}, {options.split}"
    settings = {
        **asdict(options),
        "preprocessing": str(model.preprocessing),
        "device": str(device),
        "precision": precision,
    }
    configuration = "\n".join(f"{name}: {value}" for name, value in settings.items())
    given = (f"{name}={value}" for name, value in asdict(options).items() if value is not None)
    split = model.split
    facts = {
        "command": shlex.join([*program("evaluate"), *given]),
        "photographs": f"{options.data.absolute()}, split={options.split}",
        "seen at": str(model.preprocessing),
        "trained on": f"{len(split.train)} different images, by its record" if split else "not known",
        "computed on": about_device(device, precision, ranks=1),
        "checkpoint": str(options.ckpt.absolute()),
        **made_with,
    }
    stages = evaluation.logged_stages(options.ckpt)
    before = None
    if options.ckpt.parent.name == "finetune":
        before = evaluation.kept_predictions(options.ckpt.parent.with_name("last"))
    report = evaluation.write_results(
        folder, model, predictions, title, stages, configuration, facts=facts, before=before
    )
    say(f"figures and predictions: {folder}", f"report: {report}")
    return 0


def _output(options: Options) -> Path:
    if options.split not in SPLITS:
        raise UserError(f"split={options.split}: choose from {', '.join(SPLITS)}")
    folder = options.output or new_output("evaluate")
    if (folder / "figures.json").exists():
        raise UserError(f"{folder} holds an evaluation already: name another folder with output=…")
    refuse_unwritable(folder)
    return folder


if __name__ == "__main__":
    sys.exit(command(Options, main, USAGE))
