"""Class probabilities of labelled images, and which classes they confuse."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write

TENSORS = ("labels", "probabilities", "sets", "novelty")
COVERAGE = 0.95  # of prediction sets: the share of images whose true class is in their set


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of labelled images."""

    classes: list[str]  # in the order of the columns
    paths: list[str]
    labels: Tensor  # (images,) indices of the true classes
    probabilities: Tensor  # (images, classes) in float32, rows sum to 1
    digests: list[str] = field(default_factory=list)  # of the image files; empty: not recorded
    split: str = ""  # that the images are of
    sets: Tensor | None = None  # (images, classes): which classes are in the set of `COVERAGE`
    novelty: Tensor | None = None  # (images,): above 0 if unlike the training images

    @property
    def predicted(self) -> Tensor:
        """(images,) indices of the most probable classes."""
        return self.probabilities.argmax(dim=1)

    @property
    def confidence(self) -> Tensor:
        """(images,) probabilities of the predicted classes."""
        return self.probabilities.amax(dim=1)

    @property
    def true_probability(self) -> Tensor:
        """(images,) probabilities of the true classes."""
        return self.probabilities.gather(1, self.labels[:, None])[:, 0]

    @property
    def correct(self) -> Tensor:
        """(images,) whether the predicted class is the true one."""
        return self.predicted == self.labels

    @property
    def covered(self) -> Tensor:
        """(images,) whether the true class is in the prediction set."""
        assert self.sets is not None
        return self.sets.gather(1, self.labels[:, None])[:, 0]

    @property
    def confusion(self) -> Tensor:
        """(classes, classes) numbers of images: rows are true classes, columns predicted ones."""
        count = len(self.classes)
        cells = self.labels * count + self.predicted
        return cells.bincount(minlength=count**2).view(count, count)

    def confident_mistakes(self, count: int) -> list[int]:
        """Return the indices of misclassified images, the most confident first."""
        order = self.confidence.argsort(descending=True, stable=True)
        return order[~self.correct[order]][:count].tolist()

    def doubtful_labels(self) -> list[int]:
        """Return the indices of the images that may be labelled wrongly, the most confident first.

        Their predicted class is at least as probable as it is for the images of that class on average
        (Northcutt et al., "Confident Learning", JAIR 2021, §3.1). For predictions of held-out images.
        """
        doubtful = self.confidence >= soft_confusion(self).diag()[self.predicted]
        return [i for i in self.confident_mistakes(len(self.paths)) if doubtful[i]]

    def corrected_by(self, other: "Predictions") -> list[int]:
        """Return the `confident_mistakes` that `other` classifies correctly."""
        return [i for i in self.confident_mistakes(len(self.paths)) if other.correct[i]]

    def select(self, indices: Sequence[int]) -> "Predictions":
        """Return the predictions of these images, in this order."""
        rows = torch.tensor(indices, dtype=torch.long)
        return replace(
            self,
            paths=[self.paths[i] for i in indices],
            **{name: x[rows] for name in TENSORS if (x := getattr(self, name)) is not None},
            digests=self.digests and [self.digests[i] for i in indices],
        )

    def save(self, path: Path) -> None:
        """Write an .npz file with these fields, which `numpy.load` opens."""
        with atomic_write(path) as part:
            np.savez_compressed(part, **{name: x for name, x in vars(self).items() if x is not None})

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read what `save` wrote."""
        try:
            with np.load(path) as file:
                tensors: Any = {name: torch.from_numpy(file[name]) for name in TENSORS if name in file}
                return cls(**tensors, **{n: file[n].tolist() for n in file.files if n not in tensors})
        except Exception as error:  # damaged bytes raise many types
            raise UserError(f"{path} is damaged: evaluate the model again") from error


def on_common_images(runs: Sequence[Predictions]) -> list[Predictions]:
    """Return the predictions of the images that all runs have, in the order of the first.

    An image is known by its content and class; by path and class where a run records no content.
    """
    names = [run.digests if all(each.digests for each in runs) else run.paths for run in runs]
    positions: list[dict[tuple[str, str, int], int]] = []
    for run, images in zip(runs, names, strict=True):
        named = [run.classes[label] for label in run.labels.tolist()]
        copies: dict[tuple[str, str], Iterator[int]] = defaultdict(count)  # each has its number
        keys = enumerate(zip(images, named, strict=True))
        positions.append({(*key, next(copies[key])): position for position, key in keys})
    common = [key for key in positions[0] if all(key in each for each in positions)]
    return [run.select([of[key] for key in common]) for run, of in zip(runs, positions, strict=True)]


def soft_confusion(predictions: Predictions) -> Tensor:
    """Return the mean probabilities that the images of a class (row) give to each class (column).

    (classes, classes) in float64; rows of classes without images are zero.
    """
    count = len(predictions.classes)
    sums = torch.zeros(count, count, dtype=torch.float64)
    sums.index_add_(0, predictions.labels, predictions.probabilities.double())
    return sums / predictions.labels.bincount(minlength=count).clamp_min(1)[:, None]


def confusion_order(predictions: Predictions) -> list[int]:
    """Return the classes in an order that puts confused ones side by side.

    Average linkage on the negative logarithm of the mean probability that two classes give each other,
    with the leaves in optimal order (Bar-Joseph et al., Bioinformatics 2001) for up to 1000 classes.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage  # here, since prediction needs no scipy
    from scipy.spatial.distance import squareform

    shared = soft_confusion(predictions).numpy()
    shared = shared + shared.T
    np.fill_diagonal(shared, shared.max())
    distance = np.log(shared.max() + 1e-9) - np.log(shared + 1e-9)
    optimal = len(shared) <= 1000  # it takes the cube of their number, here a second
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=optimal)
    return leaves_list(tree).tolist()


def confused_pairs(predictions: Predictions, count: int) -> list[tuple[int, int]]:
    """Return pairs of classes, those with the most images mistaken for each other first."""
    both = (predictions.confusion + predictions.confusion.T).triu(diagonal=1)
    soft = soft_confusion(predictions)
    pairs = [(a, b) for a, b in both.nonzero().tolist()]
    pairs.sort(key=lambda pair: (both[pair], soft[pair] + soft[pair[::-1]]), reverse=True)
    return pairs[:count]
