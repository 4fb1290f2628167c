"""Figures of merit from predictions, with 95 % intervals where the images can support one.

- Proportions: Wilson (JASA 1927), which has a width also where all images are right.
- Macro top-1: Wilson's for an effective number of images, see `weighted_proportion`.
- Negative log-likelihood: Student's for the mean over the images. Where nearly all are right the mean
  hangs on the few mistakes, and the interval is too narrow if the set is too small to hold any.
- Expected calibration error: none. On few images it is too large by its own noise (Roelofs et al.,
  "Mitigating Bias in Calibration Error Estimation", AISTATS 2022), so that an interval around it
  misses the 0 of a perfectly calibrated model more often than not, also a bootstrap's.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from bcnn.evaluation.predictions import Predictions

BINS = 15  # of the calibration, as in Guo et al., "On Calibration of Modern Neural Networks", 2017
Z = NormalDist().inv_cdf(0.975)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its 95 % interval; nan is unknown."""

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
    error = multiclass_calibration_error(predictions.probabilities, labels, count, BINS)
    correct = predictions.correct.double().numpy()
    surprise = -predictions.of_truth.double().clamp_min(torch.finfo(torch.float32).tiny).log().numpy()
    weights = 1 / labels.bincount()[labels].double().numpy()
    return {
        "top1": proportion(int(correct.sum()), len(labels)),
        "top5": proportion(round(float(top5) * len(labels)), len(labels)),
        "macro_top1": weighted_proportion(correct, weights),
        "ece": Estimate(float(error), math.nan, math.nan),
        "nll": mean(surprise),
    }


NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "macro_top1": "macro top-1",
    "ece": "calibration error (ECE)",
    "nll": "negative log-likelihood",
}

MEANINGS = {
    "top1": "of the images are called what they are",
    "top5": "have their class among the five likeliest",
    "macro_top1": "top-1, each class counting the same, however few its images",
    "ece": "how far confidence is off the share that is right, on average; 0 is best",
    "nll": "the mean of −ln p of the true class: 0 is best, to be sure and wrong costs most",
}


def shown(name: str, figure: Estimate) -> tuple[str, str]:
    """Value and interval of a figure as text: "nll" a number, all else in percent; "–" is unknown."""
    form = "{:.3f}" if name == "nll" else "{:.1%}"
    value, low, high = (form.format(number) for number in (figure.value, figure.low, figure.high))
    return (
        "–" if math.isnan(figure.value) else value,
        "–" if math.isnan(figure.low) else f"{low} – {high}",
    )


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


def proportion(hits: int, of: int) -> Estimate:
    """`hits / of` with its Wilson interval; unknown where `of` is 0."""
    return _wilson(hits / of, of) if of else Estimate(math.nan, math.nan, math.nan)


def weighted_proportion(correct: Array, weights: Array) -> Estimate:
    """Share of the weights that is on correct images, with Wilson's interval for fewer images.

    The effective number of images is that of as many equal ones with the same variance (Korn &
    Graubard, Survey Methodology 24, 1998), but at most (Σw)² / Σw² (Kish, "Survey Sampling", 1965):
    all of them where weights are equal.

    Args:
        correct: (images,) 0 or 1.
        weights: (images,), above 0.
    """
    share = float(np.average(correct, weights=weights))
    squares = (weights / weights.sum()) ** 2
    images, variance = 1 / squares.sum(), squares @ (correct - share) ** 2
    if variance:
        images = min(images, share * (1 - share) / variance)
    return _wilson(share, float(images))


def mean(values: Array) -> Estimate:
    """Mean of numbers from 0 with its t-interval, unknown where nothing shows how they spread."""
    value = float(values.mean())
    if np.ptp(values) == 0:
        return Estimate(value, math.nan, math.nan)
    low, high = stats.t.interval(0.95, len(values) - 1, value, stats.sem(values))
    return Estimate(value, max(0.0, float(low)), float(high))


def _wilson(share: float, images: float) -> Estimate:
    middle = share + Z**2 / (2 * images)
    half = Z * math.sqrt(share * (1 - share) / images + (Z / (2 * images)) ** 2)
    low, high = ((middle + side) / (1 + Z**2 / images) for side in (-half, half))
    # Clipped, as rounding can put the end of an interval from 0 or up to 1 on the wrong side of it.
    return Estimate(share, min(share, max(0.0, low)), max(share, min(1.0, high)))
