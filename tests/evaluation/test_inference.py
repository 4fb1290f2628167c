"""Predictions of image files and of labelled splits."""

import math
from pathlib import Path

import pytest
import torch
from conftest import Run, folder_data, network, save_checkpoint, write_images
from PIL import Image

from bcnn.data.transforms import Preprocessing
from bcnn.evaluation.inference import predict_paths, predict_split
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.errors import UserError


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    write_images(tmp_path, 2)
    return sorted(tmp_path.glob("*/*.png"))


def test_an_image_that_cannot_be_read_does_not_stop_the_others(
    tiny: BCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: str, side: int) -> Image.Image:
        if path == "b":
            raise MemoryError  # decoders raise anything
        return Image.new("RGB", (32, 32))

    monkeypatch.setattr("bcnn.evaluation.inference.load_image", load)
    for batch in (1, 2, 3):  # alone in a batch, and with others
        found = list(predict_paths(tiny, ["a", "b", "c"], batch=batch, workers=0))
        assert [each.error for each in found] == ["", "MemoryError()", ""]
        assert [len(each.pairs) for each in found] == [3, 0, 3]


def test_nor_does_it_where_the_sides_are_multiples(tmp_path: Path) -> None:
    backbone = {"name": "timm", "model": "resnet10t"}
    model = BCNN(["a", "b"], Preprocessing(100, "whole"), backbone, {"name": "average"})
    (tmp_path / "a.png").write_bytes(b"none")
    (found,) = predict_paths(model.eval(), [str(tmp_path / "a.png")], workers=0)
    assert "not an image" in found.error


def test_predictions_come_before_the_list_is_read_to_its_end(tiny: BCNN, paths: list[Path]) -> None:
    found = predict_paths(tiny, [str(paths[0])] * 2 + ["never opened"], top=1, batch=2, workers=0)
    first = next(found)
    assert first.pairs[0][1] == pytest.approx(tiny.predict(paths[0]).max().item(), abs=1e-5)


def test_descriptors_and_mirrored_images_of_a_split(tiny: BCNN, images: Path) -> None:
    data = folder_data(images)
    batches = [*data.test_dataloader()]
    with torch.no_grad():
        descriptors = [(tiny.descriptor(x), y) for x, y in batches]
        logits = torch.cat([tiny(x) for x, _ in batches])
        mirrored = torch.cat([tiny(x.flip(-1)) for x, _ in batches])
    made = predict_split(tiny, data.test, batches, "32-true")
    torch.testing.assert_close(made.probabilities, logits.softmax(1))
    assert list(zip(made.paths, made.labels.tolist(), strict=True)) == data.test
    stored = predict_split(tiny, data.test, descriptors, "32-true")
    torch.testing.assert_close(stored.probabilities, made.probabilities)
    both = predict_split(tiny, data.test, batches, "32-true", mirror=True)
    torch.testing.assert_close(both.probabilities, ((logits + mirrored) / 2).softmax(1))


def test_outputs_that_are_not_finite_become_no_figures(tiny: BCNN, images: Path) -> None:
    data = folder_data(images)
    next(tiny.backbone.parameters()).data.fill_(1e30)
    with pytest.raises(UserError, match=r"test/blue/0\.png: .* not finite numbers"):
        predict_split(tiny, data.test, data.test_dataloader(), "32-true")
    (found,) = predict_paths(tiny, [data.test[0][0]], workers=0)
    assert "not finite numbers" in found.error and not found.pairs
    hidden = tiny.probabilities(torch.tensor([[0.0, -math.inf], [0.0, 0.0]]))
    assert hidden[0].isnan().all() and hidden[1].tolist() == [0.5, 0.5]


def test_prediction_imports_none_of_the_libraries_of_training(python: Run, paths: list[Path]) -> None:
    checkpoint = save_checkpoint(network(), paths[0].with_name("model.ckpt"))
    code = (
        "import bcnn, sys; model = bcnn.load_model(sys.argv[1]);"
        "print(*next(bcnn.predict_paths(model, sys.argv[2:])).pairs[0]);"
        "print('imported:', *sys.modules)"
    )
    run = python("-c", code, str(checkpoint), str(paths[0]))
    assert run.returncode == 0 and run.stdout.split()[0] in network().classes, run.stderr
    imported = {*run.stdout.partition("imported:")[2].split()}
    of_training = {"lightning", "torchmetrics", "hydra", "omegaconf", "scipy", "matplotlib", "jinja2"}
    assert "bcnn.models.bilinear_cnn" in imported and not of_training & imported
