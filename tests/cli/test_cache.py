"""`bcnn cache`: lists and removes the descriptors that training keeps."""

from pathlib import Path

import numpy as np
from conftest import Bcnn

from bcnn.training.feature_store import FeatureStore


def made(about: str, shards: int) -> FeatureStore:
    store = FeatureStore({"about": about}, [f"{i:032x}" for i in range(32)], 8, [], about)
    for shard in store.open()[:shards]:
        store.write(shard, np.zeros((16, 1, 8), np.float16))
    return store


def test_caches_are_listed_and_removed(bcnn: Bcnn, stores: Path) -> None:
    complete, begun = made("flowers", 2), made("birds", 1)
    (begun.folder / ".part-killed.npy").write_bytes(b"")
    (stores / "notes").mkdir()
    lines = {line.split()[0]: line for line in bcnn("cache").out.splitlines()[1:]}
    assert lines.keys() == {complete.key, begun.key}
    assert "flowers" in lines[complete.key] and "birds" in lines[begun.key]

    outcome = bcnn("cache", "--remove", "nonsense")
    assert outcome.code == 1 and "no such store" in outcome.err
    assert bcnn("cache", "--remove", complete.key).code == 0
    assert not complete.folder.exists() and begun.folder.exists()
    with begun.lock():  # as a run holds it
        outcome = bcnn("cache", "--remove", "all")
        assert outcome.code == 1 and f"{begun.key}: a run adds to it" in outcome.err
        assert len(begun.scan()) == 1
    assert bcnn("cache", "--remove", "all").code == 0
    assert [path.name for path in stores.iterdir() if path.is_dir()] == ["notes"]


def test_files_of_others_are_not_removed(bcnn: Bcnn) -> None:
    store = made("flowers", 2)
    (store.folder / "labels.npy").write_text("precious")
    outcome = bcnn("cache", "--remove", "all")
    assert outcome.code == 1 and f"{store.key}: Directory not empty" in outcome.err
    assert [path.name for path in store.folder.iterdir()] == ["labels.npy"]
