"""From a folder or a list to an index of images: the class and the split of each."""

import os
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bcnn.data import split_folders as folders
from bcnn.data.image_files import files_below, is_image, listed, suffix_counts, suffix_of
from bcnn.data.lists import read_rows
from bcnn.utils.errors import UserError

Samples = list[tuple[str, int]]  # (path, label) pairs

METADATA = "metadata.csv"  # Hugging Face's list of file_name,label beside the images


@dataclass
class ImageIndex:
    """Images by class and split."""

    classes: list[str]  # by label; a class may have no images
    train: Samples = field(default_factory=list)  # all images, if no split is given
    val: Samples = field(default_factory=list)
    test: Samples = field(default_factory=list)
    divided: bool = True  # whether a folder or a list gives the splits
    remarks: list[str] = field(default_factory=list)  # warnings about what was left out or is unclear
    groups: dict[str, str] = field(default_factory=dict)  # by path, of a list with that column
    parents: dict[str, list[str]] = field(default_factory=dict)  # folders above a class, from the root

    @classmethod
    def of(
        cls, entries: Sequence[tuple[str, str, str]], classes: Iterable[str] = (), divided: bool = True
    ) -> "ImageIndex":
        """Return the index of (path, class, split) entries; `classes` may add some without images."""
        index = cls(sorted({name for _, name, _ in entries}.union(classes)), divided=divided)
        labels = {name: label for label, name in enumerate(index.classes)}
        for path, name, split in entries:
            index.splits[split].append((path, labels[name]))
        return index

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
        """Return the index without these images; their classes stay."""
        train, val, test = ([s for s in part if s[0] not in paths] for part in self.splits.values())
        return replace(self, train=train, val=val, test=test)

    def counts(self, split: str) -> list[int]:
        """Return the number of images of each class in a split."""
        counts = Counter(label for _, label in self.splits[split])
        return [counts[label] for label in range(len(self.classes))]


def read_folder(root: Path, nested: bool = False) -> ImageIndex:
    """Read `root/{train,val,test}/<class>/*`, by any of their usual names, or `root/<class>/*`.

    Images without class folders are labelled by a `metadata.csv` beside them. `nested` class folders
    are in those of their parents: `<parent>/<class>/*`.
    """
    if index := _read_metadata(root):
        return index
    parts = folders.split_folders(root)
    entries, inside, others = [], {}, Counter[str]()
    parents: dict[str, list[str]] = {}
    places: dict[str, Path] = {}
    for split, part in (parts or {"train": root}).items():
        for folder in folders.class_folders(part, nested):
            *above, name = map(folders.class_name, folder.relative_to(part).parts)
            first = places.setdefault(name, folder)
            if parents.setdefault(name, above) != above:
                raise UserError(f"{first} and {folder} are one class, {name}: move or rename one")
            files = [p for p in files_below(folder) if not nested or os.path.dirname(p) == str(folder)]
            images = [path for path in files if is_image(path)]
            entries += [(path, name, split) for path in images]
            inside[name] = {os.path.dirname(path)[len(str(folder)) + 1 :] for path in images} - {""}
            others.update(suffix_of(path) for path in files if not is_image(path))
    if not parts:
        folders.validate_class_folders(root, inside)
    index = replace(ImageIndex.of(entries, inside, divided=bool(parts)), parents=parents)
    if others:
        index.remarks.append(f"{others.total()} files left out, no images: {suffix_counts(others)}")
    if beside := folders.count_images(root):
        index.remarks.append(f"{beside} images in {root} left out, as no class folder holds them")
    if parts and (test := folders.unlabelled_test(root)):
        index.remarks.append(
            f"{test} is left out, as its images have no class folders: bcnn predict CKPT {test}"
        )
    return index


