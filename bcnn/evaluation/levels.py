"""Answers and metrics on the levels of a taxonomy; a name is as probable as its classes together."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from bcnn.data.taxonomy import Taxonomy
from bcnn.evaluation.metrics import Estimate, as_text, proportion
from bcnn.evaluation.predictions import Predictions
from bcnn.utils.console import printable

SURE = 0.9  # least probability of an answer that counts as sure
ANSWER = ("sure", "sure_level", "sure_probability", "set_parent")  # what `answer` returns

Answer = dict[str, Any]


@dataclass(frozen=True)
class LevelMetrics:
    """The metrics of one level."""

    level: str
    names: int
    top1: Estimate  # by the probabilities of the names on this level
    near: Estimate  # share of misclassified images whose class is near: its name on this level is right


def numbered(names: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return the different names on a level, sorted, and the number of the name of each class."""
    distinct, numbers = np.unique(names, return_inverse=True)
    return distinct.tolist(), torch.from_numpy(numbers)


def summed(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Return the probabilities of the names on a level (batch, names), by those of classes."""
    sums = probabilities.new_zeros(len(probabilities), int(numbers.max()) + 1)
    return sums.index_add_(1, numbers, probabilities)


def common_parent(labels: Collection[int], taxonomy: Taxonomy) -> tuple[str, str]:
    """Return the deepest level on which classes have one name, and this name; "" where none has."""
    for level, names in taxonomy.items():
        if len(found := {names[label] for label in labels}) == 1:
            return level, found.pop()
    return "", ""


def answer(
    shares: Tensor, members: Collection[int], taxonomy: Taxonomy, sure: float | None = None
) -> Answer:
    """Return, by `ANSWER`, a sure name and the common parent of the prediction set; None without one.

    Args:
        shares: (classes,), probabilities.
        members: classes of the prediction set; empty: there is none.
        sure: least probability of the name to return, the deepest that has it; None: `SURE`.
    """
    found: list[Any] = [None, None, None]
    for level, names in reversed(taxonomy.items()):
        distinct, numbers = numbered(names)
        largest, likeliest = summed(shares[None], numbers)[0].max(dim=0)
        if largest >= (sure or SURE):
            found = [distinct[likeliest], level, round(float(largest), 6)]
    return dict(zip(ANSWER, (*found, common_parent(members, taxonomy)[1] or None), strict=True))


def answer_text(answer: Answer) -> str:
    """Return an `answer` in words."""
    name, level, probability, parent = (answer[key] for key in ANSWER)
    text = f"sure: {name} ({level}), {probability:.1%}" if name else "sure on no level"
    return text + (f"; set: {parent}" if parent else "")


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
