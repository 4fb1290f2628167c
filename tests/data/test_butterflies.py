"""The embedded set: the same everywhere, written once and whole, and never over another's files."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import contents
from PIL import Image

from bcnn.data import butterflies
from bcnn.data.butterflies import SIZE, SPECIES, draw, write
from bcnn.utils.errors import UserError


def images(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(root).items() if name.endswith(".jpg")}


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    first = images(write(tmp_path / "a", seed=3, train=1, test=1))
    assert images(write(tmp_path / "b", seed=3, train=1, test=1)) == first
    other = images(write(tmp_path / "c", seed=4, train=1, test=1))
    assert other.keys() == first.keys() and not {*other.values()} & {*first.values()}
    assert first.items() <= images(write(tmp_path / "longer", seed=3, train=2, test=1)).items()


def test_layout_and_format(tmp_path: Path) -> None:
    root = write(tmp_path / "new" / "set", train=2, test=1)
    assert set(images(root)) == {
        f"{split}/{species.name}/{index:04d}.jpg"
        for split, count in (("train", 2), ("test", 1))
        for species in SPECIES
        for index in range(count)
    }
    assert len({*images(root).values()}) == 30  # no image occurs twice
    for name in images(root):
        with Image.open(root / name) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", SIZE)


def test_a_second_call_writes_nothing(tmp_path: Path) -> None:
    root = write(tmp_path / "set", train=1, test=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write(root, train=1, test=1) == root
    with pytest.raises(UserError, match="set"):
        write(root, seed=1, train=1, test=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["holiday.txt", "butterflies.json"])
def test_a_folder_of_another_origin_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("keep me")
    with pytest.raises(UserError, match=r"mine .*train on it with data=folder"):
        write(tmp_path / "mine", train=1, test=1)
    assert contents(tmp_path) == {f"mine/{name}": b"keep me"}


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tire(species: int, rng: np.random.Generator) -> Image.Image:
        if species == 2:
            raise KeyboardInterrupt
        return draw(species, rng)

    with monkeypatch.context() as patch:
        patch.setattr(butterflies, "draw", tire)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "set", train=1, test=1)
    assert list(tmp_path.iterdir()) == []
    assert len(images(write(tmp_path / "set", train=1, test=1))) == 20


def test_every_species_looks_different() -> None:
    drawn = [np.asarray(draw(k, np.random.default_rng(0)), int) for k in range(len(SPECIES))]
    for one, other in itertools.combinations(drawn, 2):
        assert (abs(one - other).max(axis=2) > 40).sum() > 100
