"""Image folders: decoding, transforms, splits, and the mistakes people make."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.image_io import load_image
from bcnn.data.transforms import Preprocessing
from bcnn.utils.errors import UserError


def set_up(root: Path, **options: object) -> FineGrainedDataModule:
    data = FineGrainedDataModule(root, size=32, num_workers=0, **options)  # type: ignore[arg-type]
    data.setup()
    return data


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_colour_mode_becomes_rgb_of_the_same_brightness(tmp_path: Path, mode: str) -> None:
    grey = Image.new("L", (8, 6), 255 if mode == "1" else 128)
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 8), 128 * 257, np.uint16))
    elif mode == "P":
        image = grey.convert("RGB").quantize(4)
    elif mode in ("RGBA", "CMYK", "RGB"):
        image = grey.convert("RGB").convert(mode)
    else:
        image = grey.convert(mode)
    path = tmp_path / ("image.tiff" if mode in ("CMYK", "F") else "image.png")
    image.save(path)
    loaded = load_image(path)
    assert (loaded.mode, loaded.size) == ("RGB", (8, 6))
    expected = 255 if mode == "1" else 128
    assert abs(np.asarray(loaded).astype(int) - expected).max() <= 2


def test_transparent_pixels_show_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(load_image(tmp_path / "clear.png")).min() == 255


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    image.paste((255, 255, 255), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # hold the camera's right side down: rotate clockwise to see it upright
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = load_image(tmp_path / "turned.jpg")
    assert upright.size == (10, 20)
    assert np.asarray(upright)[:8].mean() > 240 and np.asarray(upright)[12:].mean() < 15


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a photograph")
    with pytest.raises(UserError, match=r"text\.jpg"):
        load_image(tmp_path / "text.jpg")


def test_keep_crops_the_centre_and_squash_keeps_everything() -> None:
    stripes = Image.new("RGB", (96, 32), (0, 0, 0))
    stripes.paste((255, 255, 255), (32, 0, 64, 32))
    kept = Preprocessing(32, "keep").evaluation()(stripes)
    squashed = Preprocessing(32, "squash").evaluation()(stripes)
    assert kept.shape == squashed.shape == (3, 32, 32) and kept.dtype == torch.uint8
    assert kept.float().mean() == 255
    assert 70 < squashed.float().mean() < 100


def test_training_crops_and_flips_at_random() -> None:
    ramp = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (32, 1))).convert("RGB")
    transform = Preprocessing(32, "keep").training()
    torch.manual_seed(0)
    crops = [transform(ramp)[0, 0] for _ in range(20)]
    assert len({int(crop.min()) for crop in crops}) > 5
    assert {bool(crop[0] < crop[-1]) for crop in crops} == {True, False}


@pytest.mark.parametrize("resize", ["keep", "squash"])
def test_training_crops_take_shares_of_the_image(resize: str) -> None:
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1))).convert("RGB")
    torch.manual_seed(0)
    crops = [Preprocessing(32, resize).training(0.25, 16, 32)(ramp)[0].float() for _ in range(50)]
    assert {crop.shape for crop in crops} == {(32, 32)}
    assert Preprocessing(160, resize).training(0.25, 16, 32)(ramp).shape == (3, 144, 144)
    spans = [float(crop.max() - crop.min()) for crop in crops]
    # A quarter of its area is 71 px square, at 4:5 63 across; at most, 100 high, 125 across.
    least, most = (60, 125) if resize == "keep" else (85, 200)
    assert least < min(spans) < 0.8 * max(spans) and 0.8 * most < max(spans) < most


def test_folders_become_splits(images: Path) -> None:
    data = set_up(images, val_fraction=0.34)
    assert data.classes == ["blue", "green", "red"]
    assert [len(split) for split in (data.train, data.val, data.test)] == [12, 6, 6]
    everything = set_up(images, val_fraction=0)
    assert [len(split) for split in (everything.train, everything.val)] == [18, 0]
    write_images(images / "val", 1, seed=3)
    own = set_up(images, val_fraction=0.34)
    assert [len(split) for split in (own.train, own.val)] == [18, 3]


def test_labels_of_test_are_those_of_training(images: Path) -> None:
    for name in ("blue", "green"):
        for path in (images / "test" / name).iterdir():
            path.unlink()
        (images / "test" / name).rmdir()
    assert {label for _, label in set_up(images).test} == {2}


def test_hidden_files_are_no_images(images: Path) -> None:
    (images / "train" / "red" / "._0.png").write_bytes(b"resource fork")
    (images / "train" / "red" / "notes.txt").write_text("sunny")
    assert len(set_up(images, val_fraction=0).train) == 18


def test_crop_pct_resizes_to_more_than_the_crop_shows(images: Path) -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))).convert("RGB")
    inner = Preprocessing(32, "squash", 0.5).evaluation()(ramp)
    assert torch.equal(inner, torch.from_numpy(np.asarray(ramp)[16:48, 16:48].copy()).permute(2, 0, 1))
    crops = {Preprocessing(32, "squash", 0.5).training()(ramp)[0].min().item() for _ in range(20)}
    assert len(crops) > 5  # a squashed image without a margin has one crop only
    data = set_up(images, crop_pct=0.5)
    assert next(iter(data.evaluation_dataloader(data.test)))[0].shape == (6, 3, 32, 32)
    for share in (0, 1.5):
        for option in ("crop_pct", "train_scale"):
            with pytest.raises(UserError, match=option):
                set_up(images, **{option: share})


def test_chosen_classes_keep_their_images_and_splits(images: Path) -> None:
    everything = set_up(images, val_fraction=0)
    data = set_up(images, val_fraction=0, classes=["red", "blue"])
    assert data.classes == ["blue", "red"]
    for before, after in ((everything.train, data.train), (everything.test, data.test)):
        named = [(path, everything.classes[label]) for path, label in before]
        kept = [(path, name) for path, name in named if name != "green"]
        assert [(path, data.classes[label]) for path, label in after] == kept
    assert len(set_up(images, val_fraction=0.34, classes=["red", "blue"]).val) == 4


def test_a_number_of_classes_is_drawn_by_seed(images: Path) -> None:
    drawn = [set_up(images, classes=2, seed=seed).classes for seed in range(12)]
    assert drawn == [set_up(images, classes=2, seed=seed).classes for seed in range(12)]
    assert {tuple(names) for names in drawn} == {("blue", "green"), ("blue", "red"), ("green", "red")}
    assert set_up(images, classes=3).classes == ["blue", "green", "red"]


@pytest.mark.parametrize("classes", [1, 4, -1, ["red"], ["red", "rde"], ["red", "red"]])
def test_classes_that_cannot_be_had_are_told(images: Path, classes: object) -> None:
    with pytest.raises(UserError, match="there are red" if classes == ["red", "rde"] else "2 to 3"):
        set_up(images, classes=classes)
