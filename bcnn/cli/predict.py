"""`bcnn predict`: the likeliest classes of images."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, TextIO

import typer

from bcnn.cli.arguments import Checkpoint, Group, Images, Mirror
from bcnn.utils.console import error_console, progress, track
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, validate_writable

FORMAT = typer.Option(help="labelstudio: tasks to correct there, see docs/labels.md.")
OUTPUT = typer.Option(help="New file to write once all is done. Default: standard output.")
COVERAGE = typer.Option(
    min=0.01, max=0.999, help="Share of images whose true class is in their prediction set."
)
SURE = typer.Option(min=0.01, max=0.999, help="Least probability of a sure name. Default: 0.9.")
BY = typer.Option(help="group: one answer a group, by the mean of its images' logits.")
WORKERS = typer.Option(min=0, help="Processes that decode. Default: one a core, at most 16.")


def predict(
    ckpt: Checkpoint,
    images: Images,
    top_k: Annotated[int, typer.Option(min=1, help="Classes of each image.")] = 5,
    format: Annotated[Literal["table", "jsonl", "csv", "labelstudio"], FORMAT] = "table",
    coverage: Annotated[float, COVERAGE] = 0.95,
    sure: Annotated[float | None, SURE] = None,
    output: Annotated[Path | None, OUTPUT] = None,
    by: Annotated[Literal["image", "group"], BY] = "image",
    group: Group = None,
    mirror: Mirror = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: the fastest.")] = None,
    workers: Annotated[int | None, WORKERS] = None,
) -> int:
    """Print the likeliest classes of images, with probabilities.

    The prediction set holds the true class of a share --coverage of images like those that calibrated
    the model. Images unlike the training images are marked. With a taxonomy, the deepest name that is
    sure is added. With --by group, IMAGES may be a list with the columns path and group, in place of
    --group; a group has no set. A file that cannot be read has a row with the reason, and exit code 1.
    """
    from bcnn.data.groups import find_groups
    from bcnn.data.image_files import find_images

    _validate_new(output)
    named = by == "group" or group is not None
    if named and format == "labelstudio":
        raise UserError("--format labelstudio has a task for each image: leave out --by group")
    members = find_groups(images, group) if named else {}
    paths = [*chain(*members.values())] or find_images(images)
    groups = [name for name, each in members.items() for _ in each]
    with progress("loading PyTorch"):
        from bcnn.evaluation.inference import open_model, predict_paths, what_sets_promise
        from bcnn.evaluation.writers import FORMATS
        from bcnn.utils.device import best_device

    model = open_model(ckpt).to(best_device())
    if sure and not model.taxonomy:
        raise UserError(f"--sure: {ckpt} has no taxonomy: train it with data.taxonomy=FILE")
    top_k, failed = min(top_k, len(model.classes)), 0
    rows = [*members] or paths
    with _opened(output) as out, FORMATS[format](out, model, rows, top_k) as write:
        found = predict_paths(model, paths, top_k, coverage, batch_size, workers, mirror, groups, sure)
        for prediction in track(found, "predicting", len(rows)):
            write(prediction)
            failed += bool(prediction.error)
    if not named:
        error_console.print(what_sets_promise(model, coverage))
    error_console.print(f"{len(paths)} images, of which {failed} failed")
    return int(failed > 0)


def _validate_new(output: Path | None) -> None:
    if output and output.exists():
        raise UserError(f"--output {output} exists: remove it or name another file")
    if output:
        validate_writable(output.parent)


@contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """Open the file to write, or standard output; names that are no valid Unicode are their bytes."""
    if output is None:
        yield sys.stdout
        return
    with (
        atomic_write(output) as part,
        part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        yield file
