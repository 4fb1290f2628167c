"""`bcnn explain`: the figures, the locations that they point at, its errors."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Bcnn
from PIL import Image
from torch import nn

from bcnn.data.transforms import Preprocessing
from bcnn.evaluation import explain
from bcnn.evaluation.heatmap import overlay
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import save_model

pytestmark = pytest.mark.figures

Box = tuple[int, int, int, int]

RED, BLUE, GREEN, GREY = (230, 25, 25), (25, 25, 230), (25, 230, 25), (128, 128, 128)


@pytest.fixture(scope="module")
def model() -> BCNN:
    """Tells colours apart, blind to grey; its crops (72 px) are no whole number of locations."""
    torch.manual_seed(0)
    model = BCNN(["red", "blue", "green"], Preprocessing(72)).eval()
    model.backbone.set_normalization([0.5] * 3, [0.25] * 3)
    make_near_sighted(model)
    examples = [marked((72, 72), (0, 0, 32, 32), colour) for colour in (RED, BLUE, GREEN)]
    images = torch.stack([model.preprocessing.evaluation()(image) for image in examples])
    with torch.no_grad():
        descriptors = model.descriptor(images)
        model.head.center_on(descriptors.mean(dim=0))
        model.head.weight.copy_(20 * (descriptors - descriptors.mean(dim=0)))
    return model


@pytest.fixture(scope="module")
def ckpt(model: BCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    save_model(model, path)
    return path


def make_near_sighted(model: BCNN) -> None:
    """Leave the middle of every kernel alone: a location of relu5_3 sees its own 16 px, no others."""
    for layer in model.backbone.features:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.mul_(F.pad(torch.full((1, 1, 1, 1), 3.0), (1, 1, 1, 1)))


def marked(size: tuple[int, int], box: Box, colour: tuple[int, ...]) -> Image.Image:
    """Grey, with a rectangle in a colour."""
    image = Image.new("RGB", size, GREY)
    image.paste(colour, box)
    return image


def test_an_image_unlike_the_training_images_is_marked(
    bcnn: Bcnn, calibrated: BCNN, tmp_path: Path
) -> None:
    save_model(calibrated, tmp_path / "best.safetensors")
    Image.new("RGB", (32, 32), "navy").save(tmp_path / "navy.png")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    paths = [tmp_path / "navy.png", tmp_path / "noise.png"]
    outcome = bcnn("explain", tmp_path / "best.safetensors", *paths, "--output", tmp_path)
    marked = ["unlike the training images" in line for line in outcome.out.splitlines()]
    assert marked == [True, False]


@pytest.mark.parametrize(
    ("size", "mark", "target"),
    [((300, 150), (142, 34, 208, 100), 0), ((150, 300), (34, 142, 100, 208), 1)],
)
@pytest.mark.parametrize("unpadded", [False, True])
def test_the_mark_is_coloured_on_the_image(
    model: BCNN,
    size: tuple[int, int],
    mark: Box,
    target: int,
    unpadded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if unpadded:  # as a network without padding, whose maps lack the margin
        model = copy.deepcopy(model)
        vars(model.backbone).pop("offset", None)  # as measured before
        padded = model.backbone.forward_features
        monkeypatch.setattr(model.backbone, "forward_features", lambda x: padded(x)[..., 1:-1, 1:-1])
        monkeypatch.setattr(model.backbone, "min_size", 64)
    image = marked(size, mark, (RED, BLUE)[target])
    found = explain.explain(model, image, None, 1 - target)
    assert found.target == target
    picture = overlay(image, found.box, found.contrast.numpy(), float(found.contrast.max()))
    pixels = np.asarray(picture).astype(float)
    orange = pixels[..., 0] - pixels[..., 2]
    y, x = np.argwhere(orange > 0.9 * orange.max()).mean(axis=0)
    assert mark[0] <= x < mark[2] and mark[1] <= y < mark[3]


def test_figures_are_drawn_of_all_images_that_can_be_read(
    bcnn: Bcnn, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    marked((90, 80), (30, 30, 60, 60), RED).save("photos/a.png")
    Path("photos/b.jpg").write_text("no image")
    marked((80, 120), (20, 60, 60, 90), BLUE).save("photos/c.png")
    outcome = bcnn("explain", ckpt, "photos")
    assert outcome.code == 1
    (output,) = tmp_path.glob("outputs/*/*-explain")
    assert "a.png: red" in outcome.out and "c.png: blue" in outcome.out
    assert "photos/b.jpg" in outcome.err and "3 images, of which 1 failed" in outcome.err
    assert sorted(path.name for path in output.iterdir()) == ["a.png", "c.png"]
    assert Image.open(output / "a.png").width > 1000

    before = (output / "a.png").read_bytes()
    words = ["photos/a.png", "--output", output, "--target", "green", "--versus", "blue"]
    assert "a.png: green versus blue" in bcnn("explain", ckpt, *words).out
    assert (output / "a.png").read_bytes() == before and (output / "a-2.png").is_file()


def test_mistakes_are_one_sentence(bcnn: Bcnn, ckpt: Path, tmp_path: Path) -> None:
    marked((80, 80), (0, 0, 40, 40), RED).save(tmp_path / "a.png")
    for words, sentence in (
        (["--target", "rde"], "no class rde: did you mean red?"),
        (["--target", "apple"], "no class apple: there are red, blue, green"),
        (["--target", "red", "--versus", "red"], "choose another class"),
    ):
        outcome = bcnn("explain", ckpt, tmp_path / "a.png", "--output", tmp_path / "figures", *words)
        assert outcome.code == 1 and sentence in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "figures").exists()


def test_an_answer_that_is_not_finite_has_no_figure(bcnn: Bcnn, tiny: BCNN, tmp_path: Path) -> None:
    tiny.backbone.features.bias.data.zero_()
    tiny.backbone.features.weight.data.fill_(1e30)
    save_model(tiny, tmp_path / "huge.safetensors")
    for name, colour in (("red.png", RED), ("black.png", (0, 0, 0))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    words = [tmp_path / "huge.safetensors", tmp_path / "*.png", "--output", tmp_path / "figures"]
    outcome = bcnn("explain", *words)
    assert outcome.code == 1 and "nan" not in outcome.out
    assert "red.png: the network's answer has values that are not finite" in outcome.err
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["black.png"]


def test_a_map_may_end_beyond_its_image() -> None:
    image, shares = Image.new("RGB", (40, 20), GREY), np.array([[0, 1], [0, 0]], np.float32)
    pixels = np.asarray(overlay(image, (-20, -10, 60, 30), shares, 1)).astype(int)
    orange = pixels[..., 0] - pixels[..., 2]
    assert orange.shape == (20, 40)
    assert orange[0, -1] > 90 and abs(orange[[0, -1, -1], [0, 0, -1]]).max() < 10
