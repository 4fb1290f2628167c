"""`bcnn check`: what training on a set of images would meet."""

from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bcnn.cli.arguments import LabelledImages, OutputFolder
from bcnn.utils.console import console, printable, progress
from bcnn.utils.files import new_output

if TYPE_CHECKING:
    from bcnn.data.index import ImageIndex
    from bcnn.data.integrity import Finding

MOST_BROKEN = 20  # lines about broken files; the file that lists them has all

VAL = typer.Option(help="Share of each class, where no image is in val.")
TEST = typer.Option(help="The same for test. Default: 0.2 where images have no split, else 0.")


def check(
    images: LabelledImages,
    val_fraction: Annotated[float, VAL] = 0.1,
    test_fraction: Annotated[float | None, TEST] = None,
    seed: Annotated[int, typer.Option(help="Decides which images are drawn.")] = 0,
    output: OutputFolder = None,
) -> int:
    """Check images before training: splits, sizes, broken files, duplicates.

    Draws contact_sheet.png, and near_duplicates.png. The exit code is 1 where training
    would stop.

    IMAGES is a folder with train/, val/ and test/ of class folders, a folder of class folders, a folder
    with a metadata.csv of file_name,label, or a list with lines of path,label[,split].
    """
    with progress("loading PyTorch"):
        from bcnn.data.contact_sheet import contact_sheet, pair_sheet
        from bcnn.data.index import mistakes, read_folder, read_list
        from bcnn.data.integrity import broken, write_broken
        from bcnn.data.integrity import check as check_images
        from bcnn.data.review import lookalikes, review
        from bcnn.data.splits import draw_splits, too_few, validate_fractions

    validate_fractions(val_fraction, test_fraction)
    index = read_list(images) if images.is_file() else read_folder(images)
    findings = check_images(images, index.paths)
    reasons = broken(findings)
    intact = index.without(reasons)
    digests = {path: finding.digest for path, finding in findings.items()}
    errors = mistakes(index, images) or (
        mistakes(intact, images) + too_few(intact, digests, images, val_fraction, test_fraction)
    )
    drawn = draw_splits(intact, digests, val_fraction, test_fraction, seed)
    folder = output or new_output("check")

    console.print(_counts(index, drawn, reasons))
    if intact.samples:
        console.print(_formats_and_sizes([findings[path] for path in intact.paths]))
        contact_sheet(intact.classes, intact.samples, folder / "contact_sheet.png")
        console.print(f"contact sheet: {folder / 'contact_sheet.png'}")
    for path, reason in list(reasons.items())[:MOST_BROKEN]:
        console.print(printable(f"broken: {path}: {reason}"))
    if reasons:
        errors.append(
            f"{len(reasons)} images cannot be decoded; {write_broken(images, reasons)} lists them"
        )
    near = lookalikes(drawn, findings)
    if pairs := [pair for found in near.values() for pair in found]:
        pair_sheet(pairs, folder / "near_duplicates.png")
        console.print(f"near duplicates: {folder / 'near_duplicates.png'}")
    for warning in intact.remarks + review(intact, drawn, findings, near):
        console.print(printable(f"warning: {warning}"))
    for error in errors:
        console.print(printable(f"error: {error}"))
    return 1 if errors else 0


def _counts(index: "ImageIndex", drawn: "ImageIndex", reasons: Mapping[str, str]) -> Table:
    """Return a table of the images of each class in each split."""
    table = Table(show_footer=True)
    columns = {split: drawn.counts(split) for split in drawn.splits}
    if reasons:
        lost = Counter(label for path, label in index.samples if path in reasons)
        columns["broken"] = [lost[label] for label in range(len(index.classes))]
    table.add_column("class", footer=f"classes: {len(index.classes)}")
    for name, counts in columns.items():
        table.add_column(name, footer=f"{sum(counts)}", justify="right")
    for label, name in enumerate(index.classes):
        table.add_row(printable(name), *(str(counts[label]) for counts in columns.values()))
    return table


def _formats_and_sizes(findings: list["Finding"]) -> str:
    formats = Counter(finding.format for finding in findings)
    sizes = sorted(((f.width, f.height) for f in findings), key=lambda size: size[0] * size[1])
    (small, low), (wide, high) = sizes[0], sizes[-1]
    side = median(map(min, sizes))
    return (
        f"formats: {', '.join(f'{count} {name}' for name, count in formats.most_common())}\n"
        f"sizes: {small} × {low} to {wide} × {high} px, median short side {side:.0f} px"
    )
