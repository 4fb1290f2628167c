"""From a folder or a list to labelled paths: which image is of which class and in which split."""

import csv
import os
import unicodedata
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bcnn.data.formats import images_below, is_ignored, is_image
from bcnn.errors import UserError

Samples = list[tuple[str, int]]  # (path, label) pairs

# Names of a split's folder, and of a split in a list.
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

WAYS_IN = "<class>/<images>, {train,val,test}/<class>/<images>, or a list (data.list)"


@dataclass
class Layout:
    """Images by class and split.

    Args:
        classes: the names that labels count in, of classes without images too.
        train: images to train on; all of them where nothing says which split they are in.
        val: images to validate on.
        test: images to test on.
        divided: whether a folder or a list said which images are in which split.
    """

    classes: list[str]
    train: Samples = field(default_factory=list)
    val: Samples = field(default_factory=list)
    test: Samples = field(default_factory=list)
    divided: bool = True

    @property
    def splits(self) -> dict[str, Samples]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def samples(self) -> Samples:
        return [*self.train, *self.val, *self.test]

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.samples]

    def without(self, paths: Container[str]) -> "Layout":
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


def read_folder(root: Path) -> Layout:
    """`root/{train,val,test}/<class>/*` (valid and validation are val too), or `root/<class>/*`.

    Raises:
        UserError: there is no such folder, `val/` or `test/` but no `train/`, or two for one split.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root} (data.root)")
    parts: dict[str, Path] = {}
    for folder in _subfolders(root):
        split = SPLITS.get(folder.name.lower())
        if split is None or any(is_image(file.name) for file in folder.iterdir()):
            continue  # with images in it, a folder is a class, whatever its name
        if split in parts:
            raise UserError(f"{root} holds {parts[split].name}/ and {folder.name}/: keep one of them")
        parts[split] = folder
    if parts and "train" not in parts:
        raise UserError(
            f"{root} has no folder train/ of class folders beside "
            f"{' and '.join(f'{part.name}/' for part in parts.values())}: add {root}/train/<class>/*"
        )
    folders = [
        (split, _name(folder.name), folder)
        for split, part in (parts or {"train": root}).items()
        for folder in _subfolders(part)
    ]
    layout = Layout(sorted({name for _, name, _ in folders}), divided=bool(parts))
    labels = {name: label for label, name in enumerate(layout.classes)}
    for split, name, folder in folders:
        layout.splits[split].extend((path, labels[name]) for path in images_below(folder))
    return layout


def read_list(file: Path) -> Layout:
    """Lines of `path,label[,split]`, with or without a line that names the columns.

    The columns are apart by tabs, commas, semicolons or blanks: by the first of these that divides the
    first line. Paths are absolute, or relative to the list's folder.

    Raises:
        UserError: the list or an image of it cannot be found, or a line is not understood.
    """
    rows = _rows(file)
    header = [cell.lower() for cell in rows[0][1]]
    if {"path", "label"} <= set(header):
        rows = rows[1:]
    else:
        header = ["path", "label", "split"][: len(header)]
    if len(header) < 2:
        raise UserError(f"{file}, line {rows[0][0]}: expected path,label or path,label,split")
    entries: dict[str, tuple[str, str]] = {}
    for number, cells in rows:
        if len(cells) != len(header):
            raise UserError(
                f"{file}, line {number}: {len(cells)} columns where {len(header)} are expected "
                f"({','.join(header)}); put a path with blanks or commas in it in double quotes"
            )
        row = dict(zip(header, cells, strict=True))
        path = str(file.parent / row["path"])
        split = SPLITS.get(row.get("split", "train").lower())
        if not row["label"]:
            raise UserError(f"{file}, line {number}: no label")
        if split is None:
            raise UserError(f"{file}, line {number}: split {row['split']!r} is not train, val or test")
        if path in entries:
            raise UserError(f"{file}, line {number}: {row['path']} is in the list already")
        entries[path] = (_name(row["label"]), split)
    missing = [path for path in entries if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"{file} names {len(missing)} files that do not exist, the first of them {missing[0]} "
            "(a line that names the columns would read path,label or path,label,split)"
        )
    layout = Layout(sorted({name for name, _ in entries.values()}), divided="split" in header)
    labels = {name: label for label, name in enumerate(layout.classes)}
    for path, (name, split) in entries.items():
        layout.splits[split].append((path, labels[name]))
    return layout


def mistakes(layout: Layout, source: Path) -> list[str]:
    """What keeps these images from being trained on, a sentence each."""
    if not any(layout.splits.values()):
        return [f"no images in {source}: expected {WAYS_IN}"]
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
    """(line number, cells) of each line that is not blank."""
    try:
        text = file.read_text(encoding="utf-8-sig")  # with the mark that spreadsheets put first, or not
    except FileNotFoundError as error:
        raise UserError(f"no such list: {file} (data.list)") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {file} ({error}): save it as UTF-8 text") from error
    lines = text.split("\n")
    first = next((line for line in lines if line.strip()), "")
    mark = next((mark for mark in "\t,;" if len(_cells(first, mark)) > 1), " ")
    reader = csv.reader(lines, delimiter=mark, skipinitialspace=True)
    rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    rows = [(number, cells) for number, cells in rows if any(cells)]
    if not rows:
        raise UserError(f"the list {file} is empty: expected lines of path,label or path,label,split")
    return rows


def _cells(line: str, mark: str) -> list[str]:
    return next(csv.reader([line], delimiter=mark), [])


def _name(text: str) -> str:
    """A class's name in one spelling: macOS writes an é as two code points (NFD), others as one."""
    return unicodedata.normalize("NFC", text)


def _subfolders(folder: Path) -> Sequence[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not is_ignored(p.name))
