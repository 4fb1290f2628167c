"""Descriptors on disk: found again, resumed, verified, listed and removed."""

import errno
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import Damage, damage, junk
from hypothesis import given
from hypothesis import strategies as st

from bcnn.training import feature_store as store_module
from bcnn.training.feature_store import CHUNK, USAGE, VIEWS, FeatureStore, Options, main, stores_dir
from bcnn.utils.errors import UserError
from bcnn.utils.files import PART
from bcnn.utils.options import command

WIDTH = 8


def make(images: int = 40, dtype: str = "float16", **identity: object) -> FeatureStore:
    return FeatureStore(identity, images, WIDTH, dtype, about="some photographs")


def rows(images: int = 40) -> np.ndarray:
    return np.random.default_rng(0).random((images * VIEWS, WIDTH), np.float32)


def fill(store: FeatureStore, chunks: list[int]) -> None:
    content = rows(store.images)
    for chunk in chunks:
        images = store.chunk_images(chunk)
        store.write(chunk, content[images.start * VIEWS : images.stop * VIEWS])


def test_rows_come_back_in_any_order_within_their_precision() -> None:
    for dtype, bound in (("float16", 2**-11), ("float32", 0)):
        store = make(dtype=dtype)
        missing, _ = store.open()
        fill(store, missing)
        wanted = [79, 0, 33, 32, 31, 0]
        found = np.empty((len(wanted), WIDTH), dtype)
        store.read(wanted, found)
        np.testing.assert_allclose(found, rows()[wanted], rtol=bound)
        assert store.nbytes == 80 * WIDTH * np.dtype(dtype).itemsize
        assert store.nbytes == sum(p.stat().st_size for p in store.folder.glob("*.rows"))


def test_mirror_images_are_there_for_the_chunks_that_somebody_trains_on() -> None:
    of_first, content = [3], rows()
    tested = FeatureStore({}, 40, WIDTH, mirrored=of_first)
    assert tested.open() == ([0, 1, 2], 0)
    assert [tested.views(c) for c in (0, 1, 2)] == [2, 1, 1] and tested.rows == 32 + 16 + 8
    for chunk in (0, 1, 2):
        images = tested.chunk_images(chunk)
        part = content[images.start * VIEWS : images.stop * VIEWS]
        tested.write(chunk, part[:: VIEWS // tested.views(chunk)])
    assert tested.nbytes == sum(p.stat().st_size for p in tested.folder.glob("*.rows"))
    for reader in (tested, FeatureStore({}, 40, WIDTH, mirrored=of_first)):
        if reader is not tested:
            assert reader.open() == ([], 0)
        found = np.empty((4, WIDTH), "float16")
        reader.read([7, 6, 40, 78], found)
        np.testing.assert_allclose(found, content[[7, 6, 40, 78]], rtol=2**-11)
        with pytest.raises(IndexError, match="mirror image"):
            reader.read([41], found[:1])
    trained = make()  # on all of them
    assert trained.key == tested.key and trained.open() == ([1, 2], 0)
    fill(trained, [1, 2])
    whole = np.empty((80, WIDTH), "float16")
    trained.read(range(80), whole)
    np.testing.assert_allclose(whole, content, rtol=2**-11)
    assert make().open() == ([], 0)
    assert FeatureStore({}, 40, WIDTH, mirrored=of_first).open() == ([], 0)


def test_identity_alone_decides_which_store_it_is() -> None:
    assert make(size=1).key == make(size=1).key
    others = [make(size=2), make(size=1, precision="x"), make(images=41, size=1)]
    others += [make(size=1, dtype="float32")]
    assert len({store.key for store in [make(size=1), *others]}) == 5
    renamed = FeatureStore({"size": 1}, 40, WIDTH, about="moved elsewhere")
    assert renamed.key == make(size=1).key


def test_a_killed_build_goes_on_from_what_is_complete() -> None:
    first = make()
    assert first.open() == ([0, 1, 2], 0)
    fill(first, [0, 2])
    for name in ("000001-00000000.999.tmp", f"{PART}999-000001-00000000.rows"):
        (first.folder / name).write_bytes(b"half a chunk")
    again = make()
    assert again.open() == ([1], 0)
    assert sorted(path.suffix for path in again.folder.iterdir()) == [".json", ".rows", ".rows"]
    fill(again, [1])
    assert make().open() == ([], 0)


@pytest.mark.parametrize("damage", ["altered", "cut short", "lost"])
def test_a_damaged_chunk_is_found_and_only_it_is_missing(damage: str) -> None:
    store = make()
    store.open()
    fill(store, [0, 1, 2])
    path = sorted(store.folder.glob("*.rows"))[1]
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[100] ^= 1
        path.write_bytes(content)
    elif damage == "cut short":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    assert make().open() == ([1], 0 if damage == "lost" else 1)


def test_a_full_disk_is_one_sentence_and_keeps_what_is_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = make()
    store.open()
    fill(store, [0])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store_module.os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left.*BCNN_STORES.*last\.store=false"):
            fill(store, [1])
        assert make().open() == ([1, 2], 0)  # though nothing can be written yet
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".json", ".rows"]


def test_one_run_waits_for_another() -> None:
    order: list[str] = []

    def wait() -> None:
        with make().lock():
            order.append("second")

    with make().lock():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_chunks_hold_whole_images_and_the_last_one_the_rest() -> None:
    store = make(images=2 * CHUNK + 3)
    assert [len(store.chunk_images(c)) for c in range(store.chunk_count)] == [CHUNK, CHUNK, 3]


def stores_command(*words: str) -> int:
    return command(Options, main, USAGE, words)


def test_listing_and_removing(capsys: pytest.CaptureFixture[str], stores: Path) -> None:
    done, partial = make(size=1), make(size=2)
    for store, chunks in ((done, [0, 1, 2]), (partial, [0])):
        store.open()
        fill(store, chunks)
    assert stores_command() == 0
    listing = capsys.readouterr().out
    assert f"2 stores in {stores}" in listing
    assert f"{done.key}" in listing and "100% built" in listing and "33% built" in listing
    assert "some photographs" in listing
    assert stores_command("remove=nonsense") == 1
    assert done.folder.exists()
    assert stores_command(f"remove={done.key}") == 0
    assert not done.folder.exists() and partial.folder.exists()


@pytest.mark.parametrize("name", ["000001-00000000.rows", "000007-00000000.rows"])
def test_an_empty_chunk_of_a_right_checksum_is_damaged(name: str) -> None:
    store = make()
    store.open()
    fill(store, [0])
    (store.folder / name).touch()
    assert make().open() == ([1, 2], 1)


def test_rows_that_go_while_in_use_are_a_sentence() -> None:
    store = make()
    store.open()
    fill(store, [0])
    (path,) = store.folder.glob("*.rows")
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} cannot be read .*run again"):
        store.read([0], np.empty((1, WIDTH), np.float16))


