"""Metrics of predictions, with 95 % intervals where the images can support one.

- Proportions: Wilson's interval (JASA 1927), which has a width even where all images are correct.
- Macro top-1: Wilson's interval for an effective number of images, see `weighted_proportion`.
- Difference of two models' top-1 on the same images: Bonett and Price's, see `paired_difference`.
- Negative log-likelihood: Student's interval for the mean over the images. It is too narrow where a
  small set happens to hold none of the rare mistakes that make up most of the mean.
- Expected calibration error: none. On few images its own noise makes it too large (Roelofs et al.,
  "Mitigating Bias in Calibration Error Estimation", AISTATS 2022), so that an interval around it,
  a bootstrap's included, mostly misses the 0 of a perfectly calibrated model.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from bcnn.evaluation.predictions import COVERAGE, Predictions

BINS = 15  # of the calibration, as in Guo et al., "On Calibration of Modern Neural Networks", 2017

Array = NDArray[np.float64]

NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "macro_top1": "macro top-1",
    "ece": "calibration error (ECE)",
    "nll": "negative log-likelihood",
    "coverage": f"true class in the {COVERAGE:.0%} set",
    "set_size": "classes in the set",
    "unlike": "unlike the training images",
}


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % interval; nan is unknown."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassMetrics:
    """The metrics of one class."""

    name: str
    images: int
    predicted: int  # images predicted as this class
    recall: Estimate
    precision: Estimate
    coverage: Estimate  # of prediction sets; unknown if the model is not calibrated
    set_size: float
    mistaken_for: str  # the most frequent other prediction and its number of images, or ""


def headline(predictions: Predictions) -> dict[str, Estimate]:
    """Return the metrics of all images, by the keys of `NAMES`; the last three if calibrated."""
    labels, shares, count = predictions.labels, predictions.probabilities, len(predictions.classes)
    top5 = (shares.topk(min(5, count)).indices == labels[:, None]).sum()
    ece = multiclass_calibration_error(shares, labels, count, BINS)
    correct = predictions.correct.double().numpy()
    tiny = torch.finfo(torch.float32).tiny
    nll = -predictions.true_probability.double().clamp_min(tiny).log().numpy()
    weights = 1 / labels.bincount()[labels].double().numpy()
    found = {
        "top1": proportion(int(correct.sum()), len(labels)),
        "top5": proportion(int(top5), len(labels)),
        "macro_top1": weighted_proportion(correct, weights),
        "ece": Estimate(float(ece), math.nan, math.nan),
        "nll": mean(nll),
    }
    if predictions.sets is not None and predictions.novelty is not None:
        found["coverage"] = proportion(int(predictions.covered.sum()), len(labels))
        found["set_size"] = mean(predictions.sets.sum(dim=1).double().numpy())
        found["unlike"] = proportion(int((predictions.novelty > 0).sum()), len(labels))
    return found


def displayed(predictions: Predictions) -> dict[str, Estimate]:
    """Return `headline` without top-5 where five classes or fewer make it meaningless."""
    metrics = headline(predictions)
    if len(predictions.classes) <= 5:
        del metrics["top5"]
    return metrics


@dataclass(frozen=True)
class UnknownMetrics:
    """How well novelty separates images of known classes from images of none."""

    auroc: float  # probability that an unknown image has the higher novelty
    fpr95: float  # share of unknown images accepted by a limit that accepts 95 % of the known ones
    accepted: Estimate  # share of unknown images that the model's own limit accepts


def unknown_metrics(known: Tensor, unknown: Tensor) -> UnknownMetrics:
    """Return the metrics of the novelty (images,) of known and of unknown images."""
    is_unknown = torch.cat([torch.zeros_like(known), torch.ones_like(unknown)]).int()
    _, ranks = torch.cat([known, unknown]).unique(return_inverse=True)  # of scores, sigmoids are taken
    limit = known.double().quantile(0.95)
    return UnknownMetrics(
        float(binary_auroc(ranks / len(ranks), is_unknown)),
        float((unknown <= limit).double().mean()),
        proportion(int((unknown <= 0).sum()), len(unknown)),
    )


def selective(predictions: Predictions) -> tuple[Array, Array]:
    """Return the share of images answered, the most confident first, and the accuracy of these."""
    order = predictions.confidence.argsort(descending=True, stable=True)
    hits = predictions.correct[order].double().cumsum(0).numpy()
    answered = np.arange(1, len(hits) + 1)
    return answered / len(hits), hits / answered


def as_text(key: str, estimate: Estimate) -> tuple[str, str]:
    """Format value and interval: some as numbers, others in percent, "–" for unknown."""
    form = {"nll": "{:.3f}", "set_size": "{:.2f}"}.get(key, "{:.1%}")
    value, low, high = (form.format(x) for x in (estimate.value, estimate.low, estimate.high))
    interval = "–" if math.isnan(estimate.low) else f"{low} – {high}"
    return "–" if math.isnan(estimate.value) else value, interval


def per_class(predictions: Predictions) -> list[ClassMetrics]:
    """Return the metrics of every class, in the order of the classes."""
    confusion, names = predictions.confusion, predictions.classes
    mistakes, others = (confusion - confusion.diag().diag()).max(dim=1)
    columns = (confusion.sum(dim=1), confusion.sum(dim=0), confusion.diag(), mistakes, others)
    found = []
    for label, row in enumerate(zip(*map(Tensor.tolist, columns), strict=True)):
        images, predicted, hits, mistaken, other = row
        mistaken_for = f"{names[other]} ({mistaken})" if mistaken else ""
        shares = proportion(hits, images), proportion(hits, predicted)
        sets = _sets_of(predictions, predictions.labels == label)
        found.append(ClassMetrics(names[label], images, predicted, *shares, *sets, mistaken_for))
    return found


def _sets_of(predictions: Predictions, chosen: Tensor) -> tuple[Estimate, float]:
    """Return coverage and mean size of the prediction sets of some images."""
    if predictions.sets is None:
        return proportion(0, 0), math.nan
    size = float(predictions.sets[chosen].sum(dim=1).double().mean())
    return proportion(int(predictions.covered[chosen].sum()), int(chosen.sum())), size


def calibration(predictions: Predictions) -> tuple[Array, Array, Array]:
    """Return images, mean confidence and accuracy of `BINS` equal parts of 0..1, without empty ones."""
    confidence = predictions.confidence.double().numpy()
    values = [np.ones_like(confidence), confidence, predictions.correct.numpy()]
    sums = stats.binned_statistic(confidence, values, "sum", BINS, (0, 1)).statistic
    images, confidences, hits = sums[:, sums[0] > 0]
    return images, confidences / images, hits / images


def proportion(hits: int, total: int) -> Estimate:
    """Return `hits / total` with Wilson's interval; unknown where `total` is 0."""
    if total == 0:
        return Estimate(math.nan, math.nan, math.nan)
    low, high = stats.binomtest(hits, total).proportion_ci(method="wilson")
    return Estimate(hits / total, float(low), float(high))


