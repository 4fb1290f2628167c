"""Models compared on the same images, each with the first: a table, files and a page."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from rich.table import Table

from bcnn.data.integrity import inspect
from bcnn.evaluation.metrics import mcnemar, paired_difference, proportion
from bcnn.evaluation.predictions import Predictions, on_common_images
from bcnn.evaluation.report import CHANGED, write_page
from bcnn.evaluation.results import PREDICTIONS
from bcnn.evaluation.tables import console_table, write_csv, write_tables
from bcnn.utils.console import logger
from bcnn.utils.errors import UserError

EXAMPLES = 24  # images that a page shows of those that one model alone classifies correctly

HEADING = ["run", "top-1, % (95 % interval)", "both right", "only first right", "only this right"]
HEADING += ["both wrong", "difference, points (95 % interval)", "McNemar p"]
COLUMNS = ["run", "images", "top1", "top1_low", "top1_high", "both_right", "only_first_right"]
COLUMNS += ["only_this_right", "both_wrong", "difference", "difference_low", "difference_high", "p"]


@dataclass(frozen=True)
class Run:
    """A model's predictions, beside those of the first run for the same images."""

    name: str
    predictions: Predictions
    first: Predictions

    @property
    def counts(self) -> list[int]:
        """Numbers of images: both right, only the first, only this, both wrong."""
        first, this = self.first.correct, self.predictions.correct
        groups = (first & this, first & ~this, ~first & this, ~first & ~this)
        return [int(group.sum()) for group in groups]

    @property
    def numbers(self) -> list[float]:
        """Its row of `COLUMNS` after the name; for the first run up to its top-1."""
        both, only_first, only_this, _ = self.counts
        images = sum(self.counts)
        top1 = proportion(both + only_this, images)
        difference = paired_difference(only_first, only_this, images)
        compared = [*self.counts, *astuple(difference), mcnemar(only_first, only_this)]
        return [images, *astuple(top1), *(compared if self.predictions is not self.first else [])]

    @property
    def cells(self) -> list[str]:
        """Its row of `HEADING`."""
        _, *top1 = (100 * number for number in self.numbers[:4])
        texts = [self.name, "{:.1f} ({:.1f}–{:.1f})".format(*top1)]
        if self.predictions is self.first:
            return texts + ["–"] * 6
        difference = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in self.numbers[-4:-1]))
        p = f"{self.numbers[-1]:.3f}" if self.numbers[-1] >= 0.001 else "< 0.001"
        return [*texts, *map(str, self.counts), difference.replace("-", "−"), p]


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the predictions of runs, and keep those of the images that all have.

    Raise UserError where there are none; warn of what limits the comparison.
    """
    found = [_load(folder) for folder in folders]
    common = on_common_images(found)
    images = len(common[0].paths)
    if not images:
        raise UserError(f"{folders[0]} and the others have no image of the same class in common")
    if not all(each.digests for each in found):
        logger.warning("images are matched by path: not all runs record their content")
    for folder, each in zip(folders, found, strict=True):
        if images < len(each.paths):
            missing = "the others are not in every run, or have another class there"
            logger.warning(f"{images} of {len(each.paths)} images of {folder} are compared: {missing}")
        if each.split not in ("", "test"):
            why = "the model may have been chosen by them or trained on them"
            logger.warning(f"{folder} has predictions of {each.split} images: {why}")
        if {*each.classes} != {*found[0].classes}:
            logger.warning(f"{folder} chooses from other classes than {folders[0]}")
    return [Run(str(f), each, common[0]) for f, each in zip(folders, common, strict=True)]


def table(runs: Sequence[Run]) -> Table:
    """Return a row for each run, for the console."""
    found = console_table(HEADING, [run.cells for run in runs])
    found.title = f"images: {len(runs[0].first.paths)}, the same for each run"
    return found


def write(folder: Path, runs: Sequence[Run]) -> Path:
    """Write the table in three formats, the images that differ, and a page, whose path is returned."""
    write_tables(folder / "compare", HEADING, [run.cells for run in runs])
    rows = [[run.name, *run.numbers, *[""] * 8][: len(COLUMNS)] for run in runs]
    write_csv(folder / "compare.csv", COLUMNS, rows)
    _write_images(folder / "images.csv", runs)
    pairs = []
    for run in runs[1:]:
        lost, gained = run.predictions.corrected_by(run.first), run.first.corrected_by(run.predictions)
        pictures = {i: _picture(run, i) for i in (*lost[:EXAMPLES], *gained[:EXAMPLES])}
        pairs.append((run, gained, lost, pictures))
    page, content = folder / "compare.html", {"heading": HEADING, "limit": EXAMPLES, "side": CHANGED}
    write_page(page, "compare.html", runs=runs, pairs=pairs, **content)
    return page


def _load(folder: Path) -> Predictions:
    file = folder / PREDICTIONS
    if not file.is_file():
        raise UserError(f"{folder} has no {PREDICTIONS}: name a run that has ended and has test images")
    return Predictions.load(file)


def _write_images(path: Path, runs: Sequence[Run]) -> None:
    """Write the classes that the models predict, for each image that not all classify alike."""
    labels = [(runs[0].first.classes, runs[0].first.labels)]
    labels += [(run.predictions.classes, run.predictions.predicted) for run in runs]
    named = [[classes[label] for label in chosen.tolist()] for classes, chosen in labels]
    rows = [row for row in zip(runs[0].first.paths, *named, strict=True) if len({*row[2:]}) > 1]
    write_csv(path, ["image", "class", *(run.name for run in runs)], rows)


def _picture(run: Run, index: int) -> str:
    """Return the path of an image whose file is unchanged in one of the runs; "" if there is none."""
    for side in (run.first, run.predictions):
        digest = inspect(side.paths[index]).digest
        if digest and digest in (side.digests[index : index + 1] or [digest]):
            return side.paths[index]
    return ""