def test_stores_are_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BCNN_STORES")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert stores_dir() == Path("/cache/bcnn/stores")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert stores_dir() == Path.home() / ".cache" / "bcnn" / "stores"


def test_stores_below_a_file_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BCNN_STORES", str(tmp_path / "file" / "stores"))
    with pytest.raises(UserError, match=r"file/stores cannot be made \(Not a directory\)"):
        make().lock()
    assert stores_command() == 0


DAMAGED = [b"", b"garbage", b"[]", b'{"chunks": 0}', b'{"chunks": "3", "about": []}', b"[" * 100_000]


def test_a_store_whose_description_is_lost_or_damaged_is_listed_and_removed(
    capsys: pytest.CaptureFixture[str], stores: Path
) -> None:
    made = [make(size=size) for size in range(len(DAMAGED) + 1)]
    for store in made:
        store.open()
        fill(store, [0])
    for store, content in zip(made, DAMAGED, strict=False):
        (store.folder / "store.json").write_bytes(content)
    (made[0].folder / "store.json").unlink()
    assert stores_command() == 0
    listing = capsys.readouterr().out
    assert listing.count("MB") == len(made) and listing.count("some photographs") == 1
    assert listing.count("missing or damaged") == len(DAMAGED)
    assert stores_command("remove=all") == 0
    assert list(stores.iterdir()) == []


def test_what_is_no_store_is_left_alone(capsys: pytest.CaptureFixture[str], stores: Path) -> None:
    store = make()
    with store.lock():
        store.open()
    fill(store, [0])
    (store.folder / f"{PART}1-000001-0.rows").touch()
    (stores / f"{'0' * 16}.lock").touch()  # of a store that was removed
    others = [store.folder / "mine.txt", stores / "notes" / "store.json", stores / "mine.lock"]
    others += [stores / ("f" * 16) / "photograph.jpg", stores / ("e" * 16)]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    assert stores_command() == 0
    assert capsys.readouterr().out.startswith("1 stores")
    assert stores_command("remove=all") == 0
    assert sorted(path for path in stores.rglob("*") if path.is_file()) == sorted(others)


def test_a_store_that_is_being_built_is_not_removed(capsys: pytest.CaptureFixture[str]) -> None:
    store = make()
    with store.lock():
        store.open()
        fill(store, [0])
        assert stores_command("remove=all") == 1
    assert f"a run is building {store.key}" in capsys.readouterr().err
    assert make().open() == ([1, 2], 0)


NAMES = st.from_regex(r"[0-9]{1,8}-[0-9a-f]{8}\.rows", fullmatch=True) | st.sampled_from(
    ["000001-00000000.rows", "x-00000000.rows", "1.rows", ".rows", "a-b-c.rows", "store.json", "x.tmp"]
)


@pytest.mark.fuzz
@given(
    files=st.dictionaries(NAMES, st.binary(max_size=40), max_size=4),
    about=junk(),
    changes=st.none() | damage(),
)
def test_any_folder_is_opened_listed_and_completed(
    stores: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
    about: object,
    changes: Damage | None,
) -> None:
    monkeypatch.setattr(store_module.os, "fsync", lambda _: None)  # most of the time
    store = make(images=20)
    store.open()
    fill(store, [0, 1])
    if changes:
        for path in store.folder.glob("*.rows"):
            path.write_bytes(changes(path.read_bytes()))
    (store.folder / "store.json").write_text(json.dumps(about))
    for name, content in files.items():
        (store.folder / name).write_bytes(content)
    assert stores_command() == 0
    again = make(images=20)
    missing, _ = again.open()
    fill(again, missing)
    found = np.empty((40, WIDTH), np.float16)
    again.read(range(40), found)
    np.testing.assert_array_equal(found, rows(20).astype(np.float16))
    assert make(images=20).open() == ([], 0)
    assert stores_command("remove=all") == 0
    for path in stores.rglob("*.*"):
        path.unlink()
