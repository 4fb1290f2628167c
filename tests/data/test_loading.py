"""Large JPEGs: decoded at a fraction of their size, and the same photograph for the network."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import set_up, write_classes
from PIL import Image, ImageOps

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.image_cache import load_reduced
from bcnn.data.image_io import MARGIN, load_image
from bcnn.data.transforms import Interpolation, Preprocessing, Resize
from bcnn.utils.errors import UserError
from benchmarks.photographs import photograph

SIDE = 48
LARGE = (640, 480)
BOUND = 3.0  # grey levels, on average over the pixels


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return photograph(LARGE, np.random.default_rng(0))


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, quality=90, **options)
    return path


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.float() - b.float()).abs().mean())


@pytest.mark.parametrize("side", [16, 24, 40, 60, 100, 160, 240, 480, 1000])
def test_what_is_left_is_never_less_than_the_margin(
    picture: Image.Image, tmp_path: Path, side: int
) -> None:
    loaded = load_image(save(picture, tmp_path / "large.jpg"), side)
    fractions = [s for s in (8, 4, 2, 1) if min(LARGE) // s >= MARGIN * side] or [1]
    assert loaded.size == tuple(length // fractions[0] for length in LARGE)


@pytest.mark.parametrize("resize", ["keep", "squash"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_the_crop_is_that_of_the_whole_image(
    picture: Image.Image, tmp_path: Path, resize: Resize, options: dict[str, Any]
) -> None:
    path = save(picture, tmp_path / "large.jpg", **options)
    transform = Preprocessing(SIDE, resize).evaluation()
    reduced, whole = load_image(path, SIDE), load_image(path)
    assert reduced.size < whole.size
    assert difference(transform(reduced), transform(whole)) < BOUND
    assert difference(transform(ImageOps.mirror(reduced)), transform(whole)) > 5 * BOUND


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", ["keep", "squash"])
def test_images_are_resized_as_pillow_does(interpolation: Interpolation, resize: Resize) -> None:
    """In evaluation and training, to two grey levels: the two filters differ by more than ten."""
    square = photograph((160, 160), np.random.default_rng(1))
    preprocessing = Preprocessing(80, resize, interpolation=interpolation)
    # Of a square, the one crop of all of its area and such an aspect is the whole.
    for transform in (
        preprocessing.evaluation(),
        preprocessing.training(),
        preprocessing.training(1.0, step=16),
    ):
        found = transform(square).permute(1, 2, 0).numpy().astype(int)
        pillows = square.resize(found.shape[:2], Image.Resampling[interpolation.upper()])
        assert any(abs(found - each).max() <= 2 for each in (pillows, ImageOps.mirror(pillows)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_images_are_upright(picture: Image.Image, tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(picture, tmp_path / "turned.jpg", exif=exif)
    reduced, whole = load_image(path, SIDE), ImageOps.exif_transpose(Image.open(path))
    assert (reduced.width < reduced.height) == (orientation > 4)
    transform = Preprocessing(SIDE, "squash").evaluation()
    assert difference(transform(reduced), transform(whole)) < BOUND


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_reduced_images_are_rgb(picture: Image.Image, tmp_path: Path, mode: str) -> None:
    path = save(picture.convert(mode), tmp_path / "large.jpg")
    reduced, whole = load_image(path, SIDE), load_image(path)
    assert reduced.mode == whole.mode == "RGB" and reduced.size < whole.size
    transform = Preprocessing(SIDE, "keep").evaluation()
    assert difference(transform(reduced), transform(whole)) < BOUND


@pytest.mark.parametrize("name", ["small.jpg", "large.png"])
def test_other_images_are_decoded_whole(picture: Image.Image, tmp_path: Path, name: str) -> None:
    image = picture if name.endswith("png") else picture.crop((0, 0, 100, 90))
    path = save(image, tmp_path / name)
    np.testing.assert_array_equal(load_image(path, SIDE), load_image(path))


def test_a_large_file_cut_short_is_named(picture: Image.Image, tmp_path: Path) -> None:
    path = save(picture, tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        load_image(path, SIDE)


def test_folders_load_reduced_images(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The side is the one that images are resized to, not the crop's: a third more than it here."""
    samples = [(str(save(picture, tmp_path / "large.jpg")), 0)]
    sides = []
    monkeypatch.setattr(
        "bcnn.data.datamodule.load_image", lambda path, side: sides.append(side) or picture
    )
    data = FineGrainedDataModule(tmp_path, SIDE, crop_pct=0.75, num_workers=0)
    data.step = 16
    data.train = samples
    for loader in (data.train_dataloader(), data.evaluation_dataloader(samples)):
        assert next(iter(loader))[0].shape == (1, 3, SIDE, SIDE)
    assert sides == [64, 64]


