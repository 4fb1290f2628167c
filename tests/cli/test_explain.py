"""Explanations: the figures, the places that they point at, and what is said on the way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_near_sighted
from PIL import Image

from bcnn.cli import explain
from bcnn.data.transforms import Preprocessing, Resize
from bcnn.evaluation import inference
from bcnn.evaluation.heatmap import overlay
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import save_model
from bcnn.utils.options import command

RED, BLUE, GREEN, GREY = (230, 25, 25), (25, 25, 230), (25, 230, 25), (128, 128, 128)


@pytest.fixture(scope="module")
def model() -> BCNN:
    """Tells colours apart, blind to grey; its crops (72 px) are no whole number of locations."""
    torch.manual_seed(0)
    model = BCNN(["red", "blue", "green"], Preprocessing(72)).eval()
    model.backbone.set_normalization([0.5] * 3, [0.25] * 3)
    make_near_sighted(model)
    examples = [marked((72, 72), (0, 0, 32, 32), colour) for colour in (RED, BLUE, GREEN)]
    with torch.no_grad():
        rows = model.descriptor(
            torch.stack([model.preprocessing.evaluation()(image) for image in examples])
        )
        model.head.center_on(rows.mean(dim=0))
        model.head.weight.copy_(20 * (rows - rows.mean(dim=0)))
    return model


@pytest.fixture(scope="module")
def ckpt(model: BCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    save_model(model, path)
    return path


def marked(
    size: tuple[int, int], box: tuple[int, int, int, int], colour: tuple[int, ...]
) -> Image.Image:
    """Grey, with a rectangle in a colour."""
    image = Image.new("RGB", size, GREY)
    image.paste(colour, box)
    return image


def run(*words: str) -> int:
    return command(explain.Options, explain.main, explain.USAGE, words)


@pytest.mark.parametrize("size", [(144, 90), (60, 133), (72, 72)])
@pytest.mark.parametrize("resize", ["keep", "squash"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.75])
def test_the_crop_lies_where_the_transform_looks(
    size: tuple[int, int], resize: Resize, crop_pct: float
) -> None:
    """On an image whose pixels say where they are."""
    across = np.linspace(0, 255, size[0]).astype(np.uint8)
    down = np.linspace(0, 255, size[1]).astype(np.uint8)
    where = np.stack(np.broadcast_arrays(across[None, :], down[:, None], np.uint8(0)), axis=-1)
    seen = Preprocessing(72, resize, crop_pct).evaluation()(Image.fromarray(where)).float()
    left, top, right, bottom = Preprocessing(72, resize, crop_pct).crop(*size)
    edges = [seen[0, 36, 0], seen[1, 0, 36], seen[0, 36, -1], seen[1, -1, 36]]
    expected = [
        255 * edge / side for edge, side in zip((left, top, right, bottom), size * 2, strict=True)
    ]
    assert np.allclose(edges, expected, atol=4)


@pytest.mark.parametrize(
    ("size", "mark"), [((300, 150), (142, 34, 208, 100)), ((150, 300), (34, 142, 100, 208))]
)
@pytest.mark.parametrize("target", [0, 1])
def test_the_mark_is_coloured_on_the_photograph(
    model: BCNN, size: tuple[int, int], mark: tuple[int, int, int, int], target: int
) -> None:
    photograph = marked(size, mark, (RED, BLUE)[target])
    found = inference.explain(model, photograph, against=1 - target)
    assert found.target == target
    picture = overlay(photograph, found.box, found.contrast.numpy(), float(found.contrast.max()))
    pixels = np.asarray(picture).astype(float)
    orange = pixels[..., 0] - pixels[..., 2]
    y, x = np.unravel_index(orange.argmax(), orange.shape)
    left, top, right, bottom = mark
    assert left <= x < right and top <= y < bottom


def test_what_the_likeliest_class_is_compared_with_is_another(model: BCNN) -> None:
    photograph = marked((90, 80), (30, 30, 60, 60), RED)
    likeliest = inference.explain(model, photograph)
    found = inference.explain(model, photograph, against=likeliest.target)
    assert (found.target, found.against) == (likeliest.against, likeliest.target)


def test_the_maps_sum_to_the_logits(model: BCNN) -> None:
    photograph = marked((90, 80), (30, 30, 60, 60), RED)
    found = inference.explain(model, photograph, target=2)
    assert (found.target, found.against) == (2, 0) and found.contrast.shape == (4, 4)
    assert found.crop == (5, 0, 85, 80)
    assert found.box == pytest.approx((5, 0, 5 + 80 * 64 / 72, 80 * 64 / 72))
    likely = found.probabilities.log()
    torch.testing.assert_close(found.contrast.sum(), likely[2] - likely[0], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        logits = model(model.preprocessing.evaluation()(photograph)[None])[0]
    torch.testing.assert_close(found.evidence.sum(), logits[2], rtol=0.02, atol=0.02)


def test_figures_are_drawn_for_all_that_can_be_read(
    ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    marked((90, 80), (30, 30, 60, 60), RED).save(photos / "a.png")
    (photos / "b.jpg").write_text("no photograph")
    marked((80, 120), (20, 60, 60, 90), BLUE).save(photos / "c.png")
    assert run(f"ckpt={ckpt}", str(photos)) == 1
    (output,) = tmp_path.glob("outputs/*/*-explain")
    said = capsys.readouterr()
    assert "a.png: red" in said.out and "c.png: blue" in said.out
    assert "cannot read the image" in said.err and "b.jpg" in said.err and "Traceback" not in said.err
    assert sorted(path.name for path in output.iterdir()) == ["a.png", "c.png"]
    with Image.open(output / "a.png") as figure:
        assert figure.width > 1000
    before = (output / "a.png").read_bytes()
    assert (
        run(f"ckpt={ckpt}", str(photos / "a.png"), f"output={output}", "target=green", "against=blue")
        == 0
    )
    assert "green" in capsys.readouterr().out
    assert (output / "a.png").read_bytes() == before and (output / "a-2.png").is_file()


def test_mistakes_are_told(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photograph = tmp_path / "a.png"
    marked((80, 80), (0, 0, 40, 40), RED).save(photograph)
    output = f"output={tmp_path / 'figures'}"
    for words, sentence in (
        ([str(photograph), "target=rde"], "did you mean red"),
        ([str(photograph), "target=red", "against=red"], "choose another class"),
        ([str(tmp_path / "nowhere")], "nowhere"),
        ([], "which photographs"),
    ):
        assert run(f"ckpt={ckpt}", output, *words) == 1
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()


def test_an_answer_that_is_not_finite_has_no_figure(
    tiny: BCNN, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.backbone.features.bias.data.zero_()
    tiny.backbone.features.weight.data.fill_(1e30)
    save_model(tiny, tmp_path / "huge.safetensors")
    for name, colour in (("$5^$ red.png", RED), ("$5^$ black.png", (0, 0, 0))):
        marked((32, 32), (0, 0, 32, 32), colour).save(tmp_path / name)
    words = (str(tmp_path / "$5^$*.png"), f"output={tmp_path / 'figures'}")
    assert run(f"ckpt={tmp_path / 'huge.safetensors'}", *words) == 1
    said = capsys.readouterr()
    assert "$5^$ red.png: the network's answer has values that are not finite" in said.err
    assert "nan" not in said.out and [p.name for p in (tmp_path / "figures").iterdir()] == [
        "$5^$ black.png"
    ]
