"""`bcnn predict`: the likeliest classes of images."""

import os
import sys
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bcnn.cli.arguments import Checkpoint, Group, Images, Mirror
from bcnn.utils.console import error_console, progress, track
from bcnn.utils.environment import cores
from bcnn.utils.errors import UserError
from bcnn.utils.files import validate_writable

if TYPE_CHECKING:
    from bcnn.evaluation.writers import Predictor, WriteTo
    from bcnn.models.bilinear_cnn import BCNN

FORMAT = typer.Option(
    help="labelstudio: see docs/labels.md; parquet: pip install 'bcnn\\[parquet]'. Default: by the "
    "suffix of --output, else table."
)
OUTPUT = typer.Option(
    help="New file, written once all is done; or, without a suffix, a folder of parts, where the same "
    "command resumes. Default: standard output."
)


def _parse_shard(text: str) -> tuple[int, int]:
    """Return I and N of `I/N`."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--shard {text}: expected I/N with I from 1 to N, such as 3/8")
    return int(number), int(count)


SHARES = "Write the I-th of N shares of the parts, from 1/N to N/N. Default: one for each GPU."
SHARD = typer.Option(metavar="I/N", parser=_parse_shard, help=SHARES)
CLUSTER = "Write the parts on a Ray cluster: host:port, auto, or local (pip install 'bcnn\\[ray]')."
RAY = typer.Option(metavar="ADDRESS", help=CLUSTER)
COVERAGE = typer.Option(
    min=0.01, max=0.999, help="Share of images whose true class is in their prediction set."
)
SURE = typer.Option(min=0.01, max=0.999, help="Least probability of a sure name. Default: 0.9.")
BY = typer.Option(help="group: one answer a group, by the mean of its images' logits.")
WORKERS = typer.Option(min=0, help="Processes that decode. Default: one a core, at most 16.")

Format = Literal["table", "jsonl", "csv", "parquet", "labelstudio"]
SUFFIXES: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}


def predict(
    ckpt: Checkpoint,
    images: Images,
    top_k: Annotated[int, typer.Option(min=1, help="Classes of each image.")] = 5,
    format: Annotated[Format | None, FORMAT] = None,
    coverage: Annotated[float, COVERAGE] = 0.95,
    sure: Annotated[float | None, SURE] = None,
    output: Annotated[Path | None, OUTPUT] = None,
    shard: Annotated[tuple | None, SHARD] = None,
    ray: Annotated[str | None, RAY] = None,
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
    suffix = output.suffix.lower() if output else ""
    format = format or SUFFIXES.get(suffix, "table")
    grouped = by == "group" or group is not None
    folder = _validate_output(output, shard, ray, format, grouped)
    paths, groups = ([], []) if folder else _paths_and_groups(images, grouped, group)
    with progress("loading PyTorch"):
        from bcnn.evaluation.inference import open_model, predict_paths, what_sets_promise
        from bcnn.evaluation.writers import FORMATS
        from bcnn.utils.device import best_device, cuda_devices
    if folder and not (shard or ray) and "-" not in images and len(devices := cuda_devices()) > 1:
        return _predict_on(devices)
    model = open_model(ckpt).to("cpu" if ray else best_device())
    if sure and not model.taxonomy:
        raise UserError(f"--sure: {ckpt} has no taxonomy: train it with data.taxonomy=FILE")
    top = min(top_k, len(model.classes))
    asked: dict[str, Any] = {"coverage": coverage, "sure": sure, "mirror": mirror, "top": top}
    predictor = partial(predict_paths, model=model, batch=batch_size, workers=workers, **asked)
    writer = partial(FORMATS[format], model=model, top=top)
    if folder:
        settings = {"checkpoint": sha256(ckpt.read_bytes()).hexdigest()[:16], "format": format, **asked}
        failed = _write_parts(folder, settings, images, shard, ray, (model, predictor, writer))
    else:
        failed = _write_rows(output, paths, groups, predictor, writer)
    if not grouped:
        error_console.print(what_sets_promise(model, coverage))
    return int(failed > 0)


def _validate_output(
    output: Path | None, shard: tuple[int, int] | None, ray: str | None, format: str, grouped: bool
) -> Path | None:
    """Return `output` if it is to be a folder of parts; raise UserError where options do not fit it."""
    folder = output if output and (output.is_dir() or not output.suffix) else None
    if grouped and format == "labelstudio":
        raise UserError("--format labelstudio has a task for each image: leave out --by group")
    if folder and (grouped or format in ("table", "labelstudio")):
        mistake = "leave out --by group" if grouped else "add --format csv, jsonl or parquet"
        raise UserError(f"--output {folder} is a folder of parts: {mistake}, or name a file (rows.csv)")
    if (shard or ray) and not folder:
        raise UserError(f"--{'shard' if shard else 'ray'} needs a folder of parts: add --output FOLDER")
    if ray and not find_spec("ray"):
        raise UserError("--ray needs Ray: pip install 'bcnn[ray]'")
    if format == "parquet" and not output:
        raise UserError("--format parquet is no text: add --output")
    if output and not folder and output.exists():
        raise UserError(f"--output {output} exists: remove it or name another file")
    if output:
        validate_writable(folder or output.parent)
    return folder


def _predict_on(devices: list[str]) -> int:
    """Run this command on each GPU, for a shard of its own; return 1 if any of them failed."""
    command = [sys.executable, *sys.orig_argv[1:], "--shard"]
    share = {**os.environ, "BCNN_CORES": str(max(1, cores() // len(devices)))}
    runs = []
    for number, device in enumerate(devices, 1):
        words, variables = [*command, f"{number}/{len(devices)}"], {"CUDA_VISIBLE_DEVICES": device}
        # Without bars, which would overwrite each other, but with lines on standard error.
        runs.append(Popen(words, env=share | variables, stdout=DEVNULL))
    try:
        return int(any([run.wait() for run in runs]))
    finally:
        for run in runs:
            run.terminate()


def _paths_and_groups(
    images: list[str], grouped: bool, pattern: str | None
) -> tuple[list[str], list[str]]:
    """Return the images, and the group of each; no groups where every image gets an answer."""
    from bcnn.data.groups import find_groups
    from bcnn.data.image_files import find_images

    if not grouped:
        return find_images(images), []
    members = find_groups(images, pattern)
    return [*chain(*members.values())], [name for name, each in members.items() for _ in each]


def _write_rows(
    output: Path | None,
    paths: list[str],
    groups: list[str],
    predictor: "Predictor",
    writer: "WriteTo",
) -> int:
    """Write a row for each image, or for each group; return how many images failed."""
    from bcnn.evaluation.writers import write_rows

    rows = [*dict.fromkeys(groups)] or paths
    found = write_rows(output, rows, predictor(paths=paths, groups=groups), writer)
    failed = sum(bool(each.error) for each in track(found, "predicting", len(rows)))
    error_console.print(f"{len(paths)} images, of which {failed} failed")
    return failed


def _write_parts(
    folder: Path,
    settings: dict[str, Any],
    images: list[str],
    shard: tuple[int, int] | None,
    ray: str | None,
    tools: "tuple[BCNN, Predictor, WriteTo]",
) -> int:
    """Write the parts that are absent, and the summary of all; return how many images failed."""
    from bcnn.data.image_files import stream_images
    from bcnn.evaluation.parts import SHOWN, PartFolder, summary_table, write_parts

    parts = PartFolder(folder, settings)
    absent = parts.absent(stream_images(images), *(shard or (1, 1)))
    if ray:
        from bcnn.evaluation.cluster import write_parts_on_ray

        errors = write_parts_on_ray(ray, absent, tools)
    else:
        errors = (each.error for each in write_parts(absent, *tools[1:]))
    failed = sum(map(bool, track(errors, "predicting")))
    if not (summary := parts.summarize()):
        error_console.print(f"{folder}: this shard is done; the last one writes summary.json")
        return failed
    error_console.print(summary_table(summary))
    for path, reason in islice(summary["broken"].items(), SHOWN):
        error_console.print(f"{path}: {reason}")
    return len(summary["broken"])
