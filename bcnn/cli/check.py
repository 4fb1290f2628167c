"""`bcnn check`: a report on images before training."""

from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bcnn.cli.arguments import Group, LabelledImages
from bcnn.utils.console import console, printable, progress
from bcnn.utils.errors import UserError
from bcnn.utils.files import new_output

if TYPE_CHECKING:
    from bcnn.data.index import ImageIndex
    from bcnn.data.integrity import Findings
    from bcnn.data.review import Pairs

VAL = typer.Option(help="Share of each class to draw for validation, where no image is in val.")
TEST = typer.Option(help="The same for test. Default: 0.2 where images have no split, else 0.")
NESTED = typer.Option("--nested", help="Class folders are in folders of their parents.")
APPLY = typer.Option(metavar="MOVES", exists=True, dir_okay=False, help="List of labels to correct.")
OUTPUT = typer.Option(
    help="New folder (default: in outputs/). With --apply, required: NEW.csv, or a folder for a copy."
)


def check(
    images: LabelledImages,
    val_fraction: Annotated[float, VAL] = 0.1,
    test_fraction: Annotated[float | None, TEST] = None,
    group: Group = None,
    nested: Annotated[bool, NESTED] = False,
    seed: Annotated[int, typer.Option(help="Decides which images are drawn.")] = 0,
    apply: Annotated[Path | None, APPLY] = None,
    output: Annotated[Path | None, OUTPUT] = None,
) -> int:
    """Check images before training: splits, sizes, broken files, duplicates.

    Draws contact_sheet.png, and near_duplicates.png. The exit code is 1 where training would stop.

    IMAGES is a folder with train/, val/ and test/ of class folders, a folder of class folders, a folder
    with a metadata.csv of file_name,label, or a list with lines of path,label[,split].

    With --apply it checks nothing, and writes IMAGES with the labels of MOVES, such as the moves.csv of
    a run, to a list (--output NEW.csv) or to a copy of the folder (--output NEW).
    """
    with progress("loading PyTorch"):
        from bcnn.data import integrity
        from bcnn.data.groups import join_groups, name_groups
        from bcnn.data.index import mistakes, read_folder, read_list
        from bcnn.data.review import lookalikes, review, shared
        from bcnn.data.splits import draw_splits, too_few, validate_fractions
    validate_fractions(val_fraction, test_fraction)
    index = read_list(images) if images.is_file() else read_folder(images, nested)
    index = name_groups(index, group, "--group", images)
    if apply:
        return _apply(apply, images, index, output)
    findings = integrity.check(images, index.paths)
    intact = index.without(reasons := integrity.broken(findings))
    digests = {path: finding.digest for path, finding in findings.items()}
    errors = mistakes(index, images) or (
        mistakes(intact, images) + too_few(intact, digests, images, val_fraction, test_fraction)
    )
    groups = join_groups({path: findings[path] for path in intact.paths}, index.groups, near=False)
    drawn = draw_splits(intact, digests, groups, val_fraction, test_fraction, seed)
    folder = output or new_output("check")
    _print_counts(index, drawn, reasons, groups)
    near = lookalikes(drawn, findings)
    if intact.samples:
        _draw(intact, findings, near, folder)
    cut = shared(drawn, groups, "are of groups in train") if index.groups else []
    errors += _broken(index, findings, images)
    warnings = intact.remarks + review(intact, drawn, findings, near) + cut
    for line in [f"warning: {each}" for each in warnings] + [f"error: {each}" for each in errors]:
        console.print(printable(line))
    return 1 if errors else 0


def _broken(index: "ImageIndex", findings: "Findings", images: Path) -> list[str]:
    """Return the error that training would stop with at broken files."""
    from bcnn.data.integrity import without_broken

    try:
        without_broken(index, findings, images, skip=False)
    except UserError as error:
        return [str(error)]
    return []


def _apply(file: Path, images: Path, index: "ImageIndex", output: Path | None) -> int:
    from bcnn.evaluation.moves import read_moves, write_corrected

    if output is None:
        raise UserError(
            "--apply leaves IMAGES as they are: add --output NEW.csv or --output NEW_FOLDER"
        )
    moves = read_moves(file, images, index)
    with progress(f"writing {output}"):
        write_corrected(output, images, index, moves)
    changed = sum(old != new for old, new in moves.values())
    console.print(f"{output}: {changed} of {len(index.samples)} images have a new label")
    return 0


def _draw(intact: "ImageIndex", findings: "Findings", near: "Pairs", folder: Path) -> None:
    """Print formats and sizes of the images, and draw them."""
    from bcnn.data.contact_sheet import contact_sheet, pair_sheet

    found = [findings[path] for path in intact.paths]
    formats = Counter(each.format for each in found).most_common()
    sides = sorted(min(each.width, each.height) for each in found)
    console.print(f"formats: {', '.join(f'{count} {name}' for name, count in formats)}")
    console.print(f"short sides: {sides[0]} to {sides[-1]} px, median {median(sides):.0f} px")
    contact_sheet(intact.classes, intact.samples, folder / "contact_sheet.png")
    if pairs := [pair for each in near.values() for pair in each]:
        pair_sheet(pairs, folder / "near_duplicates.png")
    console.print(f"pictures: {folder}")


def _print_counts(
    index: "ImageIndex", drawn: "ImageIndex", broken: Container[str], groups: Mapping[str, str]
) -> None:
    """Print a table with a row per class and a column of numbers per split, and those of groups."""
    columns = {split: drawn.counts(split) for split in drawn.splits}
    if lost := [label for path, label in index.samples if path in broken]:
        columns["broken"] = [lost.count(label) for label in range(len(index.classes))]
    table = Table(show_footer=True)
    table.add_column("class", footer=f"classes: {len(index.classes)}")
    for name, counts in columns.items():
        table.add_column(name, footer=f"{sum(counts)}", justify="right")
    for name, *counts in zip(map(printable, index.classes), *columns.values(), strict=True):
        table.add_row(name, *map(str, counts))
    console.print(table)
    if index.groups:
        numbers = [f"{len({groups[path] for path, _ in each})} {s}" for s, each in drawn.splits.items()]
        console.print(f"groups: {', '.join(numbers)}")
