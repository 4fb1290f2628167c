"""Descriptors on disk: found again, resumed, verified, listed and removed."""

import errno
import threading
from pathlib import Path

import numpy as np
import pytest

from bcnn import store as store_module
from bcnn.errors import UserError
from bcnn.options import command
from bcnn.store import CHUNK, USAGE, VIEWS, DescriptorStore, Options, main

WIDTH = 8


def make(images: int = 40, dtype: str = "float16", **identity: object) -> DescriptorStore:
    return DescriptorStore(identity, images, WIDTH, dtype, about="some photographs")


def rows(images: int = 40) -> np.ndarray:
    return np.random.default_rng(0).random((images * VIEWS, WIDTH), np.float32)


def fill(store: DescriptorStore, chunks: list[int]) -> None:
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


def test_identity_alone_decides_which_store_it_is() -> None:
    assert make(size=1).key == make(size=1).key
    others = [make(size=2), make(size=1, precision="x"), make(images=41, size=1)]
    others += [make(size=1, dtype="float32")]
    assert len({store.key for store in [make(size=1), *others]}) == 5
    renamed = DescriptorStore({"size": 1}, 40, WIDTH, about="moved elsewhere")
    assert renamed.key == make(size=1).key


def test_a_killed_build_goes_on_from_what_is_complete() -> None:
    first = make()
    assert first.open() == ([0, 1, 2], 0)
    fill(first, [0, 2])
    (first.folder / "000001-00000000.999.tmp").write_bytes(b"half a chunk")
    again = make()
    assert again.open() == ([1], 0)
    assert not list(again.folder.glob("*.tmp"))
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
    assert not list(store.folder.glob("*.tmp"))
    assert make().open() == ([1, 2], 0)


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
