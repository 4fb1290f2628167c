"""Metrics on the levels of a taxonomy."""

from dataclasses import dataclass

from rich.table import Table

from bcnn.data.taxonomy import Taxonomy
from bcnn.evaluation.answers import numbered, summed
from bcnn.evaluation.metrics import Estimate, as_text, proportion
from bcnn.evaluation.predictions import Predictions
from bcnn.utils.console import printable


@dataclass(frozen=True)
class LevelMetrics:
    """The metrics of one level."""

    level: str
    names: int
    top1: Estimate  # by the probabilities of the names on this level
    near: Estimate  # share of misclassified images whose class is near: its name on this level is right


def level_metrics(predictions: Predictions, taxonomy: Taxonomy) -> list[LevelMetrics]:
    """Return the metrics of every level, the classes first."""
    found: list[LevelMetrics] = []
    wrong = ~predictions.correct
    for level, names in taxonomy.items():
        distinct, numbers = numbered(names)
        truth = numbers[predictions.labels]
        right = int((summed(predictions.probabilities, numbers).argmax(dim=1) == truth).sum())
        near = int((numbers[predictions.predicted] == truth)[wrong].sum())
        mistakes = int(wrong.sum()) if found else 0  # classes have no near mistakes
        estimates = proportion(right, len(truth)), proportion(near, mistakes)
        found.append(LevelMetrics(level, len(distinct), *estimates))
    return found


def levels_table(predictions: Predictions, taxonomy: Taxonomy) -> Table:
    """Return the `level_metrics`."""
    table = Table("level", "names", "top-1", "95 % interval", "near mistakes", title="levels")
    for row in level_metrics(predictions, taxonomy):
        top1, (near, _) = as_text("top1", row.top1), as_text("near", row.near)
        table.add_row(printable(row.level), str(row.names), *top1, near)
    return table
