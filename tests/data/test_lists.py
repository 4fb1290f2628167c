"""Lists of images: CSV and text as people and spreadsheets write them, and Hugging Face's."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write, write_images

from bcnn.data.image_files import find_images
from bcnn.data.index import read_folder, read_list
from bcnn.utils.errors import UserError

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
    other_order = kind == "columns in another order"
    lines, expected = [], []
    for number in range(12):
        name, split = ("cat", "dog")[number % 2], ("train", "train", "Validation", "test")[number // 3]
        path = tmp_path / "some photos" / f"{number}, ü.png"
        write(path)
        quoted = f'"{path.relative_to(tmp_path) if number else path}"'  # the first one absolute
        lines.append(f"{name};none;{quoted}" if other_order else mark.join((quoted, name, split)))
        expected.append((str(path), number % 2))
    text = LISTS[kind].replace("{}", "\n".join(lines) + "\n\n")
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8", newline="")
    index = read_list(tmp_path / "labels.csv")
    assert (index.classes, index.samples) == (["cat", "dog"], expected)
    assert index.divided != other_order  # which has no split
    counts = [len(samples) for samples in index.splits.values()]
    assert counts == ([12, 0, 0] if other_order else [6, 3, 3])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("a.png", "line 1: no label: expected path,label"),
        ("a.png,cat\nb.png,dog,train", "line 2: 3 columns where 2"),
        ("a.png,cat,train\nb.png,dog,spare", "line 2: split 'spare'"),
        ("a.png,cat\na.png,dog", "line 2: a.png is in the list already"),
        ("a.png,cat\nb.png,", "line 2: no label"),
        (
            "path,Label,label\na.png,cat,x\nb.png,dog,y",
            r"two columns are read as label \(path, Label, label",
        ),
        ("path,file_name,label\na.png,b.png,cat", "two columns are read as path"),
        ("file,class\na.png,cat\nb.png,dog", "line 1: there is no file .*file"),
        ("a.png,cat\nc.png,dog", "line 2: there is no file .*c.png"),
        ('a.png,cat\n"b.png,dog\n' + "c.png,dog\n" * 20_000, "line 2: field larger than field limit"),
        ('a.png,"cat\nb.png,dog\n', "line 1: a label of several lines: is there a stray quote"),
        ('\n"a.png,cat\nb.png,dog\n', "line 2: no label"),
        ("a.png,cat\nb.png\0,dog", r"line 2: there is no file .*b.png\\x00"),
    ],
)
def test_a_mistake_in_a_list_is_told_by_its_line(text: str, sentence: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write(tmp_path / name)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=rf"labels\.csv.*{sentence}"):
        read_list(tmp_path / "labels.csv")


def test_a_list_may_be_parquet(tmp_path: Path) -> None:
    paths = [tmp_path / "deep" / f"{name}.png" for name in "abc"]
    for path in paths:
        write(path)
    cells = {"date": [1, 2, None], "file_name": ["deep/a.png", "deep/b.png", str(paths[2])]}
    file = tmp_path / "list.parquet"
    pq.write_table(pa.table(cells | {"label": ["red", "blue", "red"]}), file)
    assert read_list(file).samples == [(str(paths[0]), 1), (str(paths[1]), 0), (str(paths[2]), 1)]
    assert find_images([str(file)]) == [*map(str, paths)]
    (tmp_path / "list.csv").write_text("path\ndeep/a.png\n")
    assert find_images([str(tmp_path / "list.csv")]) == [str(paths[0])]
    pq.write_table(pa.table({"image": ["a.png"]}), file)
    with pytest.raises(UserError, match=r"list\.parquet has no column path, but image"):
        read_list(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"list\.parquet is no readable Parquet file: "):
        read_list(file)


def describe(folder: Path, **labels: str) -> None:
    """Images in a folder, and Hugging Face's list of them."""
    for name in labels:
        write(folder / f"{name}.png")
    lines = [f'"an image",{name}.png,{label}' for name, label in labels.items()]
    (folder / "metadata.csv").write_text("\n".join(["text,file_name,label", *lines]))


def test_images_labelled_by_a_metadata_file(tmp_path: Path) -> None:
    describe(tmp_path, a="red", b="blue")
    index = read_folder(tmp_path)
    assert (index.classes, index.divided) == (["blue", "red"], False)
    assert index.samples == [(str(tmp_path / "a.png"), 1), (str(tmp_path / "b.png"), 0)]


def test_a_metadata_file_of_each_split(tmp_path: Path) -> None:
    describe(tmp_path / "train", a="red", b="blue", c="green")
    describe(tmp_path / "validation", d="red")
    index = read_folder(tmp_path)
    assert index.classes == ["blue", "green", "red"] and index.divided
    assert [len(samples) for samples in index.splits.values()] == [3, 1, 0]
    assert index.val == [(str(tmp_path / "validation" / "d.png"), 2)]
    write_images(tmp_path / "test", 1)
    with pytest.raises(UserError, match=r"test has no metadata\.csv"):
        read_folder(tmp_path)