def test_a_large_file_is_kept_reduced_and_the_same_whether_it_is_kept_or_not(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(picture, tmp_path / "large.jpg")
    for name, cache in (("kept", tmp_path), ("not", Path(os.devnull))):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        images = [load_reduced(path, SIDE) for _ in range(2)]
        assert all(image.tobytes() == images[0].tobytes() for image in images), name
        copies = list((tmp_path / "bcnn" / "reduced").rglob("*.*"))
        assert len(copies) == 1 and min(images[0].size) == MARGIN * SIDE
    transform = Preprocessing(SIDE).evaluation()
    assert difference(transform(images[0]), transform(picture)) < BOUND
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Image.new("RGB", images[0].size, "red").save(copies[0])
    assert load_reduced(path, SIDE).getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=4)
    os.utime(path, ns=(0, 0))  # another file, for all that is known
    assert load_reduced(path, SIDE).tobytes() == images[0].tobytes()


def test_copies_are_upright_and_of_large_readable_files_alone(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = save(picture.resize((2 * SIDE, 2 * SIDE)), tmp_path / "small.jpg")
    assert load_reduced(small, SIDE).tobytes() == load_image(small, SIDE).tobytes()
    with pytest.raises(UserError, match=r"none\.jpg"):
        load_reduced(tmp_path / "none.jpg", SIDE)
    monkeypatch.setattr("bcnn.data.image_cache.LONGEST", 90)
    long = save(picture, tmp_path / "long.jpg")
    assert load_reduced(long, SIDE).tobytes() == load_image(long, SIDE).tobytes()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not (tmp_path / "bcnn").exists()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(picture, tmp_path / "turned.jpg", exif=exif)
    for _ in range(2):
        assert load_reduced(turned, SIDE).size[0] < load_reduced(turned, SIDE).size[1]


@pytest.mark.parametrize("cache", [True, False])
def test_what_is_trained_on_is_kept_reduced_and_what_is_evaluated_is_not(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("train/a/0", "train/b/1", "val/a/2", "val/b/3"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        save(ImageOps.mirror(picture) if "b" in name else picture, tmp_path / f"photos/{name}.jpg")
    data = FineGrainedDataModule(
        tmp_path / "photos", size=SIDE, num_workers=0, batch_size=2, cache=cache
    )
    data.setup()
    for loader in (data.val_dataloader(), data.sample_dataloader(), data.train_dataloader()):
        assert not list(tmp_path.glob("bcnn/reduced/*/*"))
        for _ in loader:
            pass
    assert len(list(tmp_path.glob("bcnn/reduced/*/*"))) == 2 * cache


def test_a_sample_of_the_training_images_is_theirs_in_small(tmp_path: Path) -> None:
    """Never empty, however few images a class has, and of each class its share."""
    write_classes(tmp_path / "few", **{f"class{k}": 1 for k in range(9)})
    write_classes(tmp_path / "uneven", many=40, few=8)
    few = set_up(tmp_path / "few", val_fraction=0, test_fraction=0)
    labels = torch.cat([label for _, label in few.sample_dataloader(5)])
    assert len(labels) == len(labels.unique()) == 5
    uneven = set_up(tmp_path / "uneven", val_fraction=0, test_fraction=0)
    labels = torch.cat([label for _, label in uneven.sample_dataloader(12)])
    assert labels.bincount().tolist() == [2, 10]
    assert len(torch.cat([label for _, label in uneven.sample_dataloader()])) == 48
    drawn = [set_up(tmp_path / "uneven", val_fraction=0, test_fraction=0, seed=s) for s in (0, 0, 1)]
    paths = [each.sample_dataloader(12).dataset.samples for each in drawn]  # type: ignore[attr-defined]
    assert paths[0] == paths[1] != paths[2]
