"""Folders as people have them: which images are of which class and split, and what is an error."""

import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write, write_classes, write_images

from bcnn.data.image_files import files_below, find_images, images_below
from bcnn.data.index import ImageIndex, choose_classes, mistakes, read_folder
from bcnn.utils.errors import UserError


def lengths(root: Path) -> tuple[int, ...]:
    return tuple(len(samples) for samples in read_folder(root).splits.values())


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "valid", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "dev", "Eval"),
        ("seg_train/seg_train", "seg_val", "seg_test/seg_test"),
        ("train2017", "val2017", "test2017"),
        ("train_set", "devset", "hold_out"),
    ],
)
def test_splits_by_the_names_that_people_use(tmp_path: Path, train: str, val: str, test: str) -> None:
    for number, name in enumerate((train, val, test)):
        write_images(tmp_path / name, 3 - number)
    index = read_folder(tmp_path)
    assert (index.classes, lengths(tmp_path)) == (["blue", "green", "red"], (9, 6, 3))
    assert index.divided


def test_an_unknown_folder_of_images_beside_splits_is_an_error(images: Path) -> None:
    write_images(images / "extra", 1)
    with pytest.raises(UserError, match=r"extra holds images beside test/, train/.*move it away"):
        read_folder(images)
    (images / "extra").rename(images / "eval")
    with pytest.raises(UserError, match="eval/ and test/: keep one"):
        read_folder(images)
    shutil.rmtree(images / "eval")
    write(images / "unlabelled" / "a.png")
    with pytest.raises(UserError, match="unlabelled holds images beside"):
        read_folder(images)
    (images / "unlabelled" / "a.png").rename(images / "unlabelled" / "a.xml")
    assert lengths(images) == (18, 0, 6)


def test_test_images_without_classes_are_left_out_with_a_word(images: Path) -> None:
    shutil.rmtree(images / "test")
    for number in range(3):
        write(images / "test" / f"{number}.png")
    index = read_folder(images)
    assert (len(index.train), index.test, index.divided) == (18, [], True)
    assert any(f"bcnn predict CKPT {images / 'test'}" in remark for remark in index.remarks)
    write(images / "test" / "red" / "0.png")  # some have a class
    with pytest.raises(UserError, match="test holds images beside train/"):
        read_folder(images)


def test_images_without_class_folders_are_no_set(images: Path) -> None:
    (sentence,) = mistakes(read_folder(images / "train" / "red"), images / "train" / "red")
    assert "put its images into a folder for each class" in sentence


def test_a_split_beside_class_folders_is_an_error(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    write_images(tmp_path / "unseen", 2)
    with pytest.raises(UserError, match="unseen holds folders of the same names as those beside it"):
        read_folder(tmp_path)
    (tmp_path / "unseen").rename(tmp_path / "test")
    with pytest.raises(UserError, match=r"blue holds images beside test/"):
        read_folder(tmp_path)


def test_a_class_may_have_a_split_s_word_in_its_name(tmp_path: Path) -> None:
    write_classes(tmp_path, bullet_train=4, test_tube=4, train=4)
    assert read_folder(tmp_path).classes == ["bullet_train", "test_tube", "train"]
    (tmp_path / "bullet_train" / "day").mkdir()
    for path in list((tmp_path / "bullet_train").glob("*.png")):
        path.rename(path.parent / "day" / path.name)
    with pytest.raises(UserError, match="bullet_train may be a split: call it train/"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("train", "test"),
    [("TrainImages", "TestImages"), ("trn", "tst"), ("lernen", "prüfen"), ("a/images", "b/images")],
)
def test_folders_of_the_same_classes_are_no_classes(tmp_path: Path, train: str, test: str) -> None:
    """Nor where one lacks a class, spells it otherwise, or has images beside its folders."""
    write_images(tmp_path / train, 4)
    write_images(tmp_path / test, 4)
    shutil.rmtree(tmp_path / test / "green")
    (tmp_path / test / "red").rename(tmp_path / test / "Red")
    write(tmp_path / test / "overview.png")
    message = "hold the same folders .*blue.*: call splits train/, val/ and test/, or move"
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path)


