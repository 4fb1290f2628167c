"""Preprocessing: crops of evaluation and training, strips, and their agreement with Pillow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.image_io import MARGIN, ORIENTATION, load_image, load_reduced
from bcnn.data.transforms import Interpolation, Preprocessing, Resize
from benchmarks.photographs import photograph

SIDE = 48
BOUND = 3.0  # grey levels, on average over the pixels


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return photograph((640, 480), np.random.default_rng(0))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.float() - b.float()).abs().mean())


def ramp(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.tile(np.arange(width, dtype=np.uint8), (height, 1))).convert("RGB")


def test_keep_crops_the_centre_and_squash_keeps_everything() -> None:
    stripes = Image.new("RGB", (96, 32), (0, 0, 0))
    stripes.paste((255, 255, 255), (32, 0, 64, 32))
    kept = Preprocessing(32, "keep").evaluation()(stripes)
    squashed = Preprocessing(32, "squash").evaluation()(stripes)
    assert kept.shape == squashed.shape == (3, 32, 32) and kept.dtype == torch.uint8
    assert kept.float().mean() == 255
    assert 70 < squashed.float().mean() < 100


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 14, 16, 32]))
def test_a_whole_image_has_the_area_of_the_square_and_sides_that_the_network_takes(
    width: int, height: int, divisor: int
) -> None:
    preprocessing = Preprocessing(224, "whole", divisor=divisor, min_size=2 * divisor)
    across, down = preprocessing.whole_sides(width, height)
    ratio = min(max(width / height, 1 / 8), 8)  # of a longer strip
    assert across % divisor == down % divisor == 0
    assert abs(across - 224 * ratio**0.5) <= divisor / 2 and abs(down - 224 / ratio**0.5) <= divisor / 2


def test_a_whole_image_is_neither_cut_nor_padded() -> None:
    preprocessing = Preprocessing(64, "whole", divisor=16, min_size=32)
    found = preprocessing.evaluation()(ramp(200, 100))
    assert found.shape == (3, 48, 96) and found.dtype == torch.uint8
    assert found[0, :, 0].max() <= 2 and found[0, :, -1].min() >= 197
    assert preprocessing.crop(200, 100) == (0, 0, 200, 100)
    crops = [preprocessing.training(0.25)(ramp(200, 100)) for _ in range(20)]
    assert {crop.shape for crop in crops} == {(3, 64, 64)}  # 57.6, a multiple of 16


def test_crop_pct_resizes_to_more_than_the_crop() -> None:
    image = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))).convert("RGB")
    inner = Preprocessing(32, "squash", 0.5).evaluation()(image)
    expected = torch.from_numpy(np.asarray(image)[16:48, 16:48].copy()).permute(2, 0, 1)
    assert torch.equal(inner, expected)
    crops = {Preprocessing(32, "squash", 0.5).training()(image)[0].min().item() for _ in range(20)}
    assert len(crops) > 5


def test_crop_is_where_evaluation_looks() -> None:
    assert Preprocessing(32, "keep", 0.5).crop(200, 100) == (75, 25, 125, 75)
    assert Preprocessing(32, "squash", 0.5).crop(200, 100) == (50, 25, 150, 75)


@pytest.mark.parametrize("resize", ["keep", "squash"])
def test_training_crops_take_shares_of_the_image(resize: Resize) -> None:
    torch.manual_seed(0)
    transform = Preprocessing(32, resize, divisor=16, min_size=32).training(0.25)
    crops = [transform(ramp(200, 100))[0].float() for _ in range(50)]
    assert {crop.shape for crop in crops} == {(32, 32)}
    larger = Preprocessing(160, resize, divisor=16).training(0.25)
    assert larger(ramp(200, 100)).shape == (3, 144, 144)
    assert {bool(crop[0, 0] < crop[0, -1]) for crop in crops} == {True, False}  # mirrored or not
    spans = [float(crop.max() - crop.min()) for crop in crops]
    # A quarter of the area is 71 px square, at 4:5 63 px across; the most is 100 high, 125 across.
    least, most = (60, 125) if resize == "keep" else (85, 200)
    assert least < min(spans) < 0.8 * max(spans) and 0.8 * most < max(spans) < most


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", ["keep", "squash"])
def test_images_are_resized_as_pillow_does(interpolation: Interpolation, resize: Resize) -> None:
    """In evaluation and training, to two grey levels: the two filters differ by more than ten."""
    square = photograph((160, 160), np.random.default_rng(1))
    preprocessing = Preprocessing(80, resize, interpolation=interpolation)
    # Of a square, the one crop of all of its area and such an aspect is the whole.
    training = preprocessing.training(), replace(preprocessing, divisor=16).training(1.0)
    for transform in (preprocessing.evaluation(), *training):
        found = transform(square).permute(1, 2, 0).numpy().astype(int)
        pillows = square.resize(found.shape[:2], Image.Resampling[interpolation.upper()])
        assert any(abs(found - each).max() <= 2 for each in (pillows, ImageOps.mirror(pillows)))


@pytest.mark.parametrize("size", [(400, 20), (20, 400), (3000, 1), (500, 21)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_middle_of_a_strip_is_that_of_the_whole(
    size: tuple[int, int], crop_pct: float, interpolation: Interpolation
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    resized = v2.Resize([round(32 / crop_pct)], InterpolationMode(interpolation))
    whole = v2.Compose([v2.ToImage(), resized, v2.CenterCrop(32)])(image)
    ours = Preprocessing(32, "keep", crop_pct, interpolation).evaluation()(image)
    # Where the resized sides are whole numbers, nothing changes; else the middle moves a little.
    little = {"bilinear": 1, "bicubic": 2}[interpolation]
    assert (whole.int() - ours.int()).abs().max() <= (little if 21 in size or crop_pct < 1 else 0)


@pytest.mark.parametrize("resize", ["keep", "squash", "whole"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_line_takes_the_memory_of_any_image(resize: Resize, scale: float | None) -> None:
    line = Image.new("RGB", (1, 3000), (255, 0, 0))
    preprocessing = Preprocessing(448, resize, divisor=16)
    for transform in (preprocessing.evaluation(), preprocessing.training(scale)):
        assert transform.transforms[1](v2.functional.to_image(line)).numel() < 10e6
        assert transform(line).float().mean(dim=(1, 2)).tolist() == [255, 0, 0]


@pytest.mark.parametrize("resize", ["keep", "squash", "whole"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_the_crop_of_a_reduced_jpeg_is_that_of_the_whole(
    picture: Image.Image, tmp_path: Path, resize: Resize, mode: str, options: dict[str, Any]
) -> None:
    path = tmp_path / "large.jpg"
    picture.convert(mode).save(path, quality=90, **options)
    transform = Preprocessing(SIDE, resize).evaluation()
    reduced, whole = load_image(path, SIDE), load_image(path)
    assert reduced.size < whole.size and reduced.mode == "RGB"
    assert difference(transform(reduced), transform(whole)) < BOUND
    assert difference(transform(ImageOps.mirror(reduced)), transform(whole)) > 5 * BOUND


@pytest.mark.parametrize("scale", [0.08, 0.5, None])
def test_no_training_crop_of_a_large_jpeg_is_enlarged(
    picture: Image.Image, tmp_path: Path, scale: float | None
) -> None:
    size = min(picture.size) // 12
    for name in "ab":
        path = tmp_path / name / f"{name}.jpg"
        path.parent.mkdir()
        picture.save(path)
    data = FineGrainedDataModule(
        tmp_path, size=size, train_scale=scale, val_fraction=0, test_fraction=0, num_workers=0
    )
    data.setup()
    loaded = data.train_dataloader().dataset.load(str(path))
    smallest = (0.8 * (scale or 1)) ** 0.5 * min(loaded.size)
    assert smallest >= 0.9 * size and (scale == 0.08) == (min(loaded.size) > 3 * size)


def test_a_large_image_is_cached_and_the_same_if_it_cannot_be(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.jpg"
    picture.save(path, quality=90)
    for cache in (str(tmp_path), "/dev/null"):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        images = [load_reduced(path, SIDE) for _ in range(2)]
        assert len({image.tobytes() for image in images}) == 1
        (copy,) = (tmp_path / "bcnn" / "reduced").rglob("*.*")
        assert min(images[0].size) == MARGIN * SIDE
    transform = Preprocessing(SIDE).evaluation()
    assert difference(transform(images[0]), transform(picture)) < BOUND
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Image.new("RGB", images[0].size, "red").save(copy)
    assert load_reduced(path, SIDE).getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=4)
    path.write_bytes(path.read_bytes())  # another file, for all that is known
    assert load_reduced(path, SIDE).tobytes() == images[0].tobytes()


def test_copies_are_upright_and_of_large_images_only(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small, turned = tmp_path / "small.jpg", tmp_path / "turned.jpg"
    picture.resize((2 * SIDE, 2 * SIDE)).save(small)
    assert load_reduced(small, SIDE).tobytes() == load_image(small, SIDE).tobytes()
    assert not (tmp_path / "bcnn").exists()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture.save(turned, exif=exif)
    for _ in range(2):
        width, height = load_reduced(turned, SIDE).size
        assert width < height
