"""A file's pixels: more than 8 bits, odd EXIF, strips, one colour; and which files are opened."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from bcnn.data.formats import files_below, images_below
from bcnn.data.image_io import load_image, upright_rgb
from bcnn.data.index import ImageIndex
from bcnn.data.integrity import Finding, cache_file, check, inspect
from bcnn.data.review import flat
from bcnn.data.transforms import Interpolation, Preprocessing
from bcnn.utils.errors import UserError

RAMP = np.arange(256).reshape(16, 16)


def save(values: np.ndarray, path: Path, **options: object) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """(height, width, 3), which Pillow reads but does not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_in_16_bits_keeps_its_brightness(tmp_path: Path, suffix: str, bits: int) -> None:
    values = (RAMP * ((2**bits - 1) / 255)).astype(np.uint16)
    pixels = np.asarray(load_image(save(values, tmp_path / f"a.{suffix}")))
    assert abs(pixels - RAMP[..., None]).max() <= 1


@pytest.mark.parametrize("white", [1, 255, 4095, 65535])
def test_grey_in_floats_keeps_its_brightness(tmp_path: Path, white: int) -> None:
    path = save((RAMP * (white / 255)).astype(np.float32), tmp_path / "a.tif")
    assert abs(np.asarray(load_image(path)) - RAMP[..., None]).max() <= 1


