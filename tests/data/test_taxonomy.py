"""Taxonomies: files and columns of a list, and which are refused."""

from pathlib import Path

import pytest
from conftest import set_up, write_images

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
        find_taxonomy(tmp_path / "kinds.csv", None, CLASSES)


def test_columns_need_a_list(images: Path) -> None:
    with pytest.raises(UserError, match=r"there is no data\.list"):
        set_up(images, taxonomy=["kind"])
