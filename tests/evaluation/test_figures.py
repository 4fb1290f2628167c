"""Attributions as they are drawn; the command's tests say where they lie on the image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import folder_data
from matplotlib import rc_context
from PIL import Image

from bcnn.evaluation.explain import draw, explain, explain_mistakes
from bcnn.evaluation.inference import predict_split
from bcnn.models.bilinear_cnn import BCNN

pytestmark = pytest.mark.figures


def test_attributions_of_mistakes_sum_to_the_logits_of_both_classes(
    tiny: BCNN, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def note(image: Image.Image, box: object, shares: np.ndarray, limit: float) -> Image.Image:
        assert max(image.size) == 100 and abs(shares).max() <= limit
        drawn.append(float(shares.sum()))
        return image

    monkeypatch.setattr("bcnn.evaluation.explain.overlay", note)
    data = folder_data(images)
    made = predict_split(tiny, data.test, data.test_dataloader(), "32-true")
    wrong = made.confident_mistakes(3)
    assert wrong and list(explain_mistakes(tiny, made, wrong, side=100)) == wrong
    with torch.no_grad():
        logits = torch.cat([tiny(batch) for batch, _ in data.test_dataloader()])
    expected = [logits[wrong, made.predicted[wrong]], logits[wrong, made.labels[wrong]]]
    assert drawn == pytest.approx(torch.stack(expected, 1).flatten().tolist(), rel=0.02, abs=0.02)


def test_the_class_to_compare_with_is_another_one(tiny: BCNN) -> None:
    image = Image.new("RGB", (40, 30), "red")
    likeliest = explain(tiny, image)
    found = explain(tiny, image, against=likeliest.target)
    assert (found.target, found.against) == (likeliest.against, likeliest.target)


def test_names_are_drawn_literally(tiny: BCNN, tmp_path: Path) -> None:
    found = explain(tiny, Image.new("RGB", (40, 30), "red"), target=0, against=1)
    figure = draw(found, ["$5^$\t", "blue", "red"], "costs $x_1$\x1b\udcff\nof two lines")
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert r"costs $x_1$\x1b\xff" in text and r"$5^$\t" in text


def test_a_drawing_covers_and_frames_the_same_parts_at_any_size(tiny: BCNN) -> None:
    found = explain(tiny, Image.new("RGB", (120, 60), "grey"))
    assert found.crop == found.box == (30, 0, 90, 60)
    for shares, inside in ((None, 128), (torch.ones(2, 2), 130)):
        pixels = np.asarray(found.drawn(40, shares)).astype(int)[10, :, 0]
        assert pixels.shape == (40,) and (pixels[[9, 10, 29, 30]] == [0, 255, 255, 0]).all()
        assert (pixels[[0, 8, 31, 39]] == pixels[0]).all() and (pixels[11:29] == inside).all()