def read_list(file: Path) -> ImageIndex:
    """Read lines of `path,label[,split][,group]`: see `read_rows`. Paths may begin at the list."""
    columns, rows = read_rows(file)
    entries: dict[str, tuple[str, str, str]] = {}
    groups: dict[str, str] = {}
    for line, row in rows:
        path, label = str(file.parent / row["path"]), row.get("label", "")
        found = folders.split_of(row.get("split", "train"))
        if not label:
            mistake = "no label: expected path,label or path,label,split"
        elif len(label.splitlines()) > 1:
            mistake = "a label of several lines: is there a stray quote?"
        elif found is None or found[1]:
            mistake = f"split {row['split']!r:.99} is not train, val or test"
        elif path in entries:
            mistake = f"{row['path']:.999} is in the list already"
        elif not os.path.isfile(path):
            mistake = f"there is no file {path:.999}"
        elif "group" in columns and not row["group"]:
            mistake = "no group: name one, or remove the column"
        else:
            entries[path] = path, folders.class_name(label), found[0]
            groups |= {path: row["group"]} if "group" in columns else {}
            continue
        raise UserError(f"{file}, line {line}: {mistake}")
    return replace(ImageIndex.of([*entries.values()], divided="split" in columns), groups=groups)


def choose_classes(index: ImageIndex, chosen: Sequence[str] | int, seed: int) -> ImageIndex:
    """Return the images of the `chosen` classes, or of that many drawn by `seed`, in the same order."""
    if isinstance(chosen, int):
        if not 2 <= chosen <= len(index.classes):
            raise UserError(f"data.classes={chosen}: choose from 2 to {len(index.classes)} classes")
        order = torch.randperm(len(index.classes), generator=torch.Generator().manual_seed(seed))
        names = {index.classes[i] for i in order[:chosen].tolist()}
    else:
        names = {folders.class_name(str(name)) for name in chosen}
    if unknown := names - set(index.classes):
        raise UserError(f"data.classes: no class {listed(unknown)}; there are {listed(index.classes)}")
    entries = [entry for entry in _entries(index) if entry[1] in names]
    found = ImageIndex.of(entries, names, index.divided)
    return replace(found, remarks=index.remarks, groups=index.groups, parents=index.parents)


def mistakes(index: ImageIndex, source: Path) -> list[str]:
    """Return the reasons why these images cannot be trained on, a sentence each."""
    if not index.samples and source.is_dir() and folders.holds_images(source):
        return [f"{source}: put its images into a folder for each class, or name them in data.list"]
    if not index.samples:
        expected = f"<class>/<images>, {{train,val,test}}/<class>/<images>, {METADATA} or data.list"
        return [f"no images in {source}: expected {expected}"]
    if not index.train:
        return [f"{source} has images of val or test only: add images to train on"]
    train, val, test = (index.counts(split) for split in index.splits)
    found = []
    if alike := folders.confusable_names(index.classes):
        found.append(
            f"{source}: names of classes look the same: {listed(alike, 3)}; rename one of each"
        )
    counted = zip(index.classes, train, val, test, strict=True)
    if empty := [name for name, *n in counted if not any(n)]:
        found.append(f"{source}: no images of the class {listed(empty)}; add some, or remove the class")
    for split, counts in (("val", val), ("test", test)):
        unknown = [index.classes[label] for label, n in enumerate(counts) if n and not train[label]]
        if unknown:
            found.append(
                f"{source}: {split} holds classes that train lacks: {listed(unknown)}; add training "
                f"images of them, or take them out of {split}"
            )
    if len(index.classes) == 1:
        found.append(f"{source} holds one class only ({index.classes[0]}): at least two are needed")
    return found


def _entries(index: ImageIndex) -> list[tuple[str, str, str]]:
    return [
        (path, index.classes[label], split)
        for split, samples in index.splits.items()
        for path, label in samples
    ]


def _read_metadata(root: Path) -> ImageIndex | None:
    """Read Hugging Face's lists of images beside them: one of all, or one of each split."""
    named = ((folders.split_of(folder.name), folder) for folder in folders.subfolders(root))
    parts = {found[0]: folder for found, folder in named if found and not found[1]}
    lists = {
        split: folder / METADATA
        for split, folder in {"": root, **parts}.items()
        if (folder / METADATA).is_file()
        and folders.holds_images(folder)
        and {"path", "label"} <= {*read_rows(folder / METADATA)[0]}
    }
    if not lists or "" in lists:
        return read_list(lists[""]) if lists else None
    if others := parts.keys() - lists:
        raise UserError(f"{parts[min(others)]} has no {METADATA} beside its images: add it")
    found = {split: read_list(file) for split, file in lists.items()}
    entries = [(path, name, split) for split in found for path, name, _ in _entries(found[split])]
    groups = {path: name for index in found.values() for path, name in index.groups.items()}
    return replace(ImageIndex.of(entries), groups=groups)
