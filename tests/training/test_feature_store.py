"""Descriptors on disk: found again, resumed, complete or missing."""

import errno
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


def make(images: int = 40, dtype: str = "float16", **identity: object) -> FeatureStore:
    return FeatureStore(identity, images, WIDTH, dtype, about="some images")


def descriptors(images: int = 40) -> np.ndarray:
    return np.random.default_rng(0).random((images, VIEWS, WIDTH), np.float32)


def fill(store: FeatureStore, shards: list[int]) -> None:
    content = descriptors(store.images)
    for shard in shards:
        store.write(shard, content[store.shard_images(shard), : store.views(shard)])
    store.scan()


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("float32", 0)])
def test_descriptors_are_read_in_any_order(dtype: str, bound: float) -> None:
    store = make(dtype=dtype)
    fill(store, store.open())
    wanted = [79, 0, 33, 32, 31, 0]
    expected = descriptors().reshape(-1, WIDTH)[wanted]
    np.testing.assert_allclose(store.read(wanted), expected, rtol=bound)
    assert store.nbytes == 80 * WIDTH * np.dtype(dtype).itemsize
    second = np.load(store.folder / "000001-2.npy")  # as anybody opens it
    np.testing.assert_array_equal(second, descriptors()[SHARD : 2 * SHARD].astype(dtype))


def test_only_shards_with_training_images_have_mirror_images() -> None:
    evaluated = FeatureStore({}, 40, WIDTH, mirrored=[3])
    assert [evaluated.views(shard) for shard in (0, 1, 2)] == [2, 1, 1]
    assert evaluated.nbytes == (32 + 16 + 8) * WIDTH * 2
    fill(evaluated, evaluated.open())
    flat = descriptors().reshape(-1, WIDTH)
    np.testing.assert_allclose(evaluated.read([7, 6, 40, 78]), flat[[7, 6, 40, 78]], rtol=2**-11)
    with pytest.raises(IndexError, match="mirror image"):
        evaluated.read([41])
    trained = make()  # on all images
    assert trained.key == evaluated.key and trained.open() == [1, 2]
    fill(trained, [1, 2])
    np.testing.assert_allclose(trained.read([*range(80)]), flat, rtol=2**-11)
    assert FeatureStore({}, 40, WIDTH, mirrored=[3]).open() == []
    # A run that opened the store before still reads what it found.
    np.testing.assert_allclose(evaluated.read([7, 6, 40, 78]), flat[[7, 6, 40, 78]], rtol=2**-11)


def test_identity_alone_decides_which_store_it_is() -> None:
    assert make(size=1).key == make(size=1).key
    others = [make(size=2), make(images=41, size=1), make(size=1, dtype="float32")]
    assert len({store.key for store in [make(size=1), *others]}) == 4
    assert FeatureStore({"size": 1}, 40, WIDTH, about="moved elsewhere").key == make(size=1).key


def test_a_killed_build_resumes_with_the_missing_shards() -> None:
    first = make()
    assert first.open() == [0, 1, 2]
    fill(first, [0, 2])
    (first.folder / f"{PART}999-000001-2.npy").write_bytes(b"half a shard")
    again = make()
    assert again.open() == [1]
    names = sorted(path.name for path in again.folder.iterdir())
    assert names == ["000000-2.npy", "000002-2.npy", "store.json"]


@given(length=st.integers(0, 127), of_end=st.booleans())
def test_a_truncated_shard_is_missing(length: int, of_end: bool) -> None:
    store = make(images=4)
    fill(store, store.open())
    path = store.folder / "000000-2.npy"
    content = path.read_bytes()
    path.write_bytes(content[: -1 - length] if of_end else content[:length])
    assert make(images=4).open() == [0]
    with pytest.raises(UserError, match="cut short while in use"):
        store.read([7])


def test_a_shard_of_another_shape_is_missing() -> None:
    store = make()
    fill(store, store.open())
    np.save(store.folder / "000001-2.npy", descriptors()[:SHARD, :, :4].astype(np.float16))
    np.save(store.folder / "000002-2.npy", descriptors()[32:40])  # float32
    assert make().open() == [1, 2]


def test_a_full_disk_is_one_sentence_and_keeps_finished_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    fill(store, store.open()[:1])
    with monkeypatch.context() as patched:
        full = OSError(errno.ENOSPC, "No space")
        patched.setattr("bcnn.utils.files.os.fsync", Mock(side_effect=full))
        with pytest.raises(UserError, match=r"No space.*BCNN_STORES.*last\.store=false"):
            fill(store, [1])
    assert make().open() == [1, 2]


def test_what_a_store_belongs_to_can_be_read() -> None:
    store = make()
    store.open()
    assert feature_store.read_about(store.folder) == {"about": "some images"}
    (store.folder / "store.json").write_text("garbage")
    assert feature_store.read_about(store.folder) == {}
