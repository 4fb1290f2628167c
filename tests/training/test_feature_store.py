"""Descriptors on disk: found again, resumed, complete or missing."""

import errno
import shutil
from itertools import chain
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcnn.training import feature_store
from bcnn.training.feature_store import SHARD, VIEWS, FeatureStore
from bcnn.utils.errors import UserError
from bcnn.utils.files import PART

WIDTH = 8


def names(images: int) -> list[str]:
    """Digests of the first images."""
    return [f"{i:032x}" for i in range(images)]


def make(images: int = 40, **identity: object) -> FeatureStore:
    """The store of so many images that are trained on."""
    return FeatureStore(identity, names(images), WIDTH, range(images), "some images")


def descriptors(images: int = 40) -> np.ndarray:
    return np.random.default_rng(0).random((images, VIEWS, WIDTH), np.float32).astype(np.float16)


def fill(store: FeatureStore, shards: list[list[str]]) -> None:
    for shard in shards:
        content = descriptors(100)[[int(digest, 16) for digest in shard]]
        store.write(shard, content[:, : store.views(shard)])
    store.scan()


def sizes(shards: list[list[str]]) -> list[int]:
    return [len(shard) for shard in shards]


def test_descriptors_are_read_in_any_order() -> None:
    store = make()
    assert store.missing_bytes == 80 * WIDTH * 2
    fill(store, store.open())
    wanted = [79, 0, 33, 32, 31, 0]
    assert (store.read(wanted) == descriptors().reshape(-1, WIDTH)[wanted]).all()
    assert store.missing_bytes == 0
    shards = [np.load(path) for path in store.folder.glob("*.npy")]  # as anybody opens them
    assert sorted(shard.shape for shard in shards) == [(8, 2, WIDTH), (16, 2, WIDTH), (16, 2, WIDTH)]


def test_only_shards_with_training_images_have_mirror_images() -> None:
    evaluated = FeatureStore({}, names(40), WIDTH, [3], "some images")
    assert evaluated.missing_bytes == (32 + 16 + 8) * WIDTH * 2
    fill(evaluated, evaluated.open())
    flat = descriptors().reshape(-1, WIDTH)
    assert (evaluated.read([7, 6, 40, 78]) == flat[[7, 6, 40, 78]]).all()
    with pytest.raises(IndexError, match="mirror image"):
        evaluated.read([41])
    trained = make()  # on all images
    missing = trained.open()
    assert trained.key == evaluated.key and missing == [names(40)[16:32], names(40)[32:]]
    fill(trained, missing)
    assert (trained.read([*range(80)]) == flat).all()
    assert FeatureStore({}, names(40), WIDTH, [3], "some images").open() == []
    # A run that opened the store before still reads what it found.
    assert (evaluated.read([7, 6, 40, 78]) == flat[[7, 6, 40, 78]]).all()


@given(lists=st.lists(st.lists(st.integers(0, 59), min_size=1), min_size=1, max_size=4), data=st.data())
def test_images_of_earlier_lists_are_found(lists: list[list[int]], data: st.DataObject) -> None:
    """In any order, with copies; of the images that are missing, each is computed once."""
    seed, seen = data.draw(st.integers(0)), set()
    for images in lists:
        listed = [names(60)[i] for i in images]
        store = FeatureStore({"seed": seed}, listed, WIDTH, range(len(images)), "some images")
        missing = store.open()
        assert sorted(chain(*missing)) == [names(60)[i] for i in sorted({*images} - seen)]
        fill(store, missing)
        expected = descriptors(100)[images].reshape(-1, WIDTH)
        assert (store.read(range(VIEWS * len(images))) == expected).all()
        seen |= {*images}
    shutil.rmtree(store.folder)


def test_identity_alone_decides_which_store_it_is() -> None:
    assert make(size=1).key == make(41, size=1).key != make(size=2).key


def test_a_killed_build_resumes_with_the_missing_shards() -> None:
    first = make()
    shards = first.open()
    assert sizes(shards) == [16, 16, 8]
    fill(first, [shards[0], shards[2]])
    (first.folder / f"{PART}999-0123456789abcdef.npy").write_bytes(b"half a shard")
    again = make()
    assert again.open() == [shards[1]]
    assert sorted(path.suffix for path in again.folder.iterdir()) == [".json", ".npy", ".npy"]


@given(length=st.integers(0, 127), of_end=st.booleans())
def test_a_truncated_shard_is_missing(length: int, of_end: bool) -> None:
    store = make(images=4)
    fill(store, store.open())
    (path,) = store.folder.glob("*.npy")
    content = path.read_bytes()
    path.write_bytes(content[: -1 - length] if of_end else content[:length])
    assert make(images=4).open() == [names(4)]
    path.write_bytes(content[:150])
    with pytest.raises(UserError, match="cut short while in use"):
        store.read([7])


@pytest.mark.parametrize("content", [descriptors()[:, :, :4], descriptors().astype(np.float32)])
def test_a_shard_of_another_width_or_dtype_is_missing(content: np.ndarray) -> None:
    store = make()
    first, *_ = shards = store.open()
    fill(store, shards)
    store.write(first, content[:SHARD])
    assert make().open() == [first]


def test_a_full_disk_is_one_sentence_and_keeps_finished_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    fill(store, store.open()[:1])
    with monkeypatch.context() as patched:
        full = OSError(errno.ENOSPC, "No space")
        patched.setattr("bcnn.utils.files.os.fsync", Mock(side_effect=full))
        with pytest.raises(UserError, match=r"No space.*BCNN_STORES.*last\.store=false"):
            fill(store, store.scan()[:1])
    assert sizes(make().open()) == [16, 8]


def test_which_images_a_store_was_used_for_can_be_read() -> None:
    store = make()
    for about in ("some images", "others", "some images"):
        FeatureStore({}, names(3), WIDTH, [], about).open()
    assert feature_store.read_about(store.folder) == ["some images", "others"]
