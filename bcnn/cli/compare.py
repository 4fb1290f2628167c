"""`bcnn compare`: trained models on the same test images, each against the first."""

from pathlib import Path
from typing import Annotated

import typer

from bcnn.cli.arguments import OutputFolder
from bcnn.utils.console import console, progress
from bcnn.utils.errors import UserError
from bcnn.utils.files import new_output, validate_writable

FOLDERS = "Folders of runs, of stages of a run, or of what bcnn evaluate wrote."
RUNS = typer.Argument(metavar="RUN", exists=True, file_okay=False, help=FOLDERS)


def compare(runs: Annotated[list[Path], RUNS], output: OutputFolder = None) -> None:
    """Compare models on the same test images, each with the first.

    Images are matched by content, and the interval of the difference and McNemar's exact test use the
    pairs. Both are about the models as trained; to compare settings, sweep over seed.

    Writes compare.html with the images that differ, compare.md, compare.tex, compare.csv, and
    images.csv (the classes that the models predict for images that they classify differently).
    """
    if len(runs) < 2:
        raise UserError("bcnn compare needs two folders or more")
    folder = output or new_output("compare")
    validate_writable(folder)
    with progress("loading PyTorch"):
        from bcnn.evaluation import comparison

    found = comparison.open_runs(runs)
    console.print(comparison.table(found))
    page = comparison.write(folder, found)
    console.print(f"tables: {folder}\npage: {page}")
