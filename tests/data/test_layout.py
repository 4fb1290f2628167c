"""Folders and lists as people have them: what becomes of them, and what is said before training."""

import csv
import os
import unicodedata
from pathlib import Path

import pytest
from conftest import bounded, mutated, set_up, write, write_classes, write_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.index import read_folder, read_list
from bcnn.utils.cells import harmless, name_of
from bcnn.utils.errors import UserError


def lengths(data: FineGrainedDataModule) -> tuple[int, int, int]:
    return len(data.train), len(data.val), len(data.test)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Valid"])
def test_a_validation_folder_by_any_of_its_names(images: Path, val: str) -> None:
    write_images(images / val, 1, seed=3)
    assert lengths(set_up(images)) == (18, 3, 6)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", "Validation", "Testing"),
        ("TRAIN", "dev", "Eval"),
        ("seg_train", "seg_val", "seg_test"),
        ("train2017", "val2017", "test2017"),
        ("train_set", "valid-set", "test set"),
        ("trainset", "devset", "hold_out"),
        ("images_train", "images_validation", "images_test"),
    ],
)
def test_splits_by_the_names_that_people_use(tmp_path: Path, train: str, val: str, test: str) -> None:
    for number, name in enumerate((train, val, test)):
        write_images(tmp_path / name, 3 - number, seed=number)
    data = set_up(tmp_path)
    assert (data.classes, lengths(data)) == (["blue", "green", "red"], (9, 6, 3))


def test_a_split_within_a_folder_of_its_name(tmp_path: Path) -> None:
    for number, name in enumerate(("seg_train", "seg_test")):
        write_images(tmp_path / name / name, 3, seed=number)
    assert lengths(set_up(tmp_path, val_fraction=0)) == (9, 0, 9)


def test_what_looks_like_a_split_and_is_none_that_is_known_is_named(images: Path) -> None:
    write_images(images / "extra", 1, seed=9)
    with pytest.raises(UserError, match=r"extra holds images beside test/, train/.*move it away"):
        set_up(images)
    (images / "extra").rename(images / "eval")
    with pytest.raises(UserError, match="eval/ and test/: keep one"):
        set_up(images)


def test_flat_images_beside_splits_are_not_forgotten(images: Path) -> None:
    write(images / "unlabelled" / "a.png")
    with pytest.raises(UserError, match="unlabelled holds images beside"):
        set_up(images)
    (images / "unlabelled").rename(images / "annotations")
    (images / "annotations" / "a.png").rename(images / "annotations" / "a.xml")
    assert lengths(set_up(images, val_fraction=0)) == (18, 0, 6)


def test_a_split_beside_class_folders_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    write_images(tmp_path / "unseen", 2, seed=1)
    with pytest.raises(UserError, match="unseen holds folders of the same names as those beside it"):
        set_up(tmp_path)
    (tmp_path / "unseen").rename(tmp_path / "test")
    with pytest.raises(UserError, match=r"blue holds images beside test/"):
        set_up(tmp_path)


def test_a_class_may_have_a_split_s_word_in_its_name(tmp_path: Path) -> None:
    write_classes(tmp_path, bullet_train=4, test_tube=4)
    assert set_up(tmp_path).classes == ["bullet_train", "test_tube"]
    (tmp_path / "bullet_train" / "day").mkdir()
    for path in list((tmp_path / "bullet_train").glob("*.png")):
        path.rename(path.parent / "day" / path.name)
    with pytest.raises(UserError, match="bullet_train looks like a split"):
        set_up(tmp_path)


def test_class_folders_that_may_be_splits_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("lernen", "prüfen")):
        write_images(tmp_path / name, 4, seed=number)
    assert set_up(tmp_path).classes == ["lernen", "prüfen"]
    assert (
        "lernen/, prüfen/ hold folders of the same names (blue, green, red)" in capsys.readouterr().out
    )


