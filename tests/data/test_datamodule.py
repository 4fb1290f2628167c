"""The data module: from a folder or a list to batches, with what it warns of and refuses."""

import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import set_up, write_classes, write_images
from PIL import Image

from bcnn.data.datamodule import SAMPLE_WORKERS, FineGrainedDataModule
from bcnn.data.splits import SplitRecord
from bcnn.data.transforms import Preprocessing
from bcnn.utils.errors import UserError


def lengths(data: FineGrainedDataModule) -> tuple[int, int, int]:
    return len(data.train), len(data.val), len(data.test)


def test_folders_become_splits(images: Path) -> None:
    data = set_up(images, val_fraction=0.34)
    assert (data.classes, lengths(data)) == (["blue", "green", "red"], (12, 6, 6))
    assert {*data.digests} == {path for path, _ in (*data.train, *data.val, *data.test)}
    assert data.split.train == {data.digests[path] for path, _ in data.train}
    assert lengths(set_up(images, val_fraction=0)) == (18, 0, 6)
    write_images(images / "val", 1, seed=3)
    assert lengths(set_up(images, val_fraction=0.34)) == (18, 3, 6)


def test_class_folders_alone_are_split_by_the_seed(tmp_path: Path) -> None:
    write_classes(tmp_path, cat=40, dog=20)
    data = set_up(tmp_path)
    train, val, test = lengths(data)
    assert train + val + test == 60 and 4 <= val <= 8 and 9 <= test <= 15
    assert len({*data.train, *data.val, *data.test}) == 60
    assert all({label for _, label in part} == {0, 1} for part in (data.train, data.val, data.test))
    assert set_up(tmp_path).test == data.test
    assert set_up(tmp_path, seed=1).test != data.test
    assert lengths(set_up(tmp_path, val_fraction=0, test_fraction=0)) == (60, 0, 0)
    assert lengths(set_up(tmp_path, val_fraction=0)) == (48, 0, 12)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"list": "labels.csv"}, r"either data\.root=FOLDER or data\.list=FILE"),
        ({"root": None}, "either"),
        ({"val_fraction": 1}, "val_fraction=1"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "together under 1"),
        ({"crop_pct": 1.5}, "crop_pct=1.5"),
        ({"train_scale": 1.5}, "train_scale=1.5"),
        ({"train_fraction": 0}, "train_fraction=0: choose from over 0 to 1"),
        ({"resize": "kep"}, "data.resize=kep: choose from keep, squash"),
        ({"interpolation": "nearest"}, "interpolation=nearest: choose from null, bilinear, bicubic"),
        ({"on_invalid_image": "ignore"}, "data.on_invalid_image=ignore: choose from raise, skip"),
        ({"sampler": "random"}, "data.sampler=random: choose from null, balanced"),
    ],
)
def test_options_that_would_silently_mean_something_else(
    options: dict[str, object], sentence: str, images: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        set_up(**{"root": images, **options})  # type: ignore[arg-type]


def test_mistakes_of_a_set_are_errors(images: Path, tmp_path: Path) -> None:
    write_classes(tmp_path / "few", cat=8, dog=2, eel=1)
    with pytest.raises(UserError, match=r"too few images of dog \(2\), eel \(1\).*3 different ones"):
        set_up(tmp_path / "few")
    assert lengths(set_up(tmp_path / "few", val_fraction=0, test_fraction=0)) == (11, 0, 0)
    write_classes(images / "test", white=1)
    with pytest.raises(UserError, match="test holds classes that train lacks: white"):
        set_up(images)


def test_broken_images_are_an_error_or_left_out(images: Path, logged: pytest.LogCaptureFixture) -> None:
    broken = [*(images / "train" / "red").glob("[01].png"), images / "test" / "blue" / "0.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"3 of 24 images cannot be decoded") as error:
        set_up(images)
    listing = Path(next(word for word in str(error.value).split() if word.endswith("-broken.txt")))
    assert {line.split("\t")[0] for line in listing.read_text().splitlines()} == set(map(str, broken))
    data = set_up(images, on_invalid_image="skip", val_fraction=0)
    assert lengths(data) == (16, 0, 5)
    assert not {path for path, _ in data.train} & set(map(str, broken))
    assert f"left out 3 images that cannot be decoded ({listing}): red 2, blue 1" in logged.messages


def test_copies_and_imbalance_are_warned_of(images: Path, logged: pytest.LogCaptureFixture) -> None:
    set_up(images)
    assert not logged.messages
    original = images / "train" / "red" / "0.png"
    shutil.copy(original, images / "test" / "red" / "copy.png")
    set_up(images, val_fraction=0)
    assert "1 of 7 images in test are in train too" in logged.text and f"= {original}" in logged.text
    logged.clear()
    write_classes(images.parent / "uneven" / "train", many=42, few=2)
    set_up(images.parent / "uneven", val_fraction=0, sampler="balanced")
    assert not logged.messages
    set_up(images.parent / "uneven", val_fraction=0)
    assert "42 training images of many and 2 of few" in logged.text


def test_a_network_s_preprocessing_is_used(images: Path) -> None:
    data = set_up(images)
    assert data.preprocessing == Preprocessing(32)
    data.use_preprocessing(Preprocessing(64, "squash", 0.875, "bicubic", divisor=16))
    assert next(iter(data.train_dataloader()))[0].shape[1:] == (3, 64, 64)  # 57.6, a multiple of 16
    assert next(iter(data.test_dataloader()))[0].shape[1:] == (3, 64, 64)
    data.use_preprocessing(Preprocessing(32, divisor=8, min_size=48))
    assert next(iter(data.train_dataloader()))[0].shape[1:] == (3, 48, 48)


def test_images_are_loaded_at_the_side_that_they_are_resized_to(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[int] = []
    picture = Image.new("RGB", (80, 80))
    monkeypatch.setattr(
        "bcnn.data.datamodule.load_image", lambda path, side: sides.append(side) or picture
    )
    data = set_up(images, size=48, crop_pct=0.75)
    for loader in (data.train_dataloader(), data.test_dataloader()):
        next(iter(loader))
    assert {*sides} == {64}  # the crop's is 48


@pytest.mark.parametrize("cache", [True, False])
def test_training_images_are_cached_and_those_to_evaluate_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split in ("train", "val"):
        write_classes(tmp_path / "set" / split, a=1, b=1)
    data = set_up(tmp_path / "set", cache=cache, size=12)
    for loader in (data.val_dataloader(), data.sample_dataloader(), data.train_dataloader()):
        assert not list(tmp_path.glob("cache/bcnn/reduced/*/*"))
        for _ in loader:
            pass
    assert len(list(tmp_path.glob("cache/bcnn/reduced/*/*"))) == 2 * cache


def test_a_sample_has_each_class_in_proportion(tmp_path: Path) -> None:
    write_classes(tmp_path, many=40, few=8)
    options = {"val_fraction": 0, "test_fraction": 0}
    uneven = [set_up(tmp_path, seed=seed, **options) for seed in (0, 0, 1)]
    labels = torch.cat([label for _, label in uneven[0].sample_dataloader(12)])
    assert labels.bincount().tolist() == [2, 10]
    assert len(torch.cat([label for _, label in uneven[0].sample_dataloader()])) == 48
    paths = [each.sample_dataloader(12).dataset.samples for each in uneven]  # type: ignore[attr-defined]
    assert paths[0] == paths[1] != paths[2]


def test_a_part_has_fewer_classes_and_images(tmp_path: Path) -> None:
    write_classes(tmp_path, ant=8, bee=12, cow=20, dog=4)
    data = set_up(tmp_path, val_fraction=0.25, test_fraction=0.25)
    names = {path: data.classes[label] for path, label in (*data.train, *data.val)}
    part = data.part(classes=3, images=9)
    assert len(part.classes) == 3 and part.classes == sorted(part.classes)
    assert len(part.train) == 9 and 3 <= len(part.val) <= 9 and part.test == []
    assert {names[path] for path, _ in part.train} == {*part.classes}
    for split in ("train", "val"):
        samples = getattr(part, split)
        assert {*(path for path, _ in samples)} < {*(path for path, _ in getattr(data, split))}
        assert all(part.classes[label] == names[path] for path, label in samples)
    assert data.part(classes=3, images=9).train == part.train
    everything = data.part(classes=9, images=99)
    assert everything.classes == data.classes and {*everything.train} == {*data.train}
    assert len(data.classes) == 4 and data.test


def test_the_sample_s_loader_is_made_once_and_keeps_its_few_workers(images: Path) -> None:
    data = set_up(images, num_workers=16)
    loader = data.sample_dataloader()
    assert data.sample_dataloader() is loader
    assert loader.num_workers == SAMPLE_WORKERS and loader.persistent_workers
    assert data.train_dataloader().persistent_workers and data.train_dataloader().num_workers == 16
    data.use_preprocessing(Preprocessing(48))
    assert data.sample_dataloader() is not loader
    data.batch_size = 2  # a run that is resumed between two stages rounds the same way
    assert data.sample_dataloader().batch_size == 2


def test_the_splits_of_a_checkpoint_are_followed(
    tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, 12)
    record = set_up(tmp_path, seed=1).split
    write_images(tmp_path, 1, seed=7)  # over 0.png of each class: one image gone, one new
    data = set_up(tmp_path, seed=2)
    data.follow(record)
    assert "splits of the checkpoint (seed=1, val_fraction=0.1, test_fraction=0.2, " in logged.text
    assert "33 of its 36 images are here and 3 new ones" in logged.text
    assert record.train < data.split.train and len(data.split.train - record.train) == 3
    assert (data.split.val, data.split.test) == (record.val, record.test)
    assert data.split.recipe == record.recipe
    assert {data.digests[path] for path, _ in data.test} < record.test


def test_the_splits_of_a_checkpoint_are_followed_by_images_saved_again(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 12)
    before = set_up(tmp_path / "photos", seed=1)
    for path in (tmp_path / "photos").rglob("*.png"):
        with Image.open(path) as image:
            again = tmp_path / "again" / path.parent.name / path.with_suffix(".webp").name
            again.parent.mkdir(parents=True, exist_ok=True)
            image.save(again, lossless=True)
    data = set_up(tmp_path / "again", seed=2)
    data.follow(before.split)
    for split in ("train", "val", "test"):
        found, expected = (
            {(Path(path).stem, label) for path, label in getattr(each, split)}
            for each in (data, before)
        )
        assert found == expected
    assert before.split.train < data.split.train


def test_a_share_of_the_training_images_is_drawn_of_each_class(tmp_path: Path) -> None:
    write_classes(tmp_path, a=40, b=20, c=3)
    whole = set_up(tmp_path)
    parts = {share: set_up(tmp_path, train_fraction=share) for share in (0.1, 0.25, 0.5, 1.0)}
    trained = [set(data.train) for data in parts.values()]
    assert all(less < more for less, more in pairwise(trained)) and parts[1.0].train == whole.train
    for share, data in parts.items():
        assert (data.val, data.test) == (whole.val, whole.test)
        assert data.split.recipe["train_fraction"] == share
        assert data.split.train == {data.digests[path] for path, _ in data.train}
        of_class = [Counter(label for _, label in each.train) for each in (data, whole)]
        assert all(of_class[0][k] == max(1, round(share * of_class[1][k])) for k in range(3))
    assert {path for path, _ in set_up(tmp_path, train_fraction=0.5, seed=1).train} != trained[2]


def test_a_fine_tune_with_the_same_share_trains_on_the_same_images(tmp_path: Path) -> None:
    write_classes(tmp_path, a=20, b=20)
    first, then = set_up(tmp_path, train_fraction=0.5), set_up(tmp_path, train_fraction=0.5, seed=1)
    then.follow(first.split)
    assert (then.train, then.val, then.split) == (first.train, first.val, first.split)


def test_a_record_of_other_images_changes_no_split(images: Path) -> None:
    data = set_up(images)
    before = data.train, data.val, data.test
    data.follow(SplitRecord({"seed": 1}, frozenset({"a"}), frozenset({"b"}), frozenset()))
    assert (data.train, data.val, data.test) == before
    assert data.split.train == {"a", *(data.digests[path] for path, _ in data.train)}
