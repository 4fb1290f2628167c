"""Figures of merit from predictions, each with a 95 % interval.

Proportions have Wilson intervals (Wilson, JASA 1927). Other figures have ± 1.96 bootstrap standard
errors (Efron 1979), of `RESAMPLES` draws of the images within each class: not percentiles, since the
calibration error is a sum of absolute values, which resampling only makes larger.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from bcnn.report.predictions import Predictions

RESAMPLES = 1000
BINS = 15  # of the calibration, as in Guo et al., "On Calibration of Modern Neural Networks", 2017

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its 95 % interval; nan where there is nothing to measure it on."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassFigures:
    """One class: its images, and how many of them, and of those called so, are right."""

    name: str
    images: int
    predicted: int
    recall: Estimate
    precision: Estimate


@dataclass(frozen=True)
class Bin:
    """Images whose confidence lies in one of the equal parts of 0..1."""

    images: int
    confidence: float
    accuracy: float


def headline(predictions: Predictions) -> dict[str, Estimate]:
    """Figures of the whole set by name: see `NAMES`."""
    labels, count = predictions.labels, len(predictions.classes)
    top5 = multiclass_accuracy(
        predictions.probabilities, labels, count, top_k=min(5, count), average="micro"
    )
    correct = predictions.correct.double().numpy()
    confidence = predictions.confidence.double().numpy()
    surprise = -predictions.of_truth.double().clamp_min(torch.finfo(torch.float32).tiny).log().numpy()
    truth = labels.numpy()

    def macro(drawn: NDArray[np.int64]) -> float:
        images = np.bincount(truth[drawn], minlength=count)
        hits = np.bincount(truth[drawn], correct[drawn], minlength=count)
        return float((hits[images > 0] / images[images > 0]).mean())

    def error(drawn: NDArray[np.int64]) -> float:
        return calibration_error(calibration(confidence[drawn], correct[drawn]))

    return {
        "top1": proportion(int(correct.sum()), len(labels)),
        "top5": proportion(round(float(top5) * len(labels)), len(labels)),
        "macro_top1": bootstrap(macro, labels, most=1),
        "ece": bootstrap(error, labels, most=1),
        "nll": bootstrap(lambda drawn: float(surprise[drawn].mean()), labels),
    }


NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "macro_top1": "macro top-1",
    "ece": "calibration error (ECE)",
    "nll": "negative log-likelihood",
}


def per_class(predictions: Predictions) -> list[ClassFigures]:
    """Precision and recall of every class, in the order of the classes."""
    confusion = predictions.confusion
    rows = zip(
        predictions.classes,
        confusion.sum(dim=1).tolist(),
        confusion.sum(dim=0).tolist(),
        confusion.diagonal().tolist(),
        strict=True,
    )
    return [
        ClassFigures(name, images, called, proportion(hits, images), proportion(hits, called))
        for name, images, called, hits in rows
    ]


def calibration(confidence: Array, correct: Array) -> list[Bin]:
    """Mean confidence and accuracy in `BINS` equal parts of 0..1; means of an empty one are 0."""
    part = np.minimum((confidence * BINS).astype(int), BINS - 1)
    images = np.bincount(part, minlength=BINS)
    sums = [np.bincount(part, values, BINS) / np.maximum(images, 1) for values in (confidence, correct)]
    return [Bin(int(n), float(c), float(a)) for n, c, a in zip(images, *sums, strict=True)]


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: mean over the images of |accuracy − confidence| of their bin."""
    gaps = [each.images * abs(each.accuracy - each.confidence) for each in bins]
    return sum(gaps) / sum(each.images for each in bins)


def proportion(hits: int, of: int) -> Estimate:
    """`hits / of` with its Wilson interval."""
    if of == 0:
        return Estimate(math.nan, math.nan, math.nan)
    interval = binomtest(hits, of).proportion_ci(method="wilson")
    return Estimate(hits / of, float(interval.low), float(interval.high))


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], labels: Tensor, most: float = math.inf
) -> Estimate:
    """A statistic of image indices, from 0 to `most`, with its bootstrap interval."""
    order = labels.argsort(stable=True).numpy()
    sizes = labels.bincount().numpy()
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    size = np.repeat(sizes, sizes)
    rng = np.random.default_rng(0)
    drawn = [
        statistic(order[first + (rng.random(len(order)) * size).astype(int)]) for _ in range(RESAMPLES)
    ]
    value, margin = statistic(order), 1.96 * float(np.std(drawn))
    return Estimate(value, max(0.0, value - margin), min(most, value + margin))