def test_files_that_are_no_images_by_their_names_are_counted(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(images)
    assert "left out" not in capsys.readouterr().out
    for name in ("a.CR2", "b.CR2", "c", "d.jpg_large"):
        (images / "train" / "red" / name).write_bytes(b"some bytes")
    set_up(images)
    assert "4 files left out, no images or counted already: 2 .CR2, " in capsys.readouterr().out


def test_class_folders_alone_are_split_by_the_seed(tmp_path: Path) -> None:
    write_classes(tmp_path, cat=40, dog=20)
    data = set_up(tmp_path)
    assert data.classes == ["cat", "dog"]
    train, val, test = lengths(data)
    assert train + val + test == 60 and 4 <= val <= 8 and 9 <= test <= 15
    assert len({*data.train, *data.val, *data.test}) == 60
    assert all({label for _, label in part} == {0, 1} for part in (data.train, data.val, data.test))
    assert set_up(tmp_path).test == data.test
    assert set_up(tmp_path, seed=1).test != data.test
    assert lengths(set_up(tmp_path, val_fraction=0, test_fraction=0)) == (60, 0, 0)
    assert lengths(set_up(tmp_path, val_fraction=0)) == (48, 0, 12)


def test_test_images_are_drawn_from_train_only_when_asked_for(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", cat=10, dog=10)
    assert lengths(set_up(tmp_path)) == (18, 2, 0)
    assert lengths(set_up(tmp_path, val_fraction=0, test_fraction=0.5)) == (10, 0, 10)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_classes(tmp_path, bus=4, train=4)
    assert set_up(tmp_path).classes == ["bus", "train"]


LISTS = {
    "CSV with a header": "path,label,split\n{}",
    "CSV without a header": "{}",
    "columns in another order": "label;notes;path\n{}",
    "tabs": "path\tlabel\tsplit\n{}",
    "blanks": "{}",
    "from a spreadsheet": "\ufeffpath;label;split\r\n{}",
}


@pytest.mark.parametrize("kind", LISTS)
def test_list(kind: str, tmp_path: Path) -> None:
    mark = {"tabs": "\t", "blanks": " ", "from a spreadsheet": ";"}.get(kind, ",")
    lines = []
    for number in range(12):
        name, split = ("cat", "dog")[number % 2], ("train", "train", "Validation", "test")[number // 3]
        path = tmp_path / "some photos" / f"{number}, ü.png"
        write(path, seed=number)
        quoted = f'"{path.relative_to(tmp_path) if number else path}"'  # the first one absolute
        if kind == "columns in another order":
            lines.append(f"{name};none;{quoted}")
        else:
            lines.append(mark.join((quoted, name, split)))
    text = LISTS[kind].replace("{}", "\n".join(lines) + "\n\n")
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8", newline="")
    data = set_up(list=tmp_path / "labels.csv")
    assert data.classes == ["cat", "dog"]
    if kind == "columns in another order":  # and no split: both are drawn
        assert min(lengths(data)) >= 2 and sum(lengths(data)) == 12
    else:
        assert lengths(data) == (6, 3, 3)
    first = next(label for path, label in (*data.train, *data.val, *data.test) if "/0," in path)
    assert data.classes[first] == "cat"
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape[1:] == (3, 29, 29)  # nine tenths


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("a.png", "line 1: expected path,label"),
        ("a.png,cat\nb.png,dog,train", "line 2: 3 columns where 2"),
        ("a.png,cat,train\nb.png,dog,spare", "line 2: split 'spare'"),
        ("a.png,cat\na.png,dog", "line 2: a.png is in the list already"),
        ("a.png,cat\nb.png,", "line 2: no label"),
        ("file,class\na.png,cat\nb.png,dog", "1 files that do not exist.*file"),
        ("a.png,cat\nc.png,dog", "1 files that do not exist.*c.png"),
        ("a.png,cat\n..\\x\\c.png,dog", r"in line 2: .*c\.png \(Windows parts folders by .*: write /"),
        ("a.png,cat\nb.png,cat", "one class only"),
        ('a.png,cat\n"b.png,dog\n' + "c.png,dog\n" * 20_000, "line 2: field larger than field limit"),
        ('a.png,"cat\nb.png,dog\n', "line 1: a label of several lines: is there a stray quote"),
        ('\n"a.png,cat\nb.png,dog\n', "line 2: expected path,label"),
        ("a.png,cat\nb.png\0,dog", r"the first of them in line 2: .*b.png\\x00 "),
        ("a.png,cat\n" + "b" * 100_000 + ",dog", r"in line 2: .{9,999} \(a line that names"),
    ],
)
def test_a_list_with_a_mistake_is_told_by_its_line(text: str, sentence: str, tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "b.png")):
        write(tmp_path / name, seed=number)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=sentence):
        set_up(list=tmp_path / "labels.csv")


