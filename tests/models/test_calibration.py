"""Calibration: what it promises, by simulation, and what it is made of."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bcnn.evaluation.inference import infer
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.calibration import SKETCH, Calibration, Subspace, prediction_sets, sketch
from bcnn.models.checkpoint import load_model, save_model


def draws(images: int, generator: torch.Generator, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits of ten classes, and labels that follow the softmax of logits / sharpness."""
    logits = 2 * sharpness * torch.randn(images, 10, generator=generator)
    shares = (logits / sharpness).softmax(dim=1)
    return logits, torch.multinomial(shares, 1, generator=generator)[:, 0]


def calibrate(logits: Tensor, labels: Tensor) -> Calibration:
    return Calibration.of(logits, labels, torch.rand(len(labels)), Subspace(4))


@pytest.mark.parametrize("coverage", [0.9, 0.95])
@pytest.mark.parametrize("images", [30, 200])
def test_sets_hold_the_true_class_as_often_as_promised(images: int, coverage: float) -> None:
    """Over 400 draws of held-out images; the mean lies within three standard errors."""
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(400):
        calibration = calibrate(*draws(images, generator, 3))
        logits, labels = draws(200, generator, 3)
        probabilities = (logits / calibration.temperature).softmax(dim=1)
        sets = prediction_sets(probabilities, calibration.threshold(coverage))
        shares.append(sets.gather(1, labels[:, None]).float().mean())
    found = torch.stack(shares)
    error = 3 * float(found.std()) / math.sqrt(len(found))
    assert coverage - error <= found.mean() <= coverage + 1 / (images + 1) + 0.01 + error


def test_few_held_out_images_promise_no_more_than_they_can() -> None:
    calibration = calibrate(*draws(9, torch.Generator().manual_seed(0)))
    assert calibration.threshold(0.9) > 0  # 9 / 10
    assert calibration.threshold(0.91) == 0  # so that every class is in the set


@pytest.mark.parametrize("images", [2, 3, 5, 10, 19, 49, 100])
def test_few_held_out_images_do_not_mark_more_known_ones_than_promised(images: int) -> None:
    """Over 400 draws of held-out images; the mean lies at most three standard errors above 5 %."""
    generator = torch.Generator().manual_seed(0)
    shares, labels = [], torch.zeros(images, dtype=torch.long)
    for _ in range(400):
        logits = torch.randn(images, 1, generator=generator)
        space = Subspace.of(torch.randn(20, 64, generator=generator))
        x = torch.randn(images + 50, 64, generator=generator)
        calibration = Calibration.of(logits, labels, space.residual(x[:images]), space)
        novelty = calibration.novelty(torch.randn(50, 1, generator=generator), x[images:])
        shares.append((novelty > 0).float().mean())
        assert (calibration.novelty(torch.full((50, 1), -1e4), x[images:]) > 0).all()
    found = torch.stack(shares)
    assert found.mean() <= 0.05 + 3 * float(found.std()) / math.sqrt(len(found))


def test_one_held_out_image_marks_nothing() -> None:
    calibration = calibrate(*draws(1, torch.Generator().manual_seed(0)))
    assert (calibration.novelty(torch.full((5, 10), -1e6), torch.randn(5, 3000)) < 0).all()


def test_the_temperature_is_that_of_the_logits() -> None:
    for sharpness in (0.5, 1.0, 4.0):
        calibration = calibrate(*draws(5000, torch.Generator().manual_seed(0), sharpness))
        assert float(calibration.temperature) == pytest.approx(sharpness, rel=0.06)


def test_held_out_images_that_are_all_right_do_not_make_the_model_sure() -> None:
    logits = F.one_hot(torch.arange(20) % 4).float() * 5
    shares = (logits / calibrate(logits, torch.arange(20) % 4).temperature).softmax(dim=1)
    assert shares.amax(dim=1).max() < 1 - 1 / 30


def test_a_set_holds_the_likeliest_class_and_those_at_the_threshold() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.98, 0.01, 0.01], [0.4, 0.4, 0.2]])
    sets = prediction_sets(probabilities, 0.3)
    assert sets.tolist() == [[True, True, False], [True, False, False], [True, True, False]]
    assert prediction_sets(probabilities, 0.99).sum(dim=1).tolist() == [1, 1, 2]


def test_of_known_images_one_in_twenty_is_novel_and_of_others_all() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(20, 3000, generator=generator)

    def known(images: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(images, 20, generator=generator) @ basis
        return x + torch.randn(x.shape, generator=generator), 5 * x[:, :10]

    space = Subspace.of(known(500)[0])
    x, logits = known(1000)
    calibration = Calibration.of(logits, logits.argmax(dim=1), space.residual(x), space)
    x, logits = known(1000)
    assert 0.02 < (calibration.novelty(logits, x) > 0).float().mean() < 0.08
    elsewhere = torch.randn(1000, 3000, generator=generator)  # nearly orthogonal to all known ones
    assert (calibration.novelty(logits, elsewhere) > 0).all()
    assert (calibration.novelty(logits - 1000, x) > 0).all()  # no class is likely


@pytest.mark.parametrize("width", [320, 3000])
def test_a_sketch_keeps_distances(width: int) -> None:
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.pdist(sketch(x)) / torch.pdist(x)
    assert sketch(x).shape == (50, SKETCH)
    assert (found - 1).abs().max() < (1e-6 if width < SKETCH else 0.2)
    assert found.mean() == pytest.approx(1, abs=0.01)


def test_the_share_outside_the_axes_is_that_of_a_projection() -> None:
    x = torch.randn(30, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    axes = torch.linalg.eigh(torch.cov(x.mT)).eigenvectors.flip(1)[:, :15]
    centred = x - x.mean(dim=0)
    rest = centred - centred @ axes @ axes.mT
    expected = rest.square().sum(dim=1) / centred.square().sum(dim=1)
    torch.testing.assert_close(Subspace.of(x).residual(x).double(), expected, atol=2e-3, rtol=0)


def test_a_calibrated_model_is_saved_and_loaded(calibrated: BCNN, tmp_path: Path) -> None:
    save_model(calibrated, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    found, expected = (infer(model, images, "32-true") for model in (loaded, calibrated))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