def test_classes_with_equal_folders_are_read_in_a_split(tmp_path: Path) -> None:
    names = "iris", "rose", "tulip"
    for name in names:
        write(tmp_path / name / "photos" / "front" / "0.png")
    assert read_folder(tmp_path).classes == [*names]  # one folder in all of them is usual
    for name in names:
        write(tmp_path / name / "photos" / "back" / "0.png")
    with pytest.raises(UserError, match=r"iris/ and rose/.* or move classes into .*/train$"):
        read_folder(tmp_path)
    for name in names:
        shutil.move(tmp_path / name, tmp_path / "train" / name)
    assert read_folder(tmp_path).classes == [*names] and lengths(tmp_path) == (6, 0, 0)


@pytest.mark.parametrize(
    "other", ["Rose", "rose\u200b", "ｒｏｓｅ", "ro\u00adse", " rose ", "\ufeffROSE"]
)
def test_classes_that_look_the_same_are_named(other: str) -> None:
    images = [("0", 0), ("1", 1), ("2", 2)]
    (sentence,) = mistakes(ImageIndex(["iris", "rose", other], images), Path("set"))
    assert f"names of classes look the same: 'rose' = {other!r}; rename one" in sentence
    names = ["A", "a", "rose L.", "rose\u2003l.", "rosé"]
    (sentence,) = mistakes(ImageIndex(names, [(name, i) for i, name in enumerate(names)]), Path("set"))
    assert sentence.count("=") == 1 and r"'rose L.' = 'rose\u2003l.'" in sentence


def test_images_beside_class_folders_are_a_remark(images: Path) -> None:
    for folder in (images, images / "train"):  # with splits, and without
        for name in ("1.jpg", "2.JPG", ".hidden.jpg", "notes.txt"):
            (folder / name).touch()
        (remark,) = read_folder(folder).remarks
        assert remark == f"2 images in {folder} left out, as no class folder holds them"
        for file in folder.glob("*.*"):
            file.unlink()


def test_files_without_an_image_s_suffix_are_a_remark(images: Path) -> None:
    assert not read_folder(images).remarks
    for name in ("a.CR2", "b.CR2", "c", "d.jpg_large"):
        (images / "train" / "red" / name).write_bytes(b"some bytes")
    (remark,) = read_folder(images).remarks
    assert remark == "4 files left out, no images: 2 .CR2, 1 without a suffix, 1 .jpg_large"


def test_files_of_the_system_and_of_runs_are_ignored(images: Path) -> None:
    red = images / "train" / "red"
    for name in (".DS_Store", "._0.png", "Thumbs.db"):
        (red / name).write_bytes(b"nothing")
    recycled = "#recycle", "#Recycle", "$RECYCLE.BIN", "$Recycle.Bin", "lost+found"
    for folder in (images, images / "train", red):
        for name in (
            "@eaDir",
            ".ipynb_checkpoints",
            "__MACOSX",
            "System Volume Information",
            *recycled,
        ):
            write(folder / name / "0.png")
    write(images / "outputs" / "2026-01-01" / "sheet.png")
    index = read_folder(images)
    assert (index.classes, lengths(images), index.remarks) == (["blue", "green", "red"], (18, 0, 6), [])


def test_a_class_is_one_however_its_name_is_spelled_in_unicode(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "Café [1] 蝶 🦋") for form in ("NFC", "NFD"))
    write_classes(tmp_path / "train", **{composed: 3, "Ñandú": 3})
    write_classes(tmp_path / "test", **{apart: 2})
    write(tmp_path / "train" / apart / "ß ö 写真.png")
    index = read_folder(tmp_path)
    assert index.classes == [composed, "Ñandú"]
    assert {label for _, label in index.test} == {0} and lengths(tmp_path) == (7, 0, 2)