def test_a_tiff_may_say_what_is_white(tmp_path: Path) -> None:
    path = save((RAMP * 4).astype(np.uint16), tmp_path / "dim.tif", tiffinfo={281: 4095})
    assert np.asarray(load_image(path)).max() == round(1020 * 255 / 4095)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_black_stays_black(tmp_path: Path, kind: type) -> None:
    assert not np.asarray(load_image(save((RAMP * 0).astype(kind), tmp_path / "a.tif"))).any()


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        (-5, 250, np.int32),
        (0, 100_000, np.int32),
        (-1, 1, np.float32),
        (0, 1.02, np.float32),
        (0, 1e6, np.float32),
        (0, np.nan, np.float32),
        (0, np.inf, np.float32),
    ],
)
def test_values_without_a_known_white_are_refused(
    tmp_path: Path, low: float, high: float, kind: type
) -> None:
    path = save(np.array([[low, high]] * 2).astype(kind), tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif.*values run from .*8 bits a channel"):
        load_image(path)
    assert "8 bits a channel" in inspect(str(path)).error


def test_colour_whose_upper_bits_are_not_used_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    colour = np.stack([RAMP] * 3, axis=2)
    path.write_bytes(png_of_16_bits(colour * 257))
    np.testing.assert_array_equal(load_image(path), colour)
    path.write_bytes(png_of_16_bits(colour * 16))  # 12 bits
    assert "8 bits a channel" in inspect(str(path)).error


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_images_of_one_colour_are_named(tmp_path: Path, suffix: str) -> None:
    plain = np.full((40, 40, 3), 90, np.uint8)
    speck = plain.copy()
    speck[::2, ::2], speck[1::2, 1::2] = 70, 110  # its mean over any 8 × 8 is that of the plain one
    paths = [
        str(save(plain, tmp_path / f"plain.{suffix}")),
        str(save(speck, tmp_path / f"speck.{suffix}")),
    ]
    findings = check(tmp_path, paths)
    assert [findings[path].flat for path in paths] == [True, False]
    layout = ImageIndex(["a"], train=[(path, 0) for path in paths])
    (sentence,) = flat(layout, findings)
    assert sentence == f"1 image is of one colour throughout: {paths[0]}"
    assert flat(layout.without(paths[:1]), findings) == []


def test_no_more_than_three_are_examples() -> None:
    samples = [(f"{number}.png", 0) for number in range(5)]
    findings = {path: Finding("PNG", 1, 1, "0", flat=True) for path, _ in samples}
    (sentence,) = flat(ImageIndex(["a"], train=samples), findings)
    assert sentence == "5 images are of one colour throughout: 0.png; 1.png; 2.png"


def test_what_another_version_remembered_is_checked_again(tmp_path: Path) -> None:
    path = str(save(RAMP.astype(np.uint8), tmp_path / "a.png"))
    first = check(tmp_path, [path])
    memory = cache_file(tmp_path, ".npz")
    with np.load(memory) as remembered:
        parts = dict(remembered)
    parts["rows"]["digest"] = "of other pixels"
    np.savez(memory, **parts)
    assert check(tmp_path, [path]) != first
    np.savez(memory, **{**parts, "version": 1000})
    assert check(tmp_path, [path]) == first


def entry(tag: int, kind: int, value: bytes, count: int = 1) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


def exif(*entries: bytes, after: bytes = b"") -> bytes:
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(entries) + bytes(4) + after


TURN = entry(0x112, 3, b"\x06")
AFTER = struct.pack("<I", 8 + 2 + 2 * 12 + 4)  # where what follows two entries is
FAR = struct.pack("<I", 60_000)
ODD_EXIF = {
    "a rational over zero": exif(TURN, entry(0x11A, 5, AFTER), after=struct.pack("<II", 1, 0)),
    "a signed one": exif(TURN, entry(0x11A, 10, AFTER), after=struct.pack("<ii", -1, 0)),
    "a float": exif(TURN, entry(0x128, 11, struct.pack("<f", 2.5))),
    "an unknown type": exif(entry(0x10F, 99, b""), TURN),
    "a maker beyond the end": exif(entry(0x10F, 2, FAR, 500), TURN),
    "a directory beyond the end": exif(TURN, entry(0x8769, 4, FAR)),
    "cut short": exif(TURN, entry(0x11A, 5, AFTER))[:-12],
    **{f"turned by type {kind}": exif(entry(0x112, kind, b"\x06")) for kind in (1, 4, 6, 7, 8, 9)},
}
NO_TURN = {
    "no such turn": exif(entry(0x112, 3, b"\x09")),
    "turned by text": exif(entry(0x112, 2, b"six")),
    "garbage": b"Exif\0\0" + bytes(range(64)),
    "nothing": b"Exif\0\0",
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("name", [*ODD_EXIF, *NO_TURN])
def test_of_an_odd_exif_the_orientation_is_kept(tmp_path: Path, kind: str, name: str) -> None:
    lying = Image.new("RGB", (20, 10))
    lying.paste((255, 255, 255), (0, 0, 10, 10))
    path = tmp_path / f"a.{kind}"
    lying.save(path, exif=(ODD_EXIF | NO_TURN)[name], quality=95)
    assert not inspect(str(path)).error
    upright = load_image(path)
    if name in NO_TURN:
        assert upright.size == (20, 10)
    else:
        assert upright.size == (10, 20) and np.asarray(upright)[:8].mean() > 240
    with Image.open(path) as opened:
        once = upright_rgb(opened)
    assert upright_rgb(once).size == upright.size


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_a_tiff_is_turned(tmp_path: Path, mode: str) -> None:
    lying = Image.fromarray(RAMP[:5].astype(np.uint16 if mode == "I;16" else np.uint8))
    lying.convert(mode).save(tmp_path / "a.tif", tiffinfo={0x112: 6})
    pixels = np.asarray(load_image(tmp_path / "a.tif"))[..., 0]
    np.testing.assert_array_equal(pixels, np.rot90(RAMP[:5], -1))


@pytest.mark.parametrize("size", [(400, 20), (20, 400), (3000, 1), (500, 21)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_middle_of_a_strip_is_as_that_of_the_whole(
    size: tuple[int, int], crop_pct: float, interpolation: Interpolation
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    resized = v2.Resize([round(32 / crop_pct)], InterpolationMode(interpolation))
    whole = v2.Compose([v2.ToImage(), resized, v2.CenterCrop(32)])(image)
    ours = Preprocessing(32, "keep", crop_pct, interpolation).evaluation()(image)
    difference = (whole.int() - ours.int()).abs()
    # Where the sides resized are whole numbers, nothing changes; else the middle moves a little.
    little = {"bilinear": 1, "bicubic": 2}[interpolation]
    assert difference.max() <= (little if 21 in size or crop_pct < 1 else 0)


@pytest.mark.parametrize("resize", ["keep", "squash"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_line_takes_the_memory_of_any_image(resize: str, scale: float | None) -> None:
    line = Image.new("RGB", (1, 3000), (255, 0, 0))
    evaluate, train = (
        Preprocessing(448, resize).evaluation(),
        Preprocessing(448, resize).training(scale, 16, 32),
    )
    for transform in (evaluate, train):
        resized = transform.transforms[1](v2.functional.to_image(line))
        assert resized.numel() < 10e6
        assert transform(line).float().mean(dim=(1, 2)).tolist() == [255, 0, 0]


def write(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


def below(folder: Path, root: Path | None = None) -> list[str]:
    return [os.path.relpath(path, folder) for path in images_below(folder, root)]


@pytest.mark.parametrize("target", [".", "..", "../..", "../b", "../b/deep", "in"])
def test_a_link_that_leads_back_is_not_entered(tmp_path: Path, target: str) -> None:
    root = tmp_path / "set"
    write(root / "a" / "0.jpg", root / "a" / "in" / "1.jpg", root / "b" / "deep" / "2.jpg")
    (root / "a" / "link").symlink_to(target)
    assert below(root / "a", root) == ["0.jpg", "in/1.jpg"]
    assert below(root) == ["a/0.jpg", "a/in/1.jpg", "b/deep/2.jpg"]


def test_links_that_lead_out_are_entered_once(tmp_path: Path) -> None:
    root, pool = tmp_path / "set", tmp_path / "pool"
    write(root / "a" / "0.jpg", pool / "1.jpg", pool / "deep" / "2.jpg", root / ".store" / "3.jpg")
    (root / "a" / "l1").symlink_to(pool)
    (root / "a" / "l2").symlink_to(pool)
    (root / "a" / "l3").symlink_to(pool / "deep")
    (root / "a" / "l4").symlink_to("../.store")  # which the walk passes by
    (pool / "back").symlink_to(root)
    (pool / "round").symlink_to(pool)
    found = ["0.jpg", "l1/1.jpg", "l3/2.jpg", "l4/3.jpg"]
    assert sorted(below(root / "a", root)) == found
    (tmp_path / "linked").symlink_to(root)
    assert sorted(below(tmp_path / "linked" / "a", tmp_path / "linked")) == found


def test_an_image_counts_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    root, pool = tmp_path / "set", tmp_path / "pool"
    write(root / "b.jpg", root / "deep" / "c.jpg", pool / "1.jpg", pool / "2.jpg")
    for link, target in (
        ("a.jpg", "b.jpg"),
        ("c.jpg", "deep/c.jpg"),
        ("d.jpg", pool / "1.jpg"),
        ("e.jpg", pool / "1.jpg"),
        ("pool", pool),
        ("x.jpg", "y.jpg"),
        ("y.jpg", "x.jpg"),
        ("z.jpg", "."),
    ):
        (root / link).symlink_to(target)
    # those that lead to each other alone are broken
    assert below(root) == ["a.jpg", "c.jpg", "d.jpg", "x.jpg", "y.jpg", "pool/2.jpg"]
    reasons = [reason for _, reason in files_below(root) if reason]
    assert reasons == ["linked twice"] * 4


def test_files_that_are_no_images_are_found_too(tmp_path: Path) -> None:
    write(*(tmp_path / name for name in ("a.jpg", "b.CR2", "c", ".hidden", "Thumbs.db", "__MACOSX/d")))
    found = {os.path.basename(path): reason for path, reason in files_below(tmp_path)}
    assert found == {"a.jpg": "", "b.CR2": ".CR2", "c": "without an ending"}


def test_what_is_no_file_is_passed_by(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    assert below(tmp_path) == ["gone.jpg"]
    found = {os.path.basename(path): reason for path, reason in files_below(tmp_path)}
    assert found["pipe.jpg"] == found["zero.jpg"] == "not a regular file"
    assert inspect(str(tmp_path / "pipe.jpg")).error == "not a regular file"


def test_postscript_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert "not an image" in inspect(str(path)).error
    with pytest.raises(UserError, match="not an image"):
        load_image(path)
