"""Class probabilities of labelled images, and which classes they confuse."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from bcnn.utils.files import atomic_write


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of labelled images."""

    classes: list[str]  # in the order of the columns
    paths: list[str]
    labels: Tensor  # (images,) indices of the true classes
    probabilities: Tensor  # (images, classes) in float32, rows sum to 1

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
    def confusion(self) -> Tensor:
        """(classes, classes) numbers of images: rows are true classes, columns predicted ones."""
        return multiclass_confusion_matrix(self.predicted, self.labels, len(self.classes))

    def confident_mistakes(self, count: int) -> list[int]:
        """Return the indices of misclassified images, the most confident first."""
        order = self.confidence.argsort(descending=True, stable=True)
        return order[~self.correct[order]][:count].tolist()

    def save(self, path: Path) -> None:
        """Write an .npz file with these fields, which `numpy.load` opens."""
        with atomic_write(path) as part:
            np.savez_compressed(part, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read what `save` wrote."""
        with np.load(path) as file:
            names = (file[name].tolist() for name in ("classes", "paths"))
            return cls(*names, *(torch.from_numpy(file[name]) for name in ("labels", "probabilities")))


def softmax(logits: Tensor) -> Tensor:
    """Return probabilities in float32 on the CPU; nan for an image of which a logit is not finite.

    Torch's softmax hides a logit of -∞, which float16 overflows to.
    """
    finite = logits.isfinite().all(dim=-1, keepdim=True)
    return logits.float().softmax(dim=-1).where(finite, math.nan).cpu()


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
