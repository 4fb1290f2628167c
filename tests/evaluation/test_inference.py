"""The model as a library: `load_model(path).predict(images)`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, write_images
from PIL import Image
from torch import nn

from bcnn import load_model
from bcnn.data.image_io import load_image
from bcnn.data.transforms import Preprocessing
from bcnn.evaluation.inference import predict_paths
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.third_party import to_original
from bcnn.utils.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BCNN:
    """As `load_model` opens it, with a classifier that tells images apart."""
    torch.manual_seed(0)
    model = BCNN(list(COLOURS))
    nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(to_original(model), path)
    loaded = load_model(path, classes=list(COLOURS))
    loaded.preprocessing = Preprocessing(32)
    return loaded


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    write_images(tmp_path, 2)
    return sorted(tmp_path.glob("*/*.png"))


def test_paths_pil_images_and_a_batch_are_the_same_photographs(model: BCNN, paths: list[Path]) -> None:
    probabilities = model.predict(paths)
    assert probabilities.shape == (len(paths), len(COLOURS)) and not probabilities.requires_grad
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(paths)))
    assert (probabilities.std(dim=0) > 0).all()
    opened = [Image.open(path) for path in paths]
    torch.testing.assert_close(model.predict(opened), probabilities)
    batch = torch.stack([model.preprocessing.evaluation()(load_image(path)) for path in paths])
    assert batch.dtype == torch.uint8 and batch.shape[1:] == (3, 32, 32)
    torch.testing.assert_close(model.predict(batch), probabilities)


def test_the_crop_is_as_large_a_share_as_in_training(model: BCNN, tmp_path: Path) -> None:
    frame = Image.new("RGB", (64, 64), "red")
    frame.paste("blue", (8, 8, 56, 56))
    whole = model.preprocessing.evaluation()(frame)
    model.preprocessing = replace(model.preprocessing, crop_pct=0.5)
    middle = model.preprocessing.evaluation()(frame)
    model.preprocessing = replace(model.preprocessing, crop_pct=1.0)
    assert whole.shape == middle.shape == (3, 32, 32)
    assert whole[0].max() == 255 and middle[0].max() == 0


def test_one_photograph_is_a_batch_of_one(model: BCNN, paths: list[Path]) -> None:
    expected = model.predict(paths[:1])
    for one in (paths[0], str(paths[0]), Image.open(paths[0])):
        torch.testing.assert_close(model.predict(one), expected)


def test_a_photograph_lying_on_its_side_is_read_upright(model: BCNN, tmp_path: Path) -> None:
    pixels = torch.randint(256, (48, 32, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to see it upright
    Image.fromarray(pixels).rotate(90, expand=True).save(tmp_path / "lying.png", exif=exif)
    upright, lying = tmp_path / "upright.png", Image.open(tmp_path / "lying.png")
    torch.testing.assert_close(model.predict(lying), model.predict(upright))


def test_a_loaded_model_is_ready_for_use(model: BCNN) -> None:
    assert not any(module.training for module in model.modules())


def test_a_broken_photograph_is_named(model: BCNN, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_text("not a photograph")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        model.predict(tmp_path / "broken.jpg")


def test_arrays_are_photographs(model: BCNN, paths: list[Path]) -> None:
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    expected = model.predict(paths)
    torch.testing.assert_close(model.predict(arrays), expected)
    torch.testing.assert_close(model.predict([*arrays]), expected)
    torch.testing.assert_close(model.predict(arrays[0]), expected[:1])


def test_what_is_no_photograph_is_told(model: BCNN) -> None:
    assert model.predict([]).shape == (0, len(COLOURS))
    for wrong in ([None], [b"bytes"], np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(TypeError, match="is no photograph: give a path, a PIL image, or an array"):
            model.predict(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"floating point is in 0\.\.1"):
        model.predict(torch.full((1, 3, 32, 32), 255.0))
    with pytest.raises(UserError, match=r"there is no image nowhere\.jpg$"):
        model.predict("nowhere.jpg")


def test_a_cpu_in_float32_takes_few_photographs_at_a_time(
    model: BCNN, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: together.append(len(inputs[0])))
    for fastest, expected in (("32-true", [2, 2, 2]), ("bf16-mixed", [6])):
        monkeypatch.setattr("bcnn.evaluation.inference.fastest_precision", lambda _, name=fastest: name)
        together.clear()
        assert len(list(predict_paths(model, [*map(str, paths)], workers=0))) == 6
        assert together == expected
