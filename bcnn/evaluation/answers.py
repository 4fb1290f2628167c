"""Answers on the levels of a taxonomy: a name is as probable as its classes together."""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bcnn.data.taxonomy import Taxonomy

SURE = 0.9  # least probability of an answer that counts as sure
ANSWER = ("sure", "sure_level", "sure_probability", "set_parent")  # what `answer` returns

Answer = dict[str, Any]


def numbered(names: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return the different names on a level, sorted, and the number of the name of each class."""
    return _numbered(tuple(names))


@cache  # many classes take longer to sort than an image to classify
def _numbered(names: tuple[str, ...]) -> tuple[list[str], Tensor]:
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
