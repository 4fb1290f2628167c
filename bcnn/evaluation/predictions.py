"""What a model said of a set of images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from bcnn.utils.files import atomic_write


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of labelled images.

    Args:
        classes: names, in the order of the columns.
        paths: of the images.
        labels: (images,) indices of the true classes.
        probabilities: (images, classes) in float32, rows sum to 1.
    """

    classes: list[str]
    paths: list[str]
    labels: Tensor
    probabilities: Tensor

    @property
    def predicted(self) -> Tensor:
        """(images,) indices of the most probable classes."""
        return self.probabilities.argmax(dim=1)

    @property
    def confidence(self) -> Tensor:
        """(images,) probabilities of the predicted classes."""
        return self.probabilities.amax(dim=1)

    @property
    def of_truth(self) -> Tensor:
        """(images,) probabilities of the true classes."""
        return self.probabilities.gather(1, self.labels[:, None])[:, 0]

    @property
    def correct(self) -> Tensor:
        """(images,) whether the predicted class is the true one."""
        return self.predicted == self.labels

    @property
    def confusion(self) -> Tensor:
        """(classes, classes) numbers of images, a row a true class, a column a predicted one."""
        return multiclass_confusion_matrix(self.predicted, self.labels, len(self.classes))

    def of_same_images(self, others: "Predictions") -> bool:
        """Whether these are of the same images, with the same labels, in the same order."""
        return (
            (self.classes, self.paths) == (others.classes, others.paths)
            and self.probabilities.shape == others.probabilities.shape
            and torch.equal(self.labels, others.labels)
        )

    def confident_mistakes(self, count: int) -> list[int]:
        """Indices of wrongly classified images, the most confident first."""
        wrong = (~self.correct).nonzero()[:, 0]
        order = self.confidence[wrong].argsort(descending=True, stable=True)
        return wrong[order][:count].tolist()

    def save(self, path: Path) -> None:
        """Write everything to an .npz that `numpy.load` opens, with these fields' names."""
        with atomic_write(path) as part:
            np.savez_compressed(
                part,
                classes=np.array(self.classes),
                paths=np.array(self.paths),
                labels=self.labels.numpy(),
                probabilities=self.probabilities.numpy(),
            )

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """What `save` wrote.

        Raises:
            OSError, ValueError, KeyError, BadZipFile: it cannot be read, or is something else.
        """
        with np.load(path) as kept:
            return cls(
                kept["classes"].tolist(),
                kept["paths"].tolist(),
                torch.from_numpy(kept["labels"]),
                torch.from_numpy(kept["probabilities"]),
            )


def soft_confusion(predictions: Predictions) -> Tensor:
    """(classes, classes) mean probabilities that the images of a row's class give to a column's.

    Says which classes look alike even where no image is mistaken. Rows without images are zero.
    """
    count = len(predictions.classes)
    sums = torch.zeros(count, count, dtype=torch.float64)
    sums.index_add_(0, predictions.labels, predictions.probabilities.double())
    return sums / predictions.labels.bincount(minlength=count).clamp_min(1)[:, None]
