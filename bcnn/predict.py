"""The likeliest classes of photographs, from the command line or as a library."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bcnn.data.decoding import load_image
from bcnn.data.paths import find_images
from bcnn.errors import UserError
from bcnn.model.network import BCNN
from bcnn.model.weights import load_model
from bcnn.options import command
from bcnn.precision import AUTOCAST, fastest_precision
from bcnn.report.rows import FORMATS, Prediction

USAGE = """
The likeliest classes of photographs, and their probabilities.

python -m bcnn.predict ckpt=FILE PATH ... [OPTION=VALUE ...]

  ckpt=FILE        a checkpoint of this project's, or a .pth / .safetensors state dict
  PATH             a file; a folder, searched to the bottom; a pattern in quotes ("**/*.jpg");
                   - for a list on standard input, a file a line
  top=5            how many classes of each photograph
  format=table     table | jsonl | csv
  output=FILE      write there, not to standard output; FILE must not exist
  batch=16         photographs that pass the network together
  workers=N        processes that decode photographs; default: one a core, 8 at most

Rows come in the order of the paths, as they are computed. A photograph that cannot be read has a row
that says why, and the exit code is 1 in the end. Progress goes to standard error.
"""


@dataclass
class Options:
    """See the usage."""

    ckpt: Path
    paths: list[str] = field(default_factory=list)
    top: int = 5
    format: str = "table"
    output: Path | None = None
    batch: int = 16
    workers: int | None = None


def predict_paths(
    model: BCNN, paths: Sequence[str], top: int = 5, batch: int = 16, workers: int | None = None
) -> Iterator[Prediction]:
    """Predictions of photographs in their order, in the fastest precision of the model's device.

    Holds a few batches at a time, however long the list is.

    Args:
        model: as `load_model` returns it, on any device.
        top: number of classes a photograph, at most all.
        batch: photographs that pass the network together.
        workers: processes that decode; None: one a core, 8 at most.
    """
    if workers is None:
        workers = min(8, os.cpu_count() or 1)
    device = model.head.bias.device
    dtype = AUTOCAST.get(fastest_precision(device.type))
    loader = DataLoader(
        _Photographs(paths, model.framing.evaluation(), model.framing.side),
        batch_size=batch,
        num_workers=workers if len(paths) > batch else 0,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    for names, errors, images in loader:
        if images is not None:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                probabilities = model.predict(images)
            likeliest = probabilities.topk(min(top, len(model.classes)))
            found = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        for path, error in zip(names, errors, strict=True):
            if error:
                yield Prediction(path, error=error)
            else:
                indices, values = next(found)
                yield Prediction(path, [model.classes[k] for k in indices], values)


class _Photographs(Dataset[tuple[str, str, Tensor | None]]):
    """(path, error, image): a photograph that cannot be read has an error and no image."""

    def __init__(
        self, paths: Sequence[str], transform: Callable[[Image.Image], Tensor], side: int
    ) -> None:
        self.paths = paths
        self.transform = transform
        self.side = side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, str, Tensor | None]:
        path = self.paths[index]
        try:
            return path, "", self.transform(load_image(path, self.side)).as_subclass(Tensor)
        except Exception as error:  # whatever a decoder raises, the other photographs go on
            return path, str(error) or repr(error), None


def _collate(
    items: list[tuple[str, str, Tensor | None]],
) -> tuple[list[str], list[str], Tensor | None]:
    """Images that could be read as one tensor (batch, 3, size, size); None if there are none."""
    images = [image for _, _, image in items if image is not None]
    names, errors = [name for name, _, _ in items], [error for _, error, _ in items]
    return names, errors, torch.stack(images) if images else None


def main(options: Options) -> int:
    """Predict, and write a row a photograph."""
    _check(options)
    paths = find_images(options.paths)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(options.ckpt).to(device)
    top = min(options.top, len(model.classes))
    failed, start = 0, time.perf_counter()
    try:
        with _output(options.output) as out, _progress(out) as progress:
            write = FORMATS[options.format](out, model.classes, paths, top)
            task = progress.add_task("", total=len(paths), rate=0.0)
            for prediction in predict_paths(model, paths, top, options.batch, options.workers):
                write(prediction)
                out.flush()
                failed += bool(prediction.error)
                done = progress.tasks[task].completed + 1
                progress.update(task, completed=done, rate=done / (time.perf_counter() - start))
    except BrokenPipeError:  # who read the rows has read enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    seconds = time.perf_counter() - start
    say = Console(stderr=True, highlight=False).print
    say(f"{len(paths)} photographs in {seconds:.1f} s, {len(paths) / seconds:.1f} images/s")
    if failed:
        say(f"{failed} of them could not be read: their rows say why")
    return int(failed > 0)


def _check(options: Options) -> None:
    if options.format not in FORMATS:
        raise UserError(f"format={options.format}: choose from {', '.join(FORMATS)}")
    for name, least in (("top", 1), ("batch", 1), ("workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"{name}={value}: {least} at least")
    if options.output and options.output.exists():
        raise UserError(f"output={options.output} exists: remove it or name another file")


def _output(path: Path | None) -> Any:
    """A text file to write to; file names that are no valid Unicode pass through as they are."""
    if path:
        try:
            return path.open("x", encoding="utf-8", errors="surrogateescape", newline="")
        except OSError as error:
            raise UserError(f"cannot write output={path}: {error.strerror}") from error
    return nullcontext(sys.stdout)


def _progress(out: TextIO) -> Progress:
    """Of images on standard error; rows that come on the terminal are progress enough."""
    return Progress(
        TextColumn("predicting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} images/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        disable=out.isatty() or not sys.stderr.isatty(),
    )


if __name__ == "__main__":
    sys.exit(command(Options, main, USAGE))
