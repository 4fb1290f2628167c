"""Images, folders and lists that URLs name, by fsspec's file systems in memory and in archives."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write
from fsspec.implementations.tar import TarFileSystem
from PIL import Image

from bcnn.data.image_files import find_images
from bcnn.data.image_io import load_image
from bcnn.data.urls import is_url
from bcnn.evaluation.inference import predict_paths
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.errors import UserError

NAMES = ("c.png", "a/1.png", "a/2.png")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """photos/ with three images and other files, beside it photos.tar and photos.zip, and in memory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate((*NAMES, ".hidden/3.png")):
        write(tmp_path / "photos" / name, seed)
    (tmp_path / "photos" / "notes.md").touch()
    for kind in ("tar", "zip"):
        shutil.make_archive("photos", kind, "photos")
    memory = fsspec.filesystem("memory")
    memory.put("photos/", "/photos", recursive=True)
    yield tmp_path / "photos"
    memory.rm("/", recursive=True)


@pytest.mark.parametrize("url", ["memory://photos", "tar://::photos.tar", "zip://::photos.zip"])
def test_a_folder_of_any_file_system_is_read_as_one_of_the_disk(url: str, photos: Path) -> None:
    found = find_images([url])
    assert [name for url in found for name in NAMES if name in url] == sorted(NAMES)
    for name, each in zip(sorted(NAMES), found, strict=True):
        assert find_images([each]) == [each]
        assert load_image(each).tobytes() == load_image(photos / name).tobytes()


def test_lists_hold_urls_and_are_read_by_url(photos: Path) -> None:
    memory = fsspec.filesystem("memory")
    rows = ["a/1.png", "tar://a/2.png::photos.tar", str(photos / "c.png")]
    memory.pipe("/photos/list.csv", "\n".join(["path", *rows[:2]]).encode())
    with memory.open("/photos/list.parquet", "wb") as file:
        pq.write_table(pa.table({"path": rows[:2]}), file)
    for name in ("list.csv", "list.parquet"):
        assert find_images([f"memory://photos/{name}"]) == ["memory://photos/a/1.png", rows[1]]
    (photos / "list.csv").write_text("\n".join(["path", *rows]))
    assert find_images(["photos/list.csv"]) == ["photos/a/1.png", *rows[1:]]


def test_members_of_a_shard_have_the_predictions_of_their_files(
    tiny: BCNN, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_image("tar://./c.png::photos.tar")
    opened: list[int] = []
    original = TarFileSystem.__init__
    monkeypatch.setattr(
        TarFileSystem,
        "__init__",
        lambda *args, **options: opened.append(1) or original(*args, **options),
    )
    pixels = np.random.default_rng(0).integers(0, 255, (4, 400, 400, 3), np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(photos / f"{number}.png")
    shutil.make_archive("photos", "tar", "photos")  # not the one that was open before
    files = [str(photos / f"{number}.png") for number in range(4)] * 16
    expected = [each.pairs for each in predict_paths(tiny, files, batch=2, workers=0)]
    assert find_images(["tar://::photos.tar"]) and len(opened) == 1  # before workers are forked
    paths = [f"tar://./{Path(file).name}::photos.tar" for file in files]
    for workers in (0, 2):
        found = [each.pairs for each in predict_paths(tiny, paths, batch=2, workers=workers)]
        assert found == expected
    assert len(opened) == 1


def test_a_pattern_may_be_a_url_and_no_match_is_one_sentence(photos: Path) -> None:
    assert find_images(["memory://photos/a/*"]) == [
        "memory:///photos/a/1.png",
        "memory:///photos/a/2.png",
    ]
    for url in ("memory://nowhere", "memory://photos/*.gif", "tar://b::photos.tar"):
        with pytest.raises(UserError, match=f"no images: {url.replace('*', '.')}"):
            find_images([url])
    (photos / "cut.tar").write_bytes(b"no archive")
    odd = {"foo://a.png": "Protocol not known", "tar://a.png::photos/cut.tar": "truncated header"}
    for url, reason in odd.items():
        with pytest.raises(UserError, match=f"{url}: {reason}"):
            find_images([url])
    with pytest.raises(UserError, match=r"the image memory://photos/b.png: No such file"):
        load_image("memory://photos/b.png")


def test_a_path_of_the_disk_is_no_url(photos: Path) -> None:
    for path in (
        r"C:\photos\a.png",
        "C:/photos/a.png",
        "c://a.png",
        "s3:/a.png",
        "day 1::a.png",
        "/a://b",
    ):
        assert not is_url(path)
    shutil.copy("photos/c.png", "day 1::a.png")
    assert find_images(["day 1::a.png"]) == ["day 1::a.png"] and load_image("day 1::a.png").size == (
        48,
        40,
    )
    for url in (
        "s3://bucket/a.png",
        "tar://a.png::s3://bucket/b.tar",
        "simplecache::https://host/a.png",
    ):
        assert is_url(url)
