"""Figures of merit against other libraries and closed formulas, and their intervals."""

import json
import math
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ttest_1samp
from sklearn.metrics import (
    balanced_accuracy_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from bcnn.evaluation.figures import write_figures
from bcnn.evaluation.metrics import (
    calibration,
    headline,
    per_class,
    proportion,
    shown,
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


def test_headline_is_what_other_libraries_say() -> None:
    made = predictions(classes=12, images=301)
    labels, probabilities = made.labels.numpy(), made.probabilities.numpy()
    called = probabilities.argmax(1)
    confidence, part = probabilities.max(1), np.ceil(15 * probabilities.max(1))
    gaps = [((called == labels) - confidence)[part == k].sum() for k in range(1, 16)]
    expected = {
        "top1": top_k_accuracy_score(labels, probabilities, k=1),
        "top5": top_k_accuracy_score(labels, probabilities, k=5),
        "macro_top1": balanced_accuracy_score(labels, called),
        "ece": np.abs(gaps).sum() / 301,
        "nll": log_loss(labels, probabilities),
    }
    found = {name: figure.value for name, figure in headline(made).items()}
    assert found == pytest.approx(expected, abs=1e-6)


def test_precision_and_recall_of_every_class() -> None:
    made = predictions(classes=7, images=90)
    precision, recall, _, images = precision_recall_fscore_support(
        made.labels, made.predicted, labels=range(7)
    )
    rows = per_class(made)
    assert [row.precision.value for row in rows] == pytest.approx(precision.tolist())
    assert [row.recall.value for row in rows] == pytest.approx(recall.tolist())
    assert [row.images for row in rows] == images.tolist()


@pytest.mark.parametrize(("hits", "of"), [(0, 10), (3, 16), (16, 16), (950, 1000)])
def test_interval_of_a_proportion_is_wilsons(hits: int, of: int) -> None:
    found, expected = proportion(hits, of), binomtest(hits, of).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_interval_of_the_log_likelihood_is_students() -> None:
    made = predictions(classes=4, images=50)
    nll = headline(made)["nll"]
    expected = ttest_1samp(-made.of_truth.log().double(), 0).confidence_interval()
    assert (nll.low, nll.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_macro_top1_of_classes_of_one_size_has_the_interval_of_top1() -> None:
    for sure in (1.5, 100):  # some right, and all
        figures = headline(predictions(classes=20, images=60, sure=sure))
        assert astuple(figures["macro_top1"]) == pytest.approx(astuple(figures["top1"]))
    assert figures["macro_top1"].value == 1 and figures["macro_top1"].low < 0.95


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
        covered += found.low <= np.mean(recalls) <= found.high
    assert covered > 930


def test_what_the_images_cannot_support_is_unknown(tmp_path: Path) -> None:
    made = Predictions(["a", "b"], ["x"] * 6, torch.arange(6) % 2, torch.eye(2)[torch.arange(6) % 2])
    found = {name: shown(name, figure) for name, figure in headline(made).items()}
    assert found["top1"] == found["macro_top1"] == ("100.0%", "61.0% – 100.0%")  # six say little
    assert found["ece"] == ("0.0%", "–") and found["nll"] == ("0.000", "–")
    assert shown("recall", proportion(0, 0)) == ("–", "–")
    write_figures(tmp_path, made)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    figures = json.loads((tmp_path / "figures.json").read_text(), parse_constant=refuse)
    assert figures["nll"] == {"value": 0, "low": None, "high": None}


def test_the_plotted_bins_add_up_to_the_calibration_error() -> None:
    made = predictions(classes=5, images=200)
    bins = calibration(made.confidence.double().numpy(), made.correct.double().numpy())
    error = sum(each.images * abs(each.accuracy - each.confidence) for each in bins) / 200
    assert error == pytest.approx(headline(made)["ece"].value, abs=1e-6)


def test_a_class_without_images_counts_nowhere() -> None:
    made = predictions(classes=3, images=30)
    with_fourth = Predictions(
        [*made.classes, "none"],
        made.paths,
        made.labels,
        torch.cat([made.probabilities, torch.zeros(30, 1)], dim=1),
    )
    assert headline(with_fourth)["macro_top1"] == headline(made)["macro_top1"]
    assert math.isnan(per_class(with_fourth)[3].recall.value)


def test_confident_mistakes_come_first_and_only_mistakes() -> None:
    made = predictions(classes=5, images=60, sure=0.5)
    found = made.confident_mistakes(10)
    confidence = made.confidence[found].tolist()
    assert len(found) == 10 and confidence == sorted(confidence, reverse=True)
    assert not made.correct[found].any()
    assert confidence[0] == made.confidence[~made.correct].max()
