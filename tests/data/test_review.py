"""Warnings about a set: copies across and within splits, near duplicates, imbalance; contact sheets."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write, write_classes
from PIL import Image

from bcnn.data.contact_sheet import contact_sheet, pair_sheet
from bcnn.data.index import ImageIndex, read_folder
from bcnn.data.integrity import Finding, check
from bcnn.data.review import duplicates, flat, imbalance, lookalikes, repeats, review


def index_of(**splits: str) -> tuple[ImageIndex, dict[str, Finding]]:
    """Images as `class digest` in words: "a1 b2" is one of class a and one of class b."""
    index = ImageIndex(["a", "b"])
    findings = {}
    for split, words in splits.items():
        for number, (name, digest) in enumerate(words.split()):
            path = f"{split}/{name}/{number}"
            index.splits[split].append((path, index.classes.index(name)))
            findings[path] = Finding("PNG", 1, 1, digest, perceptual_hash=int(digest, 16))
    return index, findings


def test_the_same_file_in_train_and_test_is_counted() -> None:
    index, findings = index_of(train="a1 a2 b3", val="b4", test="a1 b3 b5")
    (sentence,) = duplicates(index, findings)
    assert sentence.startswith("2 of 3 images in test are in train too")
    assert "test/a/0 = train/a/0; test/b/1 = train/b/2" in sentence
    assert not duplicates(*index_of(train="a1 a1", test="a2"))


def test_files_in_two_classes_and_repeated_ones_are_named() -> None:
    conflict, again = repeats(*index_of(train="a1 a2 b1 b3 b3 b3"))
    assert conflict.startswith("files in more than one class, of which one is wrong: 1, ")
    assert conflict.endswith(" for example train/a/0 = train/b/2")
    assert again.startswith("files that repeat another of their class: 2, for example train/b/4 = ")
    assert repeats(*index_of(train="a1 b2")) == []


def test_images_of_one_colour_are_counted_and_three_named() -> None:
    index = ImageIndex(["a"], [(f"{number}.png", 0) for number in range(5)])
    findings = {path: Finding("PNG", 1, 1, path, flat=True) for path in index.paths}
    assert flat(index, findings) == ["images of one colour: 5, for example 0.png; 1.png; 2.png"]
    assert flat(index, dict.fromkeys(findings, Finding())) == []


def test_imbalance_beyond_20_to_1_is_a_warning() -> None:
    assert imbalance(index_of(train="a1 " * 40 + "b2 " * 2)[0]) == []
    (sentence,) = imbalance(index_of(train="a1 " * 41 + "b2 " * 2)[0])
    assert sentence.startswith("41 training images of a and 2 of b, 20 to 1: data.sampler=balanced")


def smooth(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC)


def test_copies_saved_again_are_near_duplicates(tmp_path: Path) -> None:
    for seed, (split, name) in enumerate((s, n) for s in ("train", "test") for n in ("cat", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        for k in range(8):
            smooth(100 * seed + k).save(tmp_path / split / name / f"{k}.jpg")
    again = tmp_path / "test" / "dog"
    smooth(103).resize((100, 75)).save(again / "small.jpg", quality=40)
    smooth(104).save(again / "same.jpg")  # the same file: a duplicate
    smooth(105).save(again / "same.png")
    for split, colour in (("train", "blue"), ("test", "red")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / split / "cat" / "flat.png")
    index = read_folder(tmp_path)
    findings = check(tmp_path, index.paths)
    near = lookalikes(index, findings)
    train = tmp_path / "train" / "dog"
    expected = [(again / "same.png", train / "5.jpg"), (again / "small.jpg", train / "3.jpg")]
    assert near == {"val": [], "test": [(str(a), str(b)) for a, b in expected]}
    sentences = review(index, index, findings, near)
    for part in (
        "1 of 20 images in test are in train",
        "2 of 20 images in test look the same",
        "colour",
    ):
        assert any(part in sentence for sentence in sentences)
    assert len(sentences) == 4  # and the file that is repeated
    pair_sheet(near["test"], tmp_path / "new" / "pairs.png")
    with Image.open(tmp_path / "new" / "pairs.png") as picture:
        halves = np.asarray(picture.convert("RGB"), np.float32)[30:150, :384].reshape(120, 2, 192, 3)
    assert np.corrcoef(halves[:, 0, :180].ravel(), halves[:, 1, :180].ravel())[0, 1] > 0.95


@pytest.mark.parametrize(("classes", "images"), [(2, 8), (41, 4), (200, 2), (700, 1)])
def test_the_contact_sheet_has_room_for_many_classes(classes: int, images: int, tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    names = [f"{n} of a very long name, longer than there is room for" for n in range(classes)]
    samples = [(str(tmp_path / "a.png"), n) for n in range(classes) for _ in range(images)]
    contact_sheet(names, samples, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert max(picture.size) < 12_000 and np.asarray(picture).std() > 20


def test_a_class_without_images_is_on_the_contact_sheet(tmp_path: Path) -> None:
    write_classes(tmp_path, cat=1)
    index = read_folder(tmp_path)
    contact_sheet([*index.classes, "dog"], index.samples, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        left, right = np.split(np.asarray(picture.convert("L"))[:, : 2 * 8 * 96], 2, axis=1)
    assert left[20:].min() < 100 and right[20:].min() == 255
    assert right[:20].min() < 100  # its name
