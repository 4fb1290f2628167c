"""`bcnn cache`: lists and removes the descriptors that training keeps."""

from pathlib import Path

import numpy as np
from conftest import Bcnn

from bcnn.training.feature_store import FeatureStore


def made(about: str, chunks: int) -> FeatureStore:
    store = FeatureStore({"about": about}, images=32, width=8, about=about)
    store.open()
    for chunk in range(chunks):
        store.write(chunk, np.zeros((32, 8)))
    return store


def test_caches_are_listed_and_removed(bcnn: Bcnn, stores: Path) -> None:
    complete, begun = made("flowers", 2), made("birds", 1)
    (stores / "notes").mkdir()
    lines = {line.split()[0]: line for line in bcnn("cache").out.splitlines()[1:]}
    assert lines.keys() == {complete.key, begun.key}
    assert "flowers" in lines[complete.key] and "birds" in lines[begun.key]

    outcome = bcnn("cache", "--remove", "nonsense")
    assert outcome.code == 1 and "no such cache" in outcome.err
    assert bcnn("cache", "--remove", complete.key).code == 0
    assert not complete.folder.exists() and begun.folder.exists()
    with begun.lock():  # as a run holds it
        outcome = bcnn("cache", "--remove", "all")
        assert outcome.code == 1 and f"a run is using {begun.key}" in outcome.err
        assert begun.folder.exists()
    assert bcnn("cache", "--remove", "all").code == 0
    assert [path.name for path in stores.iterdir()] == ["notes"]
    assert bcnn("cache", "--remove", "all").code == 0
