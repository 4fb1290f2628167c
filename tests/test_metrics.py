"""Figures of merit against other libraries and closed formulas, and their intervals."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    balanced_accuracy_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from torchmetrics.functional.classification import multiclass_calibration_error

from bcnn.report.metrics import headline, per_class, proportion
from bcnn.report.predictions import Predictions


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
    ece = multiclass_calibration_error(made.probabilities, made.labels, 12, n_bins=15, norm="l1")
    expected = {
        "top1": top_k_accuracy_score(labels, probabilities, k=1),
        "top5": top_k_accuracy_score(labels, probabilities, k=5),
        "macro_top1": balanced_accuracy_score(labels, called),
        "ece": float(ece),
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
def test_wilson_interval_is_its_formula(hits: int, of: int) -> None:
    z, share = 1.959964, hits / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    found = proportion(hits, of)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    made = predictions(classes=4, images=800)
    surprise = -made.of_truth.log().numpy()
    within = np.sqrt(np.mean([surprise[made.labels.numpy() == k].var() for k in range(4)]))
    nll = headline(made)["nll"]
    assert (nll.high - nll.low) / 2 == pytest.approx(1.96 * within / np.sqrt(800), rel=0.1)
    assert nll.low < nll.value < nll.high


def test_intervals_hold_the_figure_also_where_all_is_right_and_sure() -> None:
    made = Predictions(["a", "b"], ["x"] * 6, torch.arange(6) % 2, torch.eye(2)[torch.arange(6) % 2])
    for name, figure in headline(made).items():
        assert figure.low <= figure.value <= figure.high, name
    assert headline(made)["top1"].low < 0.7  # six images say little


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
