"""From a folder or a list to labelled paths: which image is of which class and in which split."""

import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from bcnn.data.formats import files_below, images_below, is_ignored, is_image
from bcnn.utils.cells import name_of
from bcnn.utils.errors import UserError

Samples = list[tuple[str, int]]  # (path, label) pairs

# What people call a split, as a folder or in a list.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout", "heldout"), "test"),
}
BESIDE = {"set", "data", "images", "photos", "split"}  # words that say nothing beside a split's

OWN = ("outputs", "multirun")  # where a run in a folder of photographs puts its files

METADATA = "metadata.csv"  # of file_name,label

WAYS_IN = "<class>/<images>, {train,val,test}/<class>/<images>, or a list (data.list)"


@dataclass
class ImageIndex:
    """Images by class and split.

    Args:
        classes: the names that labels count in, of classes without images too.
        train: images to train on; all of them where nothing says which split they are in.
        val: images to validate on.
        test: images to test on.
        divided: whether a folder or a list said which images are in which split.
        remarks: what was left out or could be meant otherwise, a sentence each.
    """

    classes: list[str]
    train: Samples = field(default_factory=list)
    val: Samples = field(default_factory=list)
    test: Samples = field(default_factory=list)
    divided: bool = True
    remarks: list[str] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, Samples]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def samples(self) -> Samples:
        return [*self.train, *self.val, *self.test]

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.samples]

    def without(self, paths: Container[str]) -> "ImageIndex":
        """The same without these images; their classes stay."""
        train, val, test = (
            [(path, label) for path, label in samples if path not in paths]
            for samples in self.splits.values()
        )
        return replace(self, train=train, val=val, test=test)

    def counts(self, split: str) -> list[int]:
        """Images of each class in a split."""
        counts = [0] * len(self.classes)
        for _, label in self.splits[split]:
            counts[label] += 1
        return counts


def read_folder(root: Path) -> ImageIndex:
    """`root/{train,val,test}/<class>/*`, by any name of `SPLITS`, or `root/<class>/*`.

    Images without class folders are labelled by a `metadata.csv` beside them.

    Raises:
        UserError: there is no such folder, two folders for one split, or a folder that looks like a
            split, or stands beside splits, and is none that is known.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root} (data.root)")
    if lists := _metadata(root):
        return _read_lists(lists)
    parts = _split_folders(root)
    folders = [
        (split, _name(folder.name), folder)
        for split, part in (parts or {"train": root}).items()
        for folder in subfolders(part)
    ]
    layout = ImageIndex(sorted({name for _, name, _ in folders}), divided=bool(parts))
    labels = {name: label for label, name in enumerate(layout.classes)}
    left_out: Counter[str] = Counter()
    for split, name, folder in folders:
        samples, label = layout.splits[split], labels[name]
        for path, reason in files_below(folder, root):
            if reason:
                left_out[reason] += 1
            else:
                samples.append((path, label))
    if left_out:
        reasons = listed(f"{count} {reason}" for reason, count in left_out.most_common())
        layout.remarks.append(
            f"{left_out.total()} files left out, no images or counted already: {reasons}"
        )
    if not parts:
        layout.remarks += _alike(root)
    return layout


def _metadata(root: Path) -> dict[str, Path]:
    """Hugging Face's lists of a folder's images, which are beside them: one, or one of each split."""
    named = ((_split_of(folder.name), folder) for folder in subfolders(root))
    parts = {found[0]: folder for found, folder in named if found and not found[1]}
    places = {split: folder / METADATA for split, folder in {"": root, **parts}.items()}
    lists = {
        split: file
        for split, file in places.items()
        if file.is_file() and _holds_images(file.parent) and _labels(_rows(file)[0][1])
    }
    if lists and "" not in lists and (others := parts.keys() - lists):
        raise UserError(
            f"{parts[min(others)]} has no {METADATA} of file_name,label and images beside it, as "
            f"{listed(map(str, lists.values()))}: add it, or move the folder away"
        )
    return lists


def _read_lists(lists: Mapping[str, Path]) -> ImageIndex:
    """A list of all, called "", or a list of each split."""
    if "" in lists:
        return read_list(lists[""])
    read = {split: read_list(file) for split, file in lists.items()}
    layout = ImageIndex(sorted({name for part in read.values() for name in part.classes}))
    for split, part in read.items():
        names = [part.classes[label] for _, label in part.samples]
        layout.splits[split] += [
            (path, layout.classes.index(name))
            for (path, _), name in zip(part.samples, names, strict=True)
        ]
    return layout


def _alike(root: Path) -> list[str]:
    """Says so where all class folders hold the same folders: unknown splits look like that."""
    inside = [_names(folder) for folder in subfolders(root) if not _holds_images(folder)]
    if len(inside) < 2 or len(inside[0]) < 2 or any(names != inside[0] for names in inside):
        return []
    folders = listed((f"{folder.name}/" for folder in subfolders(root)), 3)
    return [
        f"{folders} hold folders of the same names ({listed(sorted(inside[0]), 3)}) and were taken for "
        "classes: splits are called train, val and test"
    ]


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits; none where `root` holds class folders."""
    # with images in it, a folder is a class, whatever its name
    folders = [folder for folder in subfolders(root) if not _holds_images(folder)]
    named = [(folder, *found) for folder in folders if (found := _split_of(folder.name))]
    # test_tube is a class, but seg_train and seg_test are splits
    affixes = Counter(affix for affix, _ in {(affix, split) for _, split, affix in named})
    parts: dict[str, Path] = {}
    for folder, split, affix in named:
        if affix and affixes[affix] < 2:
            raise UserError(
                f"{folder} looks like a split and is none that is known: call it {split}/, or, if it "
                "is a class, put its images into it without folders between"
            )
        if split in parts:
            raise UserError(f"{root} holds {parts[split].name}/ and {folder.name}/: keep one of them")
        parts[split] = folder
    beside = _names(root)
    for folder in subfolders(root):
        if folder in parts.values():
            continue
        if parts and any(images_below(folder)):
            raise UserError(
                f"{folder} holds images beside {listed(f'{p.name}/' for p in parts.values())}: call it "
                "train, val or test if it is one, move it into train/ if it is a class, or move it away"
            )
        if not parts and folder in folders and _names(folder) & beside:
            raise UserError(
                f"{folder} holds folders of the same names as those beside it, like a split: call it "
                f"train, val or test, and move the class folders into {root}/train, or move it away"
            )
    return {split: _inner(folder, split) for split, folder in parts.items()}