def test_a_list_that_is_no_text_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such list"):
        set_up(list=tmp_path / "labels.csv")
    for encoding, line in (("latin-1", 2), ("utf-16", 1)):
        (tmp_path / "labels.csv").write_bytes("a,b\né,è".encode(encoding))
        with pytest.raises(UserError, match=f"line {line}: no UTF-8 text: save it as such"):
            set_up(list=tmp_path / "labels.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    for place in (tmp_path, tmp_path / "pipe.csv"):
        with pytest.raises(UserError, match="is not a regular file"):
            set_up(list=place)


def test_a_name_with_a_line_break_is_read_from_a_list(tmp_path: Path) -> None:
    write(tmp_path / "a\nb.png")
    (tmp_path / "labels.csv").write_text('"a\nb.png",cat\n')
    assert read_list(tmp_path / "labels.csv").paths == [str(tmp_path / "a\nb.png")]


@pytest.mark.fuzz
@given(st.lists(st.sampled_from("=+-@\t\r'a")).map("".join), st.text())
def test_cells_are_no_formulas_and_lists_read_the_names_that_they_were(start: str, end: str) -> None:
    cell = harmless(start + end)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert name_of(cell) == start + end


def test_a_list_of_names_that_look_like_formulas(tmp_path: Path) -> None:
    names = ["=1+1.png", "-2.png", "@x.png", "'a'.png", "'=.png"]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        for number, name in enumerate(names):
            write(tmp_path / name, number)
            csv.writer(file).writerow([harmless(name), harmless("+1")])
    layout = read_list(tmp_path / "labels.csv")
    assert (layout.paths, layout.classes) == ([str(tmp_path / name) for name in names], ["+1"])


PARTS = ("a.png", "b.png", "ü.png", "path", "label", "split", "train", "val", "cat", "x" * 200_000)
MARKS = (",", ",", ",", "\n", "\n", "\r\n", "\t", ";", " ", '"', "\0", "\r", "\ufeff", "\u2028")
TEXTS = st.builds(
    lambda parts, encoding: "".join(parts).encode(encoding, "surrogatepass"),
    st.lists(st.sampled_from(PARTS + MARKS) | st.text(max_size=3), max_size=30),
    st.sampled_from(["utf-8"] * 4 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"]),
)
VALID = 'path,label,split\na.png,cat,train\n"b.png",dog,val\nü.png,cat,test\n'.encode()


@pytest.mark.fuzz
def test_any_list_is_read_or_told_in_a_sentence(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "ü.png"):
        (tmp_path / name).touch()
    file = tmp_path / "labels.csv"

    @given(TEXTS | mutated([VALID]))
    def holds(content: bytes) -> None:
        file.write_bytes(content)
        with bounded():
            try:
                layout = read_list(file)
            except UserError as error:
                assert str(file) in str(error) and len(str(error)) < 3000
                assert "\n" not in str(error)
            else:
                assert all(Path(path).is_file() for path in layout.paths)

    holds()


def describe(folder: Path, **labels: str) -> None:
    """Images in a folder, and Hugging Face's list of them."""
    for name in labels:
        write(folder / f"{name}.png")
    lines = [f'"a photograph",{name}.png,{label}' for name, label in labels.items()]
    (folder / "metadata.csv").write_text("\n".join(["text,file_name,label", *lines]))


def test_images_labelled_by_a_metadata_file(tmp_path: Path) -> None:
    describe(tmp_path / "all", a="red", b="blue", c="red")
    layout = read_folder(tmp_path / "all")
    assert (layout.classes, layout.divided) == (["blue", "red"], False)
    assert {(Path(path).name, layout.classes[label]) for path, label in layout.samples} == {
        *(("a.png", "red"), ("b.png", "blue"), ("c.png", "red"))
    }
    describe(tmp_path / "parts" / "train", a="red", b="blue", c="green")
    describe(tmp_path / "parts" / "validation", d="red")
    layout = read_folder(tmp_path / "parts")
    assert layout.classes == ["blue", "green", "red"] and layout.divided
    assert [len(samples) for samples in layout.splits.values()] == [3, 1, 0]
    assert layout.val == [(str(tmp_path / "parts" / "validation" / "d.png"), 2)]
    write_images(tmp_path / "parts" / "test", 1)
    with pytest.raises(UserError, match=r"parts/test has no metadata\.csv"):
        read_folder(tmp_path / "parts")


def test_class_folders_count_where_images_are_in_them(images: Path) -> None:
    for folder in (images, images / "train"):
        (folder / "metadata.csv").write_text("file_name,label\nred/0.png,blue\n")
    assert read_folder(images).classes == ["blue", "green", "red"]


def test_a_folder_or_a_list_and_not_both(tmp_path: Path) -> None:
    for options in ({}, {"root": tmp_path, "list": tmp_path / "labels.csv"}):
        with pytest.raises(UserError, match=r"either data\.root=FOLDER or data\.list=FILE"):
            set_up(**options)  # type: ignore[arg-type]


def test_what_is_no_photograph_of_the_user_s_is_ignored(images: Path) -> None:
    red = images / "train" / "red"
    for name in (".DS_Store", "._0.png", "Thumbs.db", "0.png~", "0.png.bak", "#0.png#", "notes.txt"):
        (red / name).write_bytes(b"nothing")
    for folder in (images / "train", red):
        write(folder / "@eaDir" / "0.png")
        write(folder / ".ipynb_checkpoints" / "0-checkpoint.png")
        write(folder / "__MACOSX" / "0.png")
    data = set_up(images, val_fraction=0)
    assert (data.classes, len(data.train)) == (["blue", "green", "red"], 18)


def test_any_unicode_in_names_and_one_class_however_it_is_spelled(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "Café [1] 蝶 🦋") for form in ("NFC", "NFD"))
    write_classes(tmp_path / "train", **{composed: 3, "Ñandú": 3})
    write_classes(tmp_path / "test", **{apart: 2})
    write(tmp_path / "train" / apart / "ß ö 写真.png", seed=77)
    data = set_up(tmp_path)
    assert data.classes == [composed, "Ñandú"]
    assert {label for _, label in data.test} == {0} and len(data.test) == 2
    assert lengths(data) == (5, 2, 2)


def test_mistakes_about_folders_are_told_by_name(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        set_up(tmp_path / "nowhere")
    (images / "valid").mkdir()
    (images / "val").mkdir()
    with pytest.raises(UserError, match="val/ and valid/"):
        set_up(images)
    write_classes(tmp_path / "held" / "test", cat=1)
    with pytest.raises(UserError, match=r"images of test alone, and none to train on"):
        set_up(tmp_path / "held")


@pytest.mark.parametrize("folders", [(), ("cat", "dog"), ("train",), ("train/cat", "test/cat")])
def test_no_images(folders: tuple[str, ...], tmp_path: Path) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=r"no images in .*expected <class>/<images>"):
        set_up(tmp_path)


def test_one_class(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", only=4)
    with pytest.raises(UserError, match=r"one class only \(only\)"):
        set_up(tmp_path)


def test_an_empty_class_is_a_mistake_in_train_and_none_in_test(images: Path) -> None:
    for path in (images / "test" / "red").iterdir():
        path.unlink()
    assert lengths(set_up(images, val_fraction=0)) == (18, 0, 4)
    (images / "train" / "violet").mkdir()
    with pytest.raises(UserError, match="no images of the class violet; add some, or remove"):
        set_up(images)


@pytest.mark.parametrize("split", ["val", "test"])
def test_classes_that_train_lacks(images: Path, split: str) -> None:
    write_classes(images / split, violet=1, white=1)
    with pytest.raises(UserError, match=f"{split} holds classes that train lacks: violet, white"):
        set_up(images)


def test_too_few_images_for_the_split_asked_for(tmp_path: Path) -> None:
    write_classes(tmp_path, cat=8, dog=2, eel=1)
    with pytest.raises(UserError, match=r"too few images of dog \(2\), eel \(1\).*3 different ones"):
        set_up(tmp_path)
    with pytest.raises(UserError, match=r"too few images of eel \(1\): data.test_fraction=0.5 "):
        set_up(tmp_path, val_fraction=0, test_fraction=0.5)
    assert lengths(set_up(tmp_path, val_fraction=0, test_fraction=0)) == (11, 0, 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"val_fraction": 1}, "val_fraction=1"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"broken": "ignore"}, "data.on_invalid_image=ignore: choose from stop, skip"),
        ({"sampler": "random"}, "data.sampler=random: choose null or balanced"),
    ],
)
def test_options_out_of_range(options: dict[str, object], sentence: str, images: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        set_up(images, **options)


def test_broken_images_stop_and_are_listed_or_are_left_out(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [images / "train" / "red" / f"{n}.png" for n in range(2)]
    broken.append(images / "test" / "blue" / "0.png")
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"3 of 24 images .*data\.broken=skip") as error:
        set_up(images)
    listing = Path(next(word for word in str(error.value).split() if word.endswith("-broken.txt")))
    assert {line.split("\t")[0] for line in listing.read_text().splitlines()} == set(map(str, broken))
    capsys.readouterr()
    data = set_up(images, on_invalid_image="skip", val_fraction=0)
    assert lengths(data) == (16, 0, 5)
    assert not {path for path, _ in data.train} & set(map(str, broken))
    printed = capsys.readouterr().out
    assert "left out 3 images" in printed and "red 2, blue 1" in printed and str(listing) in printed


def test_a_class_whose_images_are_all_broken_is_not_skipped_silently(images: Path) -> None:
    for path in (images / "train" / "red").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="test holds classes that train lacks: red"):
        set_up(images, on_invalid_image="skip")


