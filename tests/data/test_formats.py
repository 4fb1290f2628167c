"""Files of every format that people have: decoded right, and found where they are broken."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FEW, bounded, mutated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from bcnn.data.formats import is_image
from bcnn.data.image_io import load_image
from bcnn.data.integrity import broken, cache_file, check, inspect, write_broken
from bcnn.utils.errors import UserError

LEFT, RIGHT = (200, 40, 60), (30, 90, 180)


def photograph(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red on the left, blue on the right, with some noise: no two bytes of its file are spare."""
    image = Image.new("RGB", size, LEFT)
    image.paste(RIGHT, (size[0] // 2, 0, *size))
    noise = np.random.default_rng(0).normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    image = photograph().quantize(64) if mode == "P" else photograph().convert(mode)
    image.save(file, kind, **options)
    return file.getvalue()


def turned(kind: str) -> bytes:
    """As a camera held upright writes it: on its side, with the way to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    photograph().transpose(Image.Transpose.ROTATE_90).save(file, kind, exif=exif, quality=95)
    return file.getvalue()


def sixteen_bit() -> bytes:
    file = io.BytesIO()
    grey = np.asarray(photograph().convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(file, "PNG")
    return file.getvalue()


def animated(kind: str) -> bytes:
    file = io.BytesIO()
    photograph().save(file, kind, save_all=True, append_images=[Image.new("RGB", (64, 48), "white")])
    return file.getvalue()


def heic() -> bytes:
    pytest.importorskip("pillow_heif")
    return encoded("HEIF", quality=95)


FORMATS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "JPEG": ("JPEG", lambda: encoded("JPEG", quality=95)),
    "JPEG, progressive": ("JPEG", lambda: encoded("JPEG", quality=95, progressive=True)),
    "JPEG, grey": ("JPEG", lambda: encoded("JPEG", "L", quality=95)),
    "JPEG, CMYK": ("JPEG", lambda: encoded("JPEG", "CMYK", quality=95)),
    "JPEG, turned by EXIF": ("JPEG", lambda: turned("JPEG")),
    "PNG": ("PNG", lambda: encoded("PNG")),
    "PNG, palette": ("PNG", lambda: encoded("PNG", "P")),
    "PNG, alpha": ("PNG", lambda: encoded("PNG", "RGBA")),
    "PNG, grey with alpha": ("PNG", lambda: encoded("PNG", "LA")),
    "PNG, 16 bit grey": ("PNG", sixteen_bit),
    "WebP": ("WEBP", lambda: encoded("WEBP", quality=95)),
    "WebP, lossless, alpha": ("WEBP", lambda: encoded("WEBP", "RGBA", lossless=True)),
    "BMP": ("BMP", lambda: encoded("BMP")),
    "TIFF": ("TIFF", lambda: encoded("TIFF")),
    "TIFF, LZW": ("TIFF", lambda: encoded("TIFF", compression="tiff_lzw")),
    "TIFF, CMYK": ("TIFF", lambda: encoded("TIFF", "CMYK")),
    "GIF": ("GIF", lambda: encoded("GIF", "P")),
    "GIF, animated: first frame": ("GIF", lambda: animated("GIF")),
    "AVIF": ("AVIF", lambda: encoded("AVIF", quality=90)),
    "HEIC": ("HEIF", heic),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_decoded_upright_in_its_colours(name: str, tmp_path: Path) -> None:
    kind, content = FORMATS[name]
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / f"photo.{'heic' if kind == 'HEIF' else kind.lower()}"
    path.write_bytes(content())
    assert is_image(path.name) and is_image(path.name.upper())
    finding = inspect(str(path))
    assert (finding.error, finding.format) == ("", kind)
    pixels = np.asarray(load_image(path)).astype(float)
    assert pixels.shape == (48, 64, 3)
    expected = photograph()
    if "grey" in name:
        expected = expected.convert("L").convert("RGB")
    assert abs(pixels[:, :30] - np.asarray(expected)[:, :30]).mean() < 8
    assert abs(pixels[:, 34:] - np.asarray(expected)[:, 34:]).mean() < 8


def bomb() -> bytes:
    """A PNG of a hundred bytes that says it is 30,000 × 30,000 pixels."""
    content = bytearray(encoded("PNG"))
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


BROKEN: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "zero bytes": ("a.jpg", lambda: b"", "empty"),
    "text named .jpg": ("a.jpg", lambda: b"not a photograph", "not an image"),
    "decompression bomb": ("a.png", bomb, "bomb"),
    "JPEG cut in half": ("a.jpg", lambda: half(encoded("JPEG")), "truncated"),
    "JPEG without its last byte": ("a.jpg", lambda: encoded("JPEG")[:-1], "truncated"),
    "JPEG of zeros from its middle on": (
        "a.jpg",
        lambda: half(encoded("JPEG")) + bytes(2000),
        "",
    ),
    "PNG cut in half": ("a.png", lambda: half(encoded("PNG")), "truncated"),
    "PNG with altered bytes": ("a.png", lambda: encoded("PNG").replace(b"IDAT", b"IDAX"), ""),
    "WebP cut in half": ("a.webp", lambda: half(encoded("WEBP")), ""),
    "BMP cut in half": ("a.bmp", lambda: half(encoded("BMP")), "truncated"),
    "TIFF cut in half": ("a.tiff", lambda: half(encoded("TIFF")), ""),
    "TIFF, LZW, cut in half": ("a.tif", lambda: half(encoded("TIFF", compression="tiff_lzw")), ""),
    "GIF cut in half": ("a.gif", lambda: half(encoded("GIF", "P")), "truncated"),
    "AVIF cut in half": ("a.avif", lambda: half(encoded("AVIF")), ""),
    "HEIC cut in half": ("a.heic", lambda: half(heic()), ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_found(name: str, tmp_path: Path) -> None:
    file, content, reason = BROKEN[name]
    path = tmp_path / file
    path.write_bytes(content())
    error = inspect(str(path)).error
    assert error and reason in error.lower()


def test_a_link_to_nowhere_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    assert inspect(str(tmp_path / "a.jpg")).error == os.strerror(2)


def test_heic_without_its_plugin_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.heic").write_bytes(heic())
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "HEIF"})
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    assert "pip install pillow-heif" in inspect(str(tmp_path / "a.heic")).error


@pytest.mark.parametrize("kind", ["baseline", "progressive", "CMYK", "4:4:4"])
def test_every_truncation_of_a_jpeg_shows_at_an_eighth_of_its_size(kind: str, tmp_path: Path) -> None:
    options = {"progressive": {"progressive": True}, "4:4:4": {"subsampling": 0}}.get(kind, {})
    content = encoded("JPEG", "CMYK" if kind == "CMYK" else "RGB", **options)
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    assert not inspect(str(path)).error
    for end in range(1, len(content), 7):
        path.write_bytes(content[:-end])
        assert inspect(str(path)).error, f"{end} bytes less"


def test_all_broken_files_are_found_in_one_go_and_listed(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number} ü.jpg") for number in range(12)]
    for number, path in enumerate(paths):
        content = encoded("JPEG", quality=60 + number)
        Path(path).write_bytes(half(content) if number % 3 == 0 else content)
    reasons = broken(check(tmp_path, paths))
    assert set(reasons) == set(paths[::3])
    lines = write_broken(tmp_path, reasons).read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == list(reasons)


def test_what_is_intact_is_not_checked_again_unless_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    good.write_bytes(encoded("JPEG"))
    bad.write_bytes(b"")
    paths = [str(good), str(bad)]
    opened: set[str] = set()

    def counting(path: str, *rest: object) -> Image.Image:
        opened.add(str(path))
        return original(path)

    original = Image.open
    monkeypatch.setattr(Image, "open", counting)
    first = check(tmp_path, paths)
    assert opened == set(paths)
    opened.clear()
    assert check(tmp_path, paths) == first
    assert opened == {str(bad)}  # it may have been for want of a plug-in
    good.write_bytes(half(encoded("JPEG")))
    assert set(broken(check(tmp_path, paths))) == set(paths)
    bad.write_bytes(encoded("JPEG"))
    assert set(broken(check(tmp_path, paths))) == {str(good)}


def test_what_is_remembered_survives_a_check_of_fewer_and_an_interrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(tmp_path / f"{number}.jpg") for number in range(3)]
    for number, path in enumerate(paths):
        Path(path).write_bytes(encoded("JPEG", quality=80 + number))
    check(tmp_path, paths[:2])
    original = inspect

    def tire(path: str) -> object:
        raise KeyboardInterrupt if path == paths[2] else AssertionError

    monkeypatch.setattr("bcnn.data.integrity.inspect", tire)
    with pytest.raises(KeyboardInterrupt):
        check(tmp_path, paths)
    assert len(check(tmp_path, paths[:2])) == 2
    monkeypatch.setattr("bcnn.data.integrity.inspect", original)
    check(tmp_path, paths[2:])
    monkeypatch.setattr("bcnn.data.integrity.inspect", tire)
    assert len(check(tmp_path, paths)) == 3


def test_files_of_any_name_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [b"a\nb.jpg", b"\xff.jpg", "ü.jpg".encode()]
    paths = [os.fsdecode(os.path.join(os.fsencode(tmp_path), name)) for name in names]
    for number, path in enumerate(paths):
        Path(path).write_bytes(encoded("JPEG", quality=60 + number))
    first = check(tmp_path, paths)
    monkeypatch.setattr("bcnn.data.integrity.inspect", None)
    assert check(tmp_path, paths[::-1]) == first
    monkeypatch.chdir(tmp_path)
    assert list(check(Path("."), ["ü.jpg"]).values()) == [first[paths[2]]]


def test_a_damaged_memory_is_checked_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("JPEG"))
    first = check(tmp_path, [str(path)])
    for content in ("", "[1]", '{"a": 1}', '{"a": [1, 2, 3, 4, 5, 6, 7, 8, 9]}'):
        cache_file(tmp_path, ".npz").write_text(content)
        assert check(tmp_path, [str(path)]) == first


def test_a_cache_folder_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        check(tmp_path, [])


def bombs() -> dict[str, bytes]:
    """Small files whose beginnings say that they hold 60,000 × 60,000 pixels, or a format's most."""
    wide = struct.pack("<HH", 60_000, 60_000)
    tiff = bytearray(encoded("TIFF"))
    for entry in range(8 + 2, len(tiff) - 12, 2):  # ImageWidth and ImageLength
        if (
            tiff[entry : entry + 2] in (b"\0\1", b"\1\1")
            and tiff[entry + 2 : entry + 8] == b"\4\0\1\0\0\0"
        ):
            tiff[entry + 8 : entry + 12] = struct.pack("<I", 60_000)
    gif = bytearray(encoded("GIF", "P"))
    gif[6:10] = wide
    webp = bytearray(encoded("WEBP", lossless=True))
    webp[21:25] = struct.pack("<I", 16_383 | 16_383 << 14)
    bmp = bytearray(encoded("BMP"))
    bmp[18:26] = struct.pack("<II", 60_000, 60_000)
    tga = bytearray(encoded("TGA"))
    tga[12:16] = wide
    ppm = encoded("PPM").replace(b"64 48", b"60000 60000")
    qoi = bytearray(encoded("QOI"))
    qoi[4:12] = struct.pack(">II", 60_000, 60_000)
    jpeg = bytearray(encoded("JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    found = {"png": bomb(), "tif": tiff, "gif": gif, "webp": webp, "bmp": bmp, "tga": tga, "ppm": ppm}
    return {name: bytes(content) for name, content in (found | {"qoi": qoi, "jpg": jpeg}).items()}


@pytest.mark.parametrize("name", bombs())
def test_a_decompression_bomb_is_refused_before_it_takes_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{name}"
    path.write_bytes(bombs()[name])
    with bounded(megabytes=100):
        assert "decompression bomb" in inspect(str(path)).error


def whole_checksums(content: bytes) -> bytes:
    """A PNG with the checksums of its chunks put right, so that what was altered is read."""
    fixed, place = bytearray(content), 8
    while place + 12 <= len(fixed):
        end = place + 8 + struct.unpack_from(">I", fixed, place)[0]
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[place + 4 : end]))
        place = end + 4
    return bytes(fixed)


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "JPEG": lambda: [
        encoded("JPEG"),
        encoded("JPEG", "CMYK"),
        encoded("JPEG", progressive=True),
        turned("JPEG"),
    ],
    "PNG": lambda: [encoded("PNG", mode) for mode in ("RGB", "P", "LA", "1")] + [sixteen_bit()],
    "GIF": lambda: [encoded("GIF", "P"), animated("GIF")],
    "BMP": lambda: [encoded("BMP", mode) for mode in ("RGB", "P", "1")],
    "DIB": lambda: [encoded("DIB")],
    "TIFF": lambda: [
        encoded("TIFF", mode, compression=compression)
        for mode, compression in (
            ("RGB", None),
            ("RGB", "tiff_lzw"),
            ("RGB", "tiff_adobe_deflate"),
            ("RGB", "jpeg"),
            ("F", None),
            ("I;16", "packbits"),
            ("1", "group4"),
        )
    ],
    "WEBP": lambda: [encoded("WEBP"), encoded("WEBP", "RGBA", lossless=True), animated("WEBP")],
    "AVIF": lambda: [encoded("AVIF")] if features.check("avif") else [],
    "HEIF": lambda: [heic()],
    "JPEG2000": lambda: [encoded("JPEG2000"), encoded("JPEG2000", no_jp2=True)],
    "MPO": lambda: [animated("MPO")],
    "PPM": lambda: [encoded("PPM"), encoded("PPM", "1"), b"P3 2 2 255 1 2 3 4 5 6 7 8 9 10 11 12\n"],
    "TGA": lambda: [encoded("TGA"), encoded("TGA", "RGBA", compression="tga_rle")],
    "QOI": lambda: [encoded("QOI")],
}


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", SEEDS)
def test_a_mutated_image_is_broken_or_loads_the_same_every_time(kind: str, tmp_path: Path) -> None:
    seeds = SEEDS[kind]()
    if not seeds:
        pytest.skip(f"this Pillow has no {kind}")

    @FEW
    @given(mutated(seeds), st.booleans())
    def holds(content: bytes, repaired: bool) -> None:
        path = tmp_path / "a.jpg"  # whatever it is named
        path.write_bytes(whole_checksums(content) if repaired and kind == "PNG" else content)
        with bounded():
            finding = inspect(str(path))
            assert inspect(str(path)) == finding
            if finding.error:
                assert finding.error.isprintable()
                return
            for side in (None, 1, 16):
                assert load_image(path, side).mode == "RGB"

    holds()
