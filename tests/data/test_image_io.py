"""Files of every format that people have become upright RGB images of the right brightness."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import FEW, bounded, mutated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from bcnn.data.image_io import FORMATS, MARGIN, ORIENTATION, load_image, upright_rgb
from bcnn.data.integrity import inspect
from bcnn.utils.errors import UserError

LEFT, RIGHT = (200, 40, 60), (30, 90, 180)
RAMP = np.arange(256).reshape(16, 16)


def photograph(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red on the left, blue on the right, with some noise."""
    image = Image.new("RGB", size, LEFT)
    image.paste(RIGHT, (size[0] // 2, 0, *size))
    noise = np.random.default_rng(0).normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def encoded(kind: str, mode: str = "RGB", image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    image = image or photograph()
    image = image.quantize(64) if mode == "P" else image.convert(mode)
    image.save(file, kind, **options)
    return file.getvalue()


def animated(kind: str) -> bytes:
    return encoded(kind, save_all=True, append_images=[Image.new("RGB", (64, 48), "white")])


def rotated_by_exif(kind: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encoded(kind, image=photograph().transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95)


def save(values: np.ndarray, path: Path, **options: Any) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


FILES: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: encoded("JPEG", quality=95),
    "JPEG progressive": lambda: encoded("JPEG", quality=95, progressive=True),
    "JPEG grey": lambda: encoded("JPEG", "L", quality=95),
    "JPEG CMYK": lambda: encoded("JPEG", "CMYK", quality=95),
    "JPEG turned": lambda: rotated_by_exif("JPEG"),
    "PNG": lambda: encoded("PNG"),
    "PNG palette": lambda: encoded("PNG", "P"),
    "PNG alpha": lambda: encoded("PNG", "RGBA"),
    "PNG grey with alpha": lambda: encoded("PNG", "LA"),
    "WEBP": lambda: encoded("WEBP", quality=95),
    "WEBP lossless": lambda: encoded("WEBP", "RGBA", lossless=True),
    "BMP": lambda: encoded("BMP"),
    "TIFF": lambda: encoded("TIFF"),
    "TIFF LZW": lambda: encoded("TIFF", compression="tiff_lzw"),
    "TIFF CMYK": lambda: encoded("TIFF", "CMYK"),
    "GIF": lambda: encoded("GIF", "P"),
    "GIF animated": lambda: animated("GIF"),
    "AVIF": lambda: encoded("AVIF", quality=90),
    "HEIF": lambda: encoded("HEIF", quality=95),
    "JPEG2000": lambda: encoded("JPEG2000"),
    "MPO": lambda: animated("MPO"),
    "PPM": lambda: encoded("PPM"),
    "TGA": lambda: encoded("TGA"),
    "QOI": lambda: encoded("QOI"),
}


def content_of(name: str) -> bytes:
    if name.startswith("AVIF") and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    if name.startswith("HEIF"):
        pytest.importorskip("pillow_heif")
    return FILES[name]()


@pytest.mark.parametrize("name", FILES)
def test_a_format_is_decoded_upright_in_its_colours(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image"  # the name of a file does not matter
    path.write_bytes(content_of(name))
    assert (inspect(str(path)).error, inspect(str(path)).format) == ("", name.split()[0])
    pixels = np.asarray(load_image(path)).astype(float)
    expected = photograph().convert("L").convert("RGB") if "grey" in name else photograph()
    assert pixels.shape == (48, 64, 3)
    assert abs(pixels - np.asarray(expected))[:, [*range(30), *range(34, 64)]].mean() < 8


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(load_image(tmp_path / "clear.png")).min() == 255


INTEGERS = [(s, "u2", 2**bits - 1) for s in ("png", "tif") for bits in (0, 8, 10, 12, 14, 16)]
FLOATS = [("tif", "f4", white) for white in (1, 255, 4095, 65535)]


@pytest.mark.parametrize(("suffix", "kind", "white"), INTEGERS + FLOATS)
def test_grey_of_many_bits_keeps_its_brightness(
    tmp_path: Path, suffix: str, kind: str, white: int
) -> None:
    pixels = np.asarray(load_image(save((RAMP * (white / 255)).astype(kind), tmp_path / f"a.{suffix}")))
    assert abs(pixels - RAMP[..., None] * (white > 0)).max() <= 1


def test_a_tiff_may_state_its_white(tmp_path: Path) -> None:
    path = save((RAMP * 4).astype(np.uint16), tmp_path / "dim.tif", tiffinfo={281: 4095})
    assert np.asarray(load_image(path)).max() == round(1020 * 255 / 4095)


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(-5, 250, np.int32), (0, 100_000, np.int32), (0, 1.02, np.float32), (0, np.nan, np.float32)],
)
def test_values_without_a_known_white_are_an_error(
    tmp_path: Path, low: float, high: float, kind: type
) -> None:
    path = save(np.array([[low, high]] * 2).astype(kind), tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif.*values run from .*8 bits a channel"):
        load_image(path)
    assert "8 bits a channel" in inspect(str(path)).error


def chunk(kind: bytes, data: bytes, damage: int = 0) -> bytes:
    """A chunk of a PNG, with a wrong checksum if `damage`."""
    checksum = zlib.crc32(kind + data) ^ damage
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png_header(width: int, height: int) -> bytes:
    """The beginning of an RGB PNG of 16 bits a channel."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """(height, width, 3), which Pillow reads but does not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png_header(width, height) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


LONG = zlib.compress(bytes(2_000_000))
EXTRAS = {
    "a profile": chunk(b"iCCP", b"ICC\0\0" + LONG),
    "a text": chunk(b"zTXt", b"workflow\0\0" + LONG),
    "70 texts": 70 * chunk(b"tEXt", b"workflow\0" + bytes(1_000_000)),
    "an international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "a text with a wrong checksum": chunk(b"tEXt", b"Comment\0hello", damage=1),
    "a time with a wrong checksum": chunk(b"tIME", bytes(7), damage=1),
}


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
def test_a_png_s_pixels_do_not_depend_on_its_texts(tmp_path: Path, name: str, place: bytes) -> None:
    content, path = encoded("PNG", "P", transparency=3), tmp_path / "a.png"
    path.write_bytes(content)
    pixels = load_image(path).tobytes()
    start = content.index(place) - 4
    path.write_bytes(content[:start] + EXTRAS[name] + content[start:])
    assert not inspect(str(path)).error
    assert load_image(path).tobytes() == pixels


def test_a_text_that_turns_a_png_is_heeded(tmp_path: Path) -> None:
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="6"/>'
    content = encoded("PNG")
    start = content.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(content[:start] + chunk(b"iTXt", xmp) + content[start:])
    assert load_image(tmp_path / "a.png").size == (48, 64)


def test_photographs_of_200_megapixels_are_reduced_and_all_others_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    Image.new("L", (16_000, 12_000), 90).save(path)
    assert load_image(path, 448).size == (2000, 1500)
    assert inspect(str(path))[:3] == ("JPEG", 16_000, 12_000)
    monkeypatch.setattr("bcnn.data.image_io.JPEG_PIXELS", 190e6)
    assert inspect(str(path)).error == "it has more than 190 megapixels"
    path.write_bytes(png_header(16_000, 12_000) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    assert "192000000 pixels" in inspect(str(path)).error


def test_colour_whose_lower_bits_are_lost_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    colour = np.stack([RAMP] * 3, axis=2)
    path.write_bytes(png_of_16_bits(colour * 257))
    np.testing.assert_array_equal(load_image(path), colour)
    path.write_bytes(png_of_16_bits(colour * 16))  # 12 bits
    assert "8 bits a channel" in inspect(str(path)).error


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_the_exif_orientation_is_applied_once(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation  # there is no 9
    lying = Image.fromarray(np.repeat(RAMP[:10].astype(np.uint8)[..., None], 3, axis=2))
    path = tmp_path / f"a.{kind}"
    lying.save(path, exif=exif, quality=100, lossless=True)
    found = load_image(path)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)), int)
    np.testing.assert_allclose(np.asarray(found, int), expected, atol=2)
    with Image.open(path) as opened:
        assert upright_rgb(upright_rgb(opened)).tobytes() == found.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_a_tiff_is_turned(tmp_path: Path, mode: str) -> None:
    lying = Image.fromarray(RAMP[:5].astype(np.uint16 if mode == "I;16" else np.uint8))
    lying.convert(mode).save(tmp_path / "a.tif", tiffinfo={ORIENTATION: 6})
    pixels = np.asarray(load_image(tmp_path / "a.tif"))[..., 0]
    np.testing.assert_array_equal(pixels, np.rot90(RAMP[:5], -1))


@pytest.mark.parametrize("exif", [b"Exif\0\0" + bytes(range(64)), b"Exif\0\0", b"Exif\0\0II*\0\xff"])
def test_damaged_exif_data_turns_nothing(tmp_path: Path, exif: bytes) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").size == (20, 10)


@pytest.mark.parametrize("side", [16, 24, 60, 160, 480, 1000])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path: Path, side: int) -> None:
    """Never at less than the margin times the side needed."""
    photograph((640, 480)).save(tmp_path / "large.jpg")
    fraction = next((s for s in (8, 4, 2) if 480 // s >= MARGIN * side), 1)
    assert load_image(tmp_path / "large.jpg", side).size == (640 // fraction, 480 // fraction)
    photograph((640, 480)).save(tmp_path / "large.png")
    assert load_image(tmp_path / "large.png", side).size == (640, 480)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg: not a regular file"):
        load_image(tmp_path / "a.jpg")
    assert inspect(str(tmp_path / "a.jpg")).error == "not a regular file"


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("PIL.EpsImagePlugin.Ghostscript")
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert "EPS" not in FORMATS and "not an image" in inspect(str(path)).error


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
@pytest.mark.parametrize("name", FILES)
def test_a_mutated_file_is_broken_or_loads_the_same_every_time(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"

    @FEW
    @given(mutated([content_of(name)]), st.sampled_from((None, 1, 16)))
    def holds(content: bytes, side: int | None) -> None:
        path.write_bytes(content)
        with bounded():
            finding = inspect(str(path))
            assert inspect(str(path)) == finding and finding.error.isprintable()
            assert finding.error or load_image(path, side).mode == "RGB"

    holds()