def test_the_same_image_in_train_and_test_is_counted(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(images)
    assert "warning" not in capsys.readouterr().out
    original = images / "train" / "red" / "0.png"
    (images / "test" / "red" / "copy.png").write_bytes(original.read_bytes())
    with Image.open(original) as image:  # other bytes, the same pixels
        image.save(images / "test" / "blue" / "again.bmp")
    set_up(images, val_fraction=0)
    printed = capsys.readouterr().out
    assert "warning: 2 of 8 images in test are in train too" in printed
    assert f"copy.png = {original}" in printed


def test_imbalance_beyond_20_to_1_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(tmp_path / "train", many=40, few=2)
    set_up(tmp_path, val_fraction=0)
    assert "warning" not in capsys.readouterr().out
    write(tmp_path / "train" / "many" / "one more.png", seed=99)
    set_up(tmp_path, val_fraction=0)
    assert "warning: 41 training images of many and 2 of few" in capsys.readouterr().out
    set_up(tmp_path, val_fraction=0, sampler="balanced")
    assert "warning" not in capsys.readouterr().out


def test_the_folder_that_one_is_in(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    assert lengths(set_up(Path("."), val_fraction=0)) == (18, 0, 6)


def test_a_metadata_file_without_labels_is_named(tmp_path: Path) -> None:
    write(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a cat\n")
    with pytest.raises(UserError, match=r"metadata\.csv names no columns file_name,label"):
        set_up(tmp_path)
