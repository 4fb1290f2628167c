"""The likeliest classes of photographs: the command."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from bcnn.data.paths import find_images
from bcnn.evaluation.writers import FORMATS
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, refuse_unwritable
from bcnn.utils.options import command
from bcnn.utils.progress import progress
from bcnn.utils.terminal import say

USAGE = """
The likeliest classes of photographs, and their probabilities.

python -m bcnn.cli.predict ckpt=FILE PATH ... [OPTION=VALUE ...]

  ckpt=FILE        a checkpoint of this project's, or a .pth / .safetensors state dict
  PATH             a file; a folder, searched to the bottom; a pattern in quotes ("**/*.jpg");
                   - for a list on standard input, a file a line
  top=5            how many classes of each photograph
  format=table     table | jsonl | csv | labelstudio: tasks to correct there, see docs/labels.md
  output=FILE      write there, once all is done, not to standard output; FILE must not exist
  mirror=false     true: of each photograph and its mirror image together; twice the time
  batch=N          photographs that pass the network together; default 16, 2 on a CPU in float32
  workers=N        processes that decode photographs; default: one a core, 16 at most

Rows come in the order of the paths, as they are computed. A photograph that cannot be read or predicted
has a row that says why, and the exit code is 1 in the end. Progress goes to standard error.
"""


@dataclass
class Options:
    """See the usage."""

    ckpt: Path
    paths: list[str] = field(default_factory=list)
    top: int = 5
    format: str = "table"
    output: Path | None = None
    batch: int | None = None
    workers: int | None = None
    mirror: bool = False


def main(options: Options) -> int:
    """Predict, and write a row a photograph."""
    _check(options)
    paths = find_images(options.paths)
    with progress("loading PyTorch"):  # takes seconds that --help and mistakes need not wait for
        from bcnn.evaluation.inference import open_model, predict_paths
        from bcnn.utils.device import best_device

    model = open_model(options.ckpt).to(best_device())
    top = min(options.top, len(model.classes))
    failed, start = 0, time.perf_counter()
    # Rows that come on the terminal are progress enough.
    with (
        _output(options.output) as out,
        progress("predicting", len(paths), show=not out.isatty()) as task,
        FORMATS[options.format](out, model.classes, paths, top) as write,
    ):
        of = top, options.batch, options.workers, options.mirror
        for prediction in predict_paths(model, paths, *of):
            write(prediction)
            out.flush()
            failed += bool(prediction.error)
            task.advance()
    seconds = time.perf_counter() - start
    rate = len(paths) / seconds
    say(f"{len(paths)} photographs in {seconds:.1f} s, {rate:.1f} images/s", file=sys.stderr)
    if failed:
        say(f"{failed} of them could not be read or predicted: their rows say why", file=sys.stderr)
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
    if options.output:
        refuse_unwritable(options.output.parent)


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """A text file to write to; file names that are no valid Unicode pass through as they are."""
    if path is None:
        yield sys.stdout
        return
    with (
        atomic_write(path) as part,
        part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as out,
    ):
        yield out


if __name__ == "__main__":
    sys.exit(command(Options, main, USAGE))
