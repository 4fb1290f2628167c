"""Taxonomies: files and columns of a list, and which are refused."""

from pathlib import Path

import pytest
from conftest import Bcnn, nest, set_up, write_classes, write_images

from bcnn.data.index import read_folder
from bcnn.data.taxonomy import find_taxonomy
from bcnn.utils.errors import UserError

CLASSES = ["blue", "green", "red"]
FILE = "colour,kind,all\nred,warm,c\ngreen,cold,c\nyellow,warm,c\nblue,cold,c\n"
TAXONOMY = {"colour": CLASSES, "kind": ["cold", "cold", "warm"], "all": ["c", "c", "c"]}


def test_a_file_is_read_in_the_order_of_the_classes(images: Path, tmp_path: Path) -> None:
    (tmp_path / "kinds.csv").write_text(FILE)
    data = set_up(images, taxonomy=tmp_path / "kinds.csv")
    assert (data.classes, data.taxonomy) == (CLASSES, TAXONOMY)
    two = set_up(images, taxonomy=str(tmp_path / "kinds.csv"), classes=["red", "green"])
    assert two.taxonomy == {"colour": ["green", "red"], "kind": ["cold", "warm"], "all": ["c", "c"]}
    assert set_up(images).taxonomy is None


def test_columns_of_the_list(tmp_path: Path) -> None:
    write_images(tmp_path, 9)
    kinds = {"blue": "cold", "green": "cold", "red": "warm"}
    lines = [f"{name}/{k}.png,{name},c1,{kinds[name]}" for name in kinds for k in range(9)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,camera,Kind", *lines]))
    data = set_up(None, list=tmp_path / "labels.csv", taxonomy=["Kind"])
    assert data.taxonomy == {"label": CLASSES, "kind": TAXONOMY["kind"]}
    with pytest.raises(UserError, match=r"labels\.csv has no column family"):
        set_up(None, list=tmp_path / "labels.csv", taxonomy=["kind", "family"])
    lines.append(f"{lines.pop().removesuffix('warm')}cold")
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,camera,kind", *lines]))
    with pytest.raises(UserError, match=r"labels\.csv names the label red twice"):
        set_up(None, list=tmp_path / "labels.csv", taxonomy=["kind"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (FILE.replace("green,cold,c\n", ""), "lacks the class green"),
        (FILE + "red,cold,c\n", "names the colour red twice"),
        (FILE.replace("blue,cold,c", "blue,cold,d"), "cold is in c and in d"),
        (FILE.replace("blue,cold", "blue,Cold"), "names look the same: 'Cold' = 'cold'"),
        (FILE.replace("red,warm", "red,"), "line 2: expected a name for each of colour, kind, all"),
        (FILE.replace("red,warm", "red"), "line 2: expected a name for each"),
        (FILE.replace("kind", "colour"), "expected a first line of names of levels"),
        ("blue\ngreen\nred\n", "expected a first line of names of levels"),
        ("", "is empty: expected a first line of class,parent"),
    ],
)
def test_what_is_no_tree_of_the_classes_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "kinds.csv").write_text(text)
    with pytest.raises(UserError, match=rf"kinds\.csv.*{sentence}"):
        find_taxonomy(tmp_path / "kinds.csv", None, CLASSES, {})


def test_columns_need_a_list(images: Path) -> None:
    with pytest.raises(UserError, match=r"there is no data\.list"):
        set_up(images, taxonomy=["kind"])


def test_class_folders_in_folders_of_their_parents(images: Path, bcnn: Bcnn) -> None:
    """A class that is less deep than others is its own parent."""
    flat = set_up(images)
    data = set_up(nest(images), taxonomy="folders")
    assert data.classes == flat.classes and data._index.counts("train") == [6, 6, 6]
    assert data.taxonomy == {
        "class": CLASSES,
        "folder 2": ["cold", "cold", "red"],
        "folder 1": ["all", "all", "warm"],
    }
    two = set_up(images, taxonomy="folders", classes=["red", "green"])
    assert two.taxonomy is not None and two.taxonomy["folder 2"] == ["cold", "red"]
    assert "classes: 2" in bcnn("check", images, "--output", images.parent / "flat").out
    assert "classes: 3" in bcnn("check", images, "--nested", "--output", images.parent / "nested").out


def test_an_image_beside_folders_is_of_the_class_of_its_folder(images: Path) -> None:
    (nest(images) / "train" / "all" / "cold" / "blue" / "0.png").rename(
        images / "train" / "all" / "cold" / "grey.png"
    )
    index = read_folder(images, nested=True)
    assert dict(zip(index.classes, index.counts("train"), strict=True)) == {
        "blue": 5,
        "cold": 1,
        "green": 6,
        "red": 6,
    }
    assert index.parents["cold"] == ["all"]


def test_folders_that_are_no_tree_are_refused(images: Path) -> None:
    with pytest.raises(UserError, match=r"folders: put class folders into folders of their parents"):
        set_up(images, taxonomy="folders")
    train = nest(images) / "train"
    (train / "all" / "cold").rename(train / "cold")
    with pytest.raises(UserError, match=r"test/all/cold/blue and .*train/cold/blue are one class"):
        set_up(images, taxonomy="folders")
    names = ("a/kind/dove", "a/kind/duck", "b/kind/oak")
    write_classes(images.parent / "other", **dict.fromkeys(names, 3))
    with pytest.raises(UserError, match="kind is in a and in b: give it one parent, or two names"):
        set_up(images.parent / "other", taxonomy="folders")