@lru_cache  # a list may have a million lines
def _split_of(name: str) -> tuple[str, str] | None:
    """The split that a folder's name speaks of, and what else is in the name ("seg" of seg_train)."""
    words = [word.removesuffix("set") for word in re.findall(r"[^\W\d_]+|\d+", name.casefold())]
    if "".join(words) in SPLITS:  # hold_out
        return SPLITS["".join(words)], ""
    splits = [word for word in words if word in SPLITS]
    if len(splits) != 1:
        return None
    affix = (word for word in words if word and word not in {*splits, *BESIDE})
    return SPLITS[splits[0]], " ".join(affix)


def _inner(folder: Path, split: str) -> Path:
    """Where the class folders are: archives often hold seg_train/seg_train/<class>."""
    inside = subfolders(folder)
    if len(inside) == 1 and not _holds_images(inside[0]):
        found = _split_of(inside[0].name)
        if found and found[0] == split:
            return inside[0]
    return folder


def _holds_images(folder: Path) -> bool:
    return any(is_image(file.name) for file in folder.iterdir())


def _names(folder: Path) -> set[str]:
    return {_name(inside.name) for inside in subfolders(folder)}


def read_list(file: Path) -> ImageIndex:
    """Lines of `path,label[,split]`, with or without a line that names the columns.

    The columns are apart by tabs, commas, semicolons or blanks: by the first of these that divides the
    first line. Paths are absolute, or relative to the list's folder.

    Raises:
        UserError: the list or an image of it cannot be found, or a line is not understood.
    """
    rows = _rows(file)
    header = _labels(rows[0][1])
    if header:
        rows = rows[1:]
    else:
        header = ["path", "label", "split"][: len(rows[0][1])]
    if len(header) < 2:
        raise UserError(f"{file}, line {rows[0][0]}: expected path,label or path,label,split")
    folder = file.parent
    entries: dict[str, tuple[str, str, int]] = {}
    for number, cells in rows:
        if len(cells) != len(header):
            raise UserError(
                f"{file}, line {number}: {len(cells)} columns where {len(header)} are expected "
                f"({','.join(header)}); put a path with blanks or commas in it in double quotes"
            )
        row = dict(zip(header, cells, strict=True))
        path = str(folder / row["path"])
        found = _split_of(row.get("split", "train"))
        if not row["label"]:
            raise UserError(f"{file}, line {number}: no label")
        if len(row["label"].splitlines()) > 1:
            raise UserError(f"{file}, line {number}: a label of several lines: is there a stray quote?")
        if found is None or found[1]:
            raise UserError(
                f"{file}, line {number}: split {row['split']!r:.99} is not train, val or test"
            )
        if path in entries:
            raise UserError(f"{file}, line {number}: {row['path']:.999} is in the list already")
        entries[path] = (_name(row["label"]), found[0], number)
    missing = [path for path in entries if not os.path.isfile(path)]
    if missing:
        hint = "(a line that names the columns would read path,label or path,label,split)"
        if "\\" in missing[0] and os.sep != "\\":
            hint = "(Windows parts folders by \\: write / in its place)"
        raise UserError(
            f"{file} names {len(missing)} files that do not exist, the first of them in line "
            f"{entries[missing[0]][2]}: {missing[0]:.999} {hint}"
        )
    layout = ImageIndex(sorted({name for name, *_ in entries.values()}), divided="split" in header)
    labels = {name: label for label, name in enumerate(layout.classes)}
    for path, (name, split, _) in entries.items():
        layout.splits[split].append((path, labels[name]))
    return layout