def paired_difference(only_first: int, only_second: int, images: int) -> Estimate:
    """Return the second model's top-1 minus the first's, with Bonett and Price's interval.

    Args:
        only_first, only_second: numbers of images that one model alone classifies correctly.

    Wald's interval after an image is added to either number (Journal of Educational and Behavioral
    Statistics 37, 2012; among those that Fagerland et al. recommend, Statistics in Medicine 33, 2014).
    """
    more, less = (only_second + 1) / (images + 2), (only_first + 1) / (images + 2)
    centre, z = more - less, stats.norm.ppf(0.975)
    half = z * math.sqrt((more + less - centre**2) / (images + 2))
    value = (only_second - only_first) / images
    return Estimate(value, max(-1.0, centre - half), min(1.0, centre + half))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of McNemar's exact test that both numbers are equal but for chance."""
    images = only_first + only_second
    return float(stats.binomtest(only_first, images).pvalue) if images else 1.0


def weighted_proportion(correct: Array, weights: Array) -> Estimate:
    """Return the share of the weights on correct images, with Wilson's interval for fewer images.

    The effective number of images is that of as many equal ones with the same variance (Korn &
    Graubard, Survey Methodology 24, 1998), at most (Σw)² / Σw² (Kish, "Survey Sampling", 1965), which
    is all of them where weights are equal. It is no integer, which `scipy.stats.binomtest` asks for.
    """
    share = float(np.average(correct, weights=weights))
    squares = (weights / weights.sum()) ** 2
    images, variance = 1 / squares.sum(), squares @ (correct - share) ** 2
    if variance:
        images = min(images, share * (1 - share) / variance)
    z = stats.norm.ppf(0.975)
    centre = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2) / (1 + z**2 / images)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def mean(values: Array) -> Estimate:
    """Return the mean of values ≥ 0 with its t-interval, unknown where all values are equal."""
    value = float(values.mean())
    if np.ptp(values) == 0:
        return Estimate(value, math.nan, math.nan)
    low, high = stats.t.interval(0.95, len(values) - 1, value, stats.sem(values))
    return Estimate(value, max(0.0, float(low)), float(high))
