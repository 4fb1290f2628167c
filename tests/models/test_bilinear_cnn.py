"""The network: stored outputs, the original's network written out plainly, and `predict`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bcnn.data.transforms import Preprocessing
from bcnn.models.attribution import evidence
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.third_party import to_original
from bcnn.utils.device import autocast
from benchmarks.harness import OriginalNet

STORED = json.loads(Path(__file__).with_name("golden.json").read_text())
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture
def model() -> BCNN:
    """The network of the stored outputs: the seed draws the same weights."""
    torch.manual_seed(0)
    model = BCNN(["x", "y", "z"], Preprocessing(64))
    model.backbone.set_normalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    model.head.center_on(torch.rand(131328) / 300)
    model.head.batch_mean = True
    return model


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 64, 80), dtype=torch.uint8, generator=generator)


def close(found: Tensor, stored: list[Any], rtol: float = 1e-4) -> None:
    expected = torch.tensor(stored)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_logits_descriptors_and_evidence_are_as_stored(model: BCNN, images: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        close(model(images), STORED["logits"])
        close(model.descriptor(images)[:, ::20001], STORED["descriptor"])
    close(evidence(model, images, LABELS, LABELS.flip(0)).flatten(1), STORED["evidence"])


def test_gradients_are_as_stored(model: BCNN, images: Tensor) -> None:
    F.cross_entropy(model.train()(images), LABELS).backward()
    parameters = dict(model.named_parameters())
    for name, (_, norm) in STORED["gradients"].items():
        gradient = parameters[name].grad
        assert gradient is not None
        assert float(gradient.double().norm()) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 48, 64), (2, 3, 77, 33)])
def test_logits_equal_those_of_the_original_network(model: BCNN, shape: tuple[int, ...]) -> None:
    model, source = model.double().eval(), OriginalNet(3).double()
    source.load_state_dict(to_original(model))  # strict: same names, same shapes
    images = torch.rand(shape, dtype=torch.float64)
    normalised = (images - model.backbone.mean) / model.backbone.std
    torch.testing.assert_close(model(images), source(normalised), rtol=1e-10, atol=1e-12)


def test_every_kind_of_image_has_the_same_probabilities(tiny: BCNN, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    tensor = tiny.preprocessing.evaluation()(image)[None].as_subclass(Tensor)
    expected = tiny.predict(tensor)
    assert expected.shape == (1, 3) and float(expected.sum()) == pytest.approx(1)
    for one in (str(tmp_path / "image.png"), tmp_path / "image.png", image, pixels, tensor / 255):
        torch.testing.assert_close(tiny.predict(one), expected)
    many = [tmp_path / "image.png", image, pixels]
    torch.testing.assert_close(tiny.predict(many), expected.expand(3, 3))
    torch.testing.assert_close(tiny.predict(np.stack([pixels] * 3)), expected.expand(3, 3))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_images_are_predicted_in_batches(tiny: BCNN, count: int) -> None:
    images = torch.rand(count, 3, 32, 32)
    with torch.no_grad(), autocast(images.device):
        expected = tiny(images).softmax(dim=1)
    sizes: list[int] = []
    tiny.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(tiny.predict(images, batch_size=3), expected)
    assert sizes == {0: [], 1: [1], 7: [3, 3, 1]}[count]


def test_a_prediction_depends_on_no_other_image_also_while_training(tiny: BCNN) -> None:
    tiny.head.batch_mean = True  # as `BCNNModule` leaves it after a fit
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(tiny.train().predict(image), tiny.eval().predict(image))


@pytest.mark.parametrize("pixels", [1.5, -0.5, torch.nan])
def test_pixels_outside_their_range_are_refused(tiny: BCNN, pixels: float) -> None:
    """Normalised images would silently have other classes."""
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        tiny.predict(torch.full((1, 3, 32, 32), pixels))
