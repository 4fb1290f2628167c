"""Images that look the same: what a perceptual hash keeps of an image, and what it tells apart."""

import io
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bcnn.data.image_io import ORIENTATION
from bcnn.data.integrity import inspect
from bcnn.data.lookalikes import NEAR, look_alike_groups, near_duplicates


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Soft patches of colour, with some noise."""
    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(0, 255, (7, 9, 3), np.uint8))
    pixels = np.asarray(patches.resize(size, Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray((pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8))


def look(folder: Path, image: Image.Image, kind: str = "PNG", **options: Any) -> int | None:
    """The hash of an image that is saved so."""
    image.save(folder / "image", kind, **options)
    found = inspect(str(folder / "image"))
    assert not found.error
    return found.perceptual_hash


SIZES = [(501, 347), (333, 500), (180, 121), (100, 75)]  # of which most are no multiples of 8


@pytest.mark.parametrize("size", SIZES)
def test_an_image_saved_again_has_nearly_the_same_hash(size: tuple[int, int], tmp_path: Path) -> None:
    hashes = []
    for seed in range(4):
        image = picture(seed, size)
        first = look(tmp_path, image, "JPEG", quality=92)
        assert first is not None
        hashes.append(first)
        content = io.BytesIO()
        image.save(content, "JPEG", quality=92)
        saved = Image.open(content)
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        turned = saved.transpose(Image.Transpose.ROTATE_90)
        again = {
            "quality 60": look(tmp_path, saved, "JPEG", quality=60),
            "PNG": look(tmp_path, saved),
            "WebP": look(tmp_path, saved, "WEBP", quality=75),
            "x 0.9": look(tmp_path, saved.resize([round(0.9 * edge) for edge in size]), "JPEG"),
            "turned by EXIF": look(tmp_path, turned, "JPEG", exif=exif, quality=92),
        }
        for name, other in again.items():
            assert other is not None and (first ^ other).bit_count() <= NEAR, (name, seed)
    assert min((a ^ b).bit_count() for a, b in combinations(hashes, 2)) > NEAR


def nearly_flat() -> list[Image.Image]:
    """Different images without structure: grain on one colour, ramps, a shadow, a horizon."""
    y, x = np.mgrid[:96, :128] / 96
    grey = [np.full_like(x, level) for level in (3, 40, 128, 250)]
    ramps = [100 + slope * along for slope in (-40, 20, 60) for along in (x, y, x + y)]
    shadows = [240 - depth * ((x - 0.66) ** 2 + (y - 0.5) ** 2) for depth in (30, 120, 200)]
    horizons = [np.where(y < at, 90, 160) for at in (0.4, 0.41, 0.6)]
    rng = np.random.default_rng(0)
    return [
        Image.fromarray((pixels + rng.normal(0, grain, x.shape)).clip(0, 255).astype(np.uint8))
        for pixels in (*grey, *ramps, *shadows, *horizons)
        for grain in (0, 0.5, 1.5)
    ]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_nearly_flat_images_do_not_look_the_same(kind: str, tmp_path: Path) -> None:
    hashes = [found for each in nearly_flat() if (found := look(tmp_path, each, kind)) is not None]
    assert [pair for pair in combinations(hashes, 2) if (pair[0] ^ pair[1]).bit_count() <= NEAR] == []


def test_the_nearest_of_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    others = {f"{k}": int(value) for k, value in enumerate(rng.integers(0, 2**63, 50))}
    hashes = {f"{k} bits": others[f"{k}"] ^ sum(1 << bit for bit in range(k)) for k in range(12)}
    expected = {f"{k} bits": f"{k}" for k in range(NEAR + 1)}
    assert near_duplicates(hashes, others) == expected
    monkeypatch.setattr("bcnn.data.lookalikes.PAIRS", 100)  # two at a time
    assert near_duplicates(hashes | {"flat": None}, others | {"flat": None}) == expected
    assert near_duplicates({}, others) == near_duplicates(hashes, {"flat": None}) == {}


@pytest.mark.parametrize("pairs", [1 << 23, 100])  # all at once; a few at a time
def test_images_that_look_alike_step_by_step_are_one_group(
    monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    monkeypatch.setattr("bcnn.data.lookalikes.PAIRS", pairs)
    rng = np.random.default_rng(0)
    chains = {}
    for chain, start in enumerate(rng.integers(0, 2**63, 4).tolist()):
        for link in range(9):  # the ends differ in far more bits than neighbours
            chains[f"{chain} {link}"] = start ^ ((1 << NEAR * link) - 1)
    names = rng.permutation([*chains]).tolist()
    found = look_alike_groups({"flat": None, **{name: chains[name] for name in names}})
    first = {name[0]: name for name in reversed(names)}
    assert found == {name: first[name[0]] for name in names}
    assert look_alike_groups({"flat": None}) == {}
