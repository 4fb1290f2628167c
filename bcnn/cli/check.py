"""The command that looks at a folder of images, or a list of them, and trains nothing."""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.table import Table

from bcnn.data.index import ImageIndex, mistakes, read_folder, read_list
from bcnn.data.splits import draw_splits, refuse_fractions, too_few
from bcnn.utils.errors import UserError
from bcnn.utils.files import new_output
from bcnn.utils.options import command
from bcnn.utils.terminal import Console

if TYPE_CHECKING:
    from bcnn.data.integrity import Finding

MOST_BROKEN = 20  # lines about broken files; the file that lists them has all

USAGE = """
python -m bcnn.data PATH [OPTION=VALUE ...]

Decodes every image of PATH and tells what training on it would meet: images of each class and split,
their formats and sizes, broken files, the same image in training and test, classes without images or
with few. Draws a contact sheet (outputs/<date>/<time>-data/contact_sheet.png) and, beside it, images to
validate or test on that look the same as one to train on (look_alike.png), and trains nothing.

PATH is a folder with train/, val/ and test/ of class folders, a folder of class folders, or a CSV or
text file with lines of path,label[,split]. Images beside a metadata.csv of file_name,label (Hugging
Face's imagefolder), in one folder or in train/, val/ and test/, are labelled by that.

  val_fraction=0.1     of each class, where no image is in val
  test_fraction=null   of each class, where no image is in test; null: 0.2 without any split, else 0
  seed=0               of what is drawn

Exit code: 1 if there are broken files or mistakes that training would stop at, else 0.
"""


@dataclass
class Options:
    """See the usage."""

    paths: list[str] = field(default_factory=list)
    val_fraction: float = 0.1
    test_fraction: float | None = None
    seed: int = 0


def main(options: Options) -> int:
    """Print the report and write the contact sheet."""
    # torch takes seconds that --help need not wait for
    from bcnn.data.contact_sheet import contact_sheet, pair_sheet
    from bcnn.data.integrity import broken, check, write_broken
    from bcnn.data.review import duplicates, flat, imbalance, lookalikes, repeats

    if len(options.paths) != 1:
        raise UserError("name one folder or list of images: see --help")
    fractions = options.val_fraction, options.test_fraction
    refuse_fractions(*fractions)
    source = Path(options.paths[0])
    layout = read_list(source) if source.is_file() else read_folder(source)
    findings = check(source, layout.paths)
    reasons = broken(findings)
    intact = layout.without(reasons)
    content = {path: finding.digest for path, finding in findings.items()}
    errors = mistakes(layout, source) or (
        mistakes(intact, source) + too_few(intact, content, source, *fractions)
    )
    drawn = draw_splits(intact, content, *fractions, options.seed)

    console, folder = Console(soft_wrap=True), new_output("data")
    console.print(_counts(layout, drawn, reasons))
    if intact.samples:
        console.print(_formats(findings))
        console.print(_sizes(findings))
        picture = folder / "contact_sheet.png"
        contact_sheet(intact.classes, intact.samples, picture)
        console.print(f"contact sheet: {picture.resolve()}")
    if reasons:
        file = write_broken(source, reasons)
        errors.append(f"{len(reasons)} images cannot be decoded; {file} lists them")
        for path, reason in list(reasons.items())[:MOST_BROKEN]:
            console.print(f"broken: {path}: {reason}")
    seen = duplicates(drawn, findings)
    twins = {split: pairs for split, pairs in lookalikes(drawn, findings).items() if pairs}
    if twins:
        sheet = folder / "look_alike.png"
        pair_sheet([pair for pairs in twins.values() for pair in pairs], sheet)
        for split, pairs in twins.items():
            of = f"{len(pairs)} of {len(drawn.splits[split])} images in {split}"
            seen.append(
                f"{of} look the same as one in train, which flatters the figures: {sheet.resolve()}"
            )
    seen += repeats(intact, findings) + flat(intact, findings) + imbalance(drawn)
    for warning in layout.remarks + seen:
        console.print(f"warning: {warning}")
    for error in errors:
        console.print(f"error: {error}")
    return 1 if errors else 0


def _counts(layout: ImageIndex, drawn: ImageIndex, reasons: Mapping[str, str]) -> Table:
    """Images of each class in each split, as training would take them."""
    table = Table(show_footer=True)
    columns = {split: drawn.counts(split) for split in drawn.splits}
    if reasons:
        lost = Counter(label for path, label in layout.samples if path in reasons)
        columns["broken"] = [lost[label] for label in range(len(layout.classes))]
    table.add_column("class", footer=f"classes: {len(layout.classes)}")
    for name, counts in columns.items():
        table.add_column(name, footer=f"{sum(counts)}", justify="right")
    for label, name in enumerate(layout.classes):
        table.add_row(name, *(str(counts[label]) for counts in columns.values()))
    return table


def _formats(findings: Mapping[str, "Finding"]) -> str:
    formats = Counter(finding.format for finding in findings.values() if not finding.error)
    return "formats: " + ", ".join(f"{count} {name}" for name, count in formats.most_common())


def _sizes(findings: Mapping[str, "Finding"]) -> str:
    intact = [finding for finding in findings.values() if not finding.error]
    sides = sorted(min(f.width, f.height) for f in intact)
    largest = max(intact, key=lambda f: f.width * f.height)
    smallest = min(intact, key=lambda f: f.width * f.height)
    return (
        f"sizes: {smallest.width} × {smallest.height} to {largest.width} × {largest.height} px, "
        f"short side {median(sides):.0f} px in the median"
    )


if __name__ == "__main__":
    sys.exit(command(Options, main, USAGE))
