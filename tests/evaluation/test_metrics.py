"""Metrics and their intervals against other libraries and closed formulas."""

import math
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ttest_1samp
from sklearn import metrics as sklearn

from bcnn.evaluation.metrics import (
    as_text,
    calibration,
    displayed,
    headline,
    mcnemar,
    paired_difference,
    per_class,
    proportion,
    unknown_metrics,
    weighted_proportion,
)
from bcnn.evaluation.predictions import Predictions


def predictions(classes: int, images: int, seed: int = 0, sure: float = 1.5) -> Predictions:
    """Random probabilities that favour the true class; every class has images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += sure
    names = [f"class {k}" for k in range(classes)]
    paths = [f"{k}.jpg" for k in range(images)]
    return Predictions(names, paths, labels, logits.softmax(1))


def test_headline_metrics_equal_those_of_scikit_learn() -> None:
    made = predictions(classes=12, images=301)
    labels, probabilities = made.labels.numpy(), made.probabilities.numpy()
    called = probabilities.argmax(1)
    confidence, part = probabilities.max(1), np.ceil(15 * probabilities.max(1))
    gaps = [((called == labels) - confidence)[part == k].sum() for k in range(1, 16)]
    expected = {
        "top1": sklearn.top_k_accuracy_score(labels, probabilities, k=1),
        "top5": sklearn.top_k_accuracy_score(labels, probabilities, k=5),
        "macro_top1": sklearn.balanced_accuracy_score(labels, called),
        "ece": np.abs(gaps).sum() / 301,
        "nll": sklearn.log_loss(labels, probabilities),
    }
    metrics = headline(made)
    assert {key: each.value for key, each in metrics.items()} == pytest.approx(expected, abs=1e-6)
    student = ttest_1samp(-made.true_probability.log().double(), 0).confidence_interval()
    assert (metrics["nll"].low, metrics["nll"].high) == pytest.approx(tuple(student), abs=1e-6)
    images, confidence, accuracy = calibration(made)
    assert (images * abs(accuracy - confidence)).sum() / 301 == pytest.approx(expected["ece"], abs=1e-6)


def test_precision_and_recall_of_every_class() -> None:
    made = predictions(classes=7, images=90)
    expected = sklearn.precision_recall_fscore_support(made.labels, made.predicted, labels=range(7))
    precision, recall, _, images = expected
    rows = per_class(made)
    assert [row.precision.value for row in rows] == pytest.approx(precision.tolist())
    assert [row.recall.value for row in rows] == pytest.approx(recall.tolist())
    assert [row.images for row in rows] == images.tolist()
    confusion = made.confusion.fill_diagonal_(0)
    mistakes, others = confusion.max(dim=1)
    named = [f"class {k} ({n})" for k, n in zip(others.tolist(), mistakes.tolist(), strict=True)]
    assert [row.mistaken_for for row in rows] == named


def test_macro_top1_of_classes_of_one_size_has_wilsons_interval_as_top1_has() -> None:
    for sure in (1.5, 100):  # some correct, and all
        made = predictions(classes=20, images=60, sure=sure)
        metrics, hits = headline(made), int(made.correct.sum())
        assert astuple(metrics["macro_top1"]) == pytest.approx(astuple(metrics["top1"]))
        interval = binomtest(hits, 60).proportion_ci(method="wilson")
        assert astuple(metrics["top1"]) == pytest.approx((hits / 60, interval.low, interval.high))
    assert metrics["macro_top1"].value == 1 and metrics["macro_top1"].low < 0.95


@pytest.mark.parametrize(
    ("sizes", "recalls"),
    [
        ([1] * 50, [0.8] * 50),
        ([5] * 10, [0.9] * 10),
        ([3] * 5 + [30] * 45, [0.5] * 5 + [0.98] * 45),  # rare classes decide
        ([30] * 5 + [3] * 45, [0.5] * 5 + [0.95] * 45),
    ],
)
def test_interval_of_macro_top1_covers_the_truth(sizes: list[int], recalls: list[float]) -> None:
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(len(sizes)), sizes)
    weights, covered = 1 / np.array(sizes)[labels], 0
    for _ in range(1000):
        correct = (rng.random(len(labels)) < np.array(recalls)[labels]).astype(float)
        found = weighted_proportion(correct, weights)
        covered += bool(found.low <= np.mean(recalls) <= found.high)
    assert covered > 930


def test_interval_of_a_paired_difference_is_bonett_and_price_s() -> None:
    found = paired_difference(4, 26, images=48)  # the example of R's statpsych::ci.prop.ps
    assert astuple(found) == pytest.approx((22 / 48, 0.2548067, 0.6251933))
    assert astuple(paired_difference(0, 3, images=3))[::2] == (1.0, 1.0)


@pytest.mark.parametrize("images", [20, 50, 200, 1000])
@pytest.mark.parametrize(
    "shares",  # both right, only the first, only the second, both wrong
    [(0.8, 0.1, 0.05, 0.05), (0.95, 0.04, 0.005, 0.005), (0.5, 0.2, 0.1, 0.2), (0.3, 0.05, 0.6, 0.05)],
)
def test_interval_of_a_paired_difference_covers_the_truth(
    images: int, shares: tuple[float, ...]
) -> None:
    tables = np.random.default_rng(0).multinomial(images, shares, 4000)
    tables, times = np.unique(tables[:, 1:3], axis=0, return_counts=True)
    found = [paired_difference(int(first), int(second), images) for first, second in tables]
    covered = [each.low <= shares[2] - shares[1] <= each.high for each in found]
    assert np.average(covered, weights=times) > 0.94


def test_mcnemar_s_exact_test() -> None:
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1 and mcnemar(0, 10) == 2 / 2**10 == mcnemar(10, 0)
    assert mcnemar(2, 5) == 2 * (1 + 7 + 21) / 2**7
    chance = np.random.default_rng(0).binomial(30, 0.5, 4000)  # models that are equally accurate
    assert np.mean([mcnemar(int(only), 30 - int(only)) < 0.05 for only in chance]) <= 0.05


def test_unknown_images_as_novel_as_the_known_ones_are_not_separated() -> None:
    same = torch.tensor([-1.0, 0.5, 0.5, 2.0])
    assert unknown_metrics(same, same).auroc == unknown_metrics(same[1:3], same[1:3]).auroc == 0.5
    assert unknown_metrics(same, same + 9).auroc == 1


def test_what_the_images_cannot_support_is_unknown() -> None:
    made = Predictions(["a", "b"], ["x"] * 6, torch.arange(6) % 2, torch.eye(2)[torch.arange(6) % 2])
    found = {key: as_text(key, estimate) for key, estimate in headline(made).items()}
    assert found["top1"] == found["macro_top1"] == ("100.0%", "61.0% – 100.0%")  # of six images
    assert found["ece"] == ("0.0%", "–") and found["nll"] == ("0.000", "–")
    assert as_text("recall", proportion(0, 0)) == ("–", "–")
    assert "top5" in found and "top5" not in displayed(made)  # of two classes


def test_a_class_without_images_counts_nowhere() -> None:
    made = predictions(classes=3, images=30)
    shares = torch.nn.functional.pad(made.probabilities, (0, 1))
    with_fourth = replace(made, classes=[*made.classes, "none"], probabilities=shares)
    assert headline(with_fourth)["macro_top1"] == headline(made)["macro_top1"]
    assert math.isnan(per_class(with_fourth)[3].recall.value)


def test_confident_mistakes_come_first_and_only_mistakes() -> None:
    made = predictions(classes=5, images=60, sure=0.5)
    found = made.confident_mistakes(10)
    assert len(found) == 10 and not made.correct[found].any()
    expected = made.confidence[~made.correct].sort(descending=True).values[:10]
    assert torch.equal(made.confidence[found], expected)
