"""The check: broken files are found, digests are of files, and what is known is cached."""

import json
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_image_io import content_of, encoded

from bcnn.data import integrity
from bcnn.data.image_io import load_image
from bcnn.data.integrity import Finding, cache_file, check, inspect


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def bomb() -> bytes:
    """A PNG of a hundred bytes that claims 30,000 × 30,000 pixels."""
    content = bytearray(encoded("PNG"))
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "not an image"),
    "text": (lambda: b"not a photograph", "not an image"),
    "decompression bomb": (bomb, "bomb"),
    "JPEG of zeros from its middle on": (lambda: half(encoded("JPEG")) + bytes(2000), ""),
    "PNG with altered bytes": (lambda: encoded("PNG").replace(b"IDAT", b"IDAX"), ""),
    **{
        f"half a {kind}": (lambda kind=kind: half(content_of(kind)), "")  # type: ignore[misc]
        for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "TIFF LZW", "GIF", "AVIF", "HEIF")
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_found(name: str, tmp_path: Path) -> None:
    content, reason = BROKEN[name]
    (tmp_path / "a.jpg").write_bytes(content())
    error = inspect(str(tmp_path / "a.jpg")).error
    assert error and reason in error.lower()


JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "CMYK": {"mode": "CMYK"},
    "4:4:4": {"subsampling": 0},
    "restarts": {"restart_marker_blocks": 2},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_every_truncation_of_a_jpeg_shows_but_that_of_its_end_marker(kind: str, tmp_path: Path) -> None:
    content, path = encoded("JPEG", **JPEGS[kind]), tmp_path / "a.jpg"
    path.write_bytes(content)
    pixels = load_image(path).tobytes()
    for end in (0, 1, 2):
        path.write_bytes(content[: len(content) - end])
        assert not inspect(str(path)).error
        assert load_image(path).tobytes() == pixels
        assert min(load_image(path, 4).size) < 48
    for end in (*range(4, 100), *range(100, len(content), 7)):
        path.write_bytes(content[:-end])
        assert inspect(str(path)).error, f"{end} bytes less"


def striped(path: Path, horizontal: bool) -> str:
    """Stripes of two greys whose mean over any 8 × 8 pixels is the same."""
    pixels = np.full((64, 64), 90, np.uint8)
    lines = pixels if horizontal else pixels.T
    lines[::2], lines[1::2] = 70, 110
    Image.fromarray(pixels).save(path, quality=100)
    return str(path)


def test_different_files_whose_small_decodes_agree_have_different_digests(tmp_path: Path) -> None:
    paths = [striped(tmp_path / "rows.jpg", True), striped(tmp_path / "columns.jpg", False)]
    assert load_image(paths[0], 1).tobytes() == load_image(paths[1], 1).tobytes()
    first, second = (inspect(path) for path in paths)
    assert first.digest != second.digest
    assert first.perceptual_hash == second.perceptual_hash
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(paths[0]).read_bytes())
    assert inspect(str(copy)) == first


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_images_of_one_colour_are_found_for_certain(tmp_path: Path, suffix: str) -> None:
    plain = np.full((40, 40, 3), 90, np.uint8)
    speck = plain.copy()
    speck[::2, ::2], speck[1::2, 1::2] = 70, 110  # at an eighth of the size as the plain one
    for name, pixels in (("plain", plain), ("speck", speck)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.{suffix}")
    found = [inspect(str(tmp_path / f"{name}.{suffix}")).flat for name in ("plain", "speck")]
    assert found == [True, False]


def jpegs(folder: Path, count: int) -> list[str]:
    paths = [folder / f"{number} ü.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded("JPEG", quality=60 + number))
    return [str(path) for path in paths]


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read from here on."""
    paths: list[str] = []

    def read(path: str) -> Finding:
        paths.append(path)
        time.sleep(0.1)  # in which another rank would begin
        return inspect(path)

    monkeypatch.setattr(integrity, "inspect", read)
    return paths


def test_intact_files_are_read_again_only_if_they_change(tmp_path: Path, inspected: list[str]) -> None:
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    good.write_bytes(encoded("JPEG"))
    bad.write_bytes(b"")
    paths = [str(good), str(bad)]
    first = check(tmp_path, paths)
    assert inspected == paths
    assert check(tmp_path, paths) == first
    assert inspected == [*paths, str(bad)]  # its plug-in may be installed by now
    status = good.stat()
    good.write_bytes(good.read_bytes()[::-1])
    os.utime(good, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` does; of the same size
    assert check(tmp_path, paths)[str(good)].error


def test_of_two_ranks_that_start_together_one_reads_the_images(
    tmp_path: Path, inspected: list[str]
) -> None:
    paths = jpegs(tmp_path, 3)
    started = threading.Barrier(2)  # threads: the lock tells them apart as it does processes

    def rank(number: int) -> dict[str, Finding]:
        started.wait()
        return check(tmp_path, paths)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    assert first == second and sorted(inspected) == paths


def test_the_cache_survives_a_check_of_fewer_and_an_interrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = jpegs(tmp_path, 40)
    check(tmp_path, paths[:2])
    check(tmp_path, paths[2:4])

    def interrupted(results: Iterator[Finding], *_: object) -> Iterator[Finding]:
        yield from islice(results, 32)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(integrity, "track", interrupted)
        check(tmp_path, paths)
    monkeypatch.setattr(integrity, "inspect", None)
    assert len(check(tmp_path, paths[:36])) == 36


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', '{"version": 0, "images": {}}'])
def test_a_damaged_or_older_cache_is_not_used(tmp_path: Path, content: str) -> None:
    paths = jpegs(tmp_path, 1)
    first = check(tmp_path, paths)
    cache = cache_file(tmp_path, ".json")
    assert paths[0] in json.loads(cache.read_text())["images"]
    cache.write_text(content)
    assert check(tmp_path, paths) == first