def _labels(cells: list[str]) -> list[str]:
    """The names of a list's columns, if that is what its first line has; else none."""
    header = ["path" if cell.lower() == "file_name" else cell.lower() for cell in cells]
    return header if {"path", "label"} <= set(header) else []


def no_images(layout: ImageIndex, source: Path) -> list[str]:
    """Says so where there are none."""
    if layout.samples:
        return []
    if (source / METADATA).is_file() and not _metadata(source):
        return [f"{source / METADATA} names no columns file_name,label: a label is what is trained on"]
    return [f"no images in {source}: expected {WAYS_IN}"]


def mistakes(layout: ImageIndex, source: Path) -> list[str]:
    """What keeps these images from being trained on, a sentence each."""
    if not layout.samples:
        return no_images(layout, source)
    if not layout.train:
        there = " and ".join(split for split, samples in layout.splits.items() if samples)
        way_out = "lines of it" if source.is_file() else f"{source}/train/<class>/*"
        return [f"{source} has images of {there} alone, and none to train on: add {way_out}"]
    train, val, test = (layout.counts(split) for split in layout.splits)
    found = []
    empty = [label for label, count in enumerate(train) if not count and not val[label] + test[label]]
    if empty:
        names = listed(layout.classes[label] for label in empty)
        found.append(f"{source}: no images of the class {names}; add some, or remove the class")
    for split, counts in (("val", val), ("test", test)):
        unknown = [layout.classes[label] for label, n in enumerate(counts) if n and not train[label]]
        if unknown:
            found.append(
                f"{source}: {split} holds classes that train lacks: {listed(unknown)}; add training "
                f"images of them, or take them out of {split}"
            )
    if len(layout.classes) == 1:
        found.append(
            f"{source} holds one class only ({layout.classes[0]}): a classifier needs at least two"
        )
    return found


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names with commas between; no more than `most`, and how many are left."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    """(number of its first line, cells) of each row that is not blank."""
    if not file.exists():
        raise UserError(f"no such list: {file} (data.list)")
    if not file.is_file():
        raise UserError(f"the list {file} is not a regular file: save it as UTF-8 text")
    try:
        content = file.read_bytes()
        text = content.decode("utf-8-sig")  # with the mark that spreadsheets put first, or not
    except OSError as error:
        raise UserError(f"cannot read the list {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: no UTF-8 text: save it as such") from error
    rows, start = [], 1
    try:
        mark = next((mark for mark in "\t,;" if len(_first_row(text, mark)) > 1), " ")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True)
        for cells in reader:
            if any(cells := [name_of(cell.strip()) for cell in cells]):
                rows.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}, line {start}: {error}: is there a stray quote?") from error
    if not rows:
        raise UserError(f"the list {file} is empty: expected lines of path,label or path,label,split")
    return rows


def _first_row(text: str, mark: str) -> list[str]:
    return next(filter(any, csv.reader(io.StringIO(text, newline=""), delimiter=mark)), [])


def _name(text: str) -> str:
    """A class's name in one spelling: macOS writes an é as two code points (NFD), others as one."""
    return unicodedata.normalize("NFC", text)


def subfolders(folder: Path) -> Sequence[Path]:
    found = (p for p in folder.iterdir() if p.is_dir() and not is_ignored(p.name))
    return sorted(p for p in found if p.name not in OWN or _holds_images(p))