def test_all_mistakes_are_named_at_once() -> None:
    index = ImageIndex(["a", "b", "c", "d"], [("0", 0)], [("1", 1)], [("2", 1), ("3", 3)])
    empty, val, test = mistakes(index, Path("set"))
    assert empty == "set: no images of the class c; add some, or remove the class"
    assert val.startswith("set: val holds classes that train lacks: b;")
    assert test.startswith("set: test holds classes that train lacks: b, d;")
    (none,) = mistakes(ImageIndex(["a"], test=[("0", 0)]), Path("set"))
    assert none == "set has images of val or test only: add images to train on"
    (one,) = mistakes(ImageIndex(["only"], [("0", 0)]), Path("set"))
    assert "one class only (only)" in one
    assert mistakes(ImageIndex(["a", "b"], [("0", 0), ("1", 1)]), Path("set")) == []
    assert mistakes(ImageIndex(["a"]), Path("set"))[0].startswith("no images in set: expected <class>/")


def test_chosen_classes_keep_their_images_and_splits(images: Path) -> None:
    everything = read_folder(images)
    index = choose_classes(everything, ["red", "blue"], seed=0)
    assert index.classes == ["blue", "red"] and index.divided
    for split, samples in everything.splits.items():
        named = [(path, everything.classes[label]) for path, label in samples]
        expected = [(path, name) for path, name in named if name != "green"]
        assert [(path, index.classes[label]) for path, label in index.splits[split]] == expected


def test_a_number_of_classes_is_drawn_by_seed() -> None:
    index = ImageIndex(["a", "b", "c"])
    drawn = [tuple(choose_classes(index, 2, seed).classes) for seed in range(12)]
    assert drawn == [tuple(choose_classes(index, 2, seed).classes) for seed in range(12)]
    assert {*drawn} == {("a", "b"), ("a", "c"), ("b", "c")}
    assert choose_classes(index, 3, seed=0).classes == ["a", "b", "c"]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def below(folder: Path, paths: Iterator[str]) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in paths]


def test_files_are_in_order_those_of_a_folder_before_those_below_it(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.jpg", "b/a/2.txt", "c.jpg", "a/3.jpg", ".hidden/4.jpg")
    assert below(tmp_path, files_below(tmp_path)) == ["c.jpg", "a/3.jpg", "b/1.jpg", "b/a/2.txt"]
    assert below(tmp_path, images_below(tmp_path)) == ["c.jpg", "a/3.jpg", "b/1.jpg"]


def test_a_linked_folder_is_entered_once(tmp_path: Path) -> None:
    root, pool = tmp_path / "set", tmp_path / "pool"
    touch(tmp_path, "set/0.jpg", "pool/1.jpg", "pool/deep/2.jpg")
    links = {"l1": pool, "l2": pool, "l3": pool / "deep", "l4": ".", "l5": "gone"}
    for link, target in links.items():
        (root / link).symlink_to(target)
    (pool / "round").symlink_to(pool)
    assert below(root, images_below(root)) == ["0.jpg", "l1/1.jpg", "l3/2.jpg"]


def test_paths_of_a_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.jpg", "b.png", "c.txt", "deep/d.jpg", "noname")
    monkeypatch.chdir(tmp_path)
    assert find_images(["noname", "b.png"]) == ["noname", "b.png"]  # files, whatever their names
    assert find_images(["*.jpg", "deep"]) == ["a.jpg", "deep/d.jpg"]
    assert find_images(["**/*"]) == ["a.jpg", "b.png", "deep/d.jpg"]
    monkeypatch.setattr("bcnn.data.image_files.logger.propagate", True)
    assert find_images(["."]) == ["./a.jpg", "./b.png", "./deep/d.jpg"]
    assert caplog.messages[-1] == "2 files left out: 1 .txt, 1 without a suffix"
    for path in ("*.gif", "nowhere", "c.*"):
        with pytest.raises(UserError, match="no images: "):
            find_images([path])
