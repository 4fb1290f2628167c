"""Which folders are splits, and which are classes, by their names and what is in them."""

import re
import unicodedata
from collections import Counter
from pathlib import Path

from bcnn.data.image_files import images_below, is_ignored, is_image, listed
from bcnn.utils.errors import UserError

# Names of splits, as folders or in lists.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout", "heldout"), "test"),
}
FILLERS = {"set", "data", "images", "photos", "split"}  # words without meaning beside a split's name
OUTPUTS = ("outputs", "multirun")  # folders that a run in a folder of images makes


def possible_splits(root: Path) -> list[str]:
    """Return a warning if all class folders hold the same folders: splits of unknown names do."""
    inside = [_names(folder) for folder in subfolders(root) if not holds_images(folder)]
    if len(inside) < 2 or len(inside[0]) < 2 or any(names != inside[0] for names in inside):
        return []
    folders = listed([f"{folder.name}/" for folder in subfolders(root)], 3)
    return [
        f"{folders} hold folders of the same names ({listed(sorted(inside[0]), 3)}) and were taken for "
        "classes: splits are called train, val and test"
    ]


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split; none where `root` holds class folders."""
    # A folder with images in it is a class, whatever its name.
    folders = [folder for folder in subfolders(root) if not holds_images(folder)]
    named = [(folder, *found) for folder in folders if (found := split_of(folder.name))]
    # test_tube is a class, but seg_train and seg_test are splits.
    affixes = Counter(affix for affix, _ in {(affix, split) for _, split, affix in named})
    parts: dict[str, Path] = {}
    for folder, split, affix in named:
        if affix and affixes[affix] < 2:
            raise UserError(
                f"{folder} may be a split: call it {split}/, or put its images directly into it if "
                "it is a class"
            )
        if split in parts:
            raise UserError(f"{root} holds {parts[split].name}/ and {folder.name}/: keep one of them")
        parts[split] = folder
    beside = _names(root)
    for folder in subfolders(root):
        if parts and folder not in parts.values() and any(images_below(folder)):
            raise UserError(
                f"{folder} holds images beside {listed(f'{p.name}/' for p in parts.values())}: call it "
                "train, val or test, move it into train/ if it is a class, or move it away"
            )
        if not parts and folder in folders and _names(folder) & beside:
            raise UserError(
                f"{folder} holds folders of the same names as those beside it: call it train, val or "
                f"test and move the class folders into {root}/train, or move it away"
            )
    return {split: _class_folders(folder, split) for split, folder in parts.items()}


def split_of(name: str) -> tuple[str, str] | None:
    """Return the split that a name means, and the rest of the name ("seg" of seg_train)."""
    words = [word.removesuffix("set") for word in re.findall(r"[^\W\d_]+|\d+", name.casefold())]
    if "".join(words) in SPLITS:  # hold_out
        return SPLITS["".join(words)], ""
    splits = [word for word in words if word in SPLITS]
    if len(splits) != 1:
        return None
    affix = (word for word in words if word and word not in {*splits, *FILLERS})
    return SPLITS[splits[0]], " ".join(affix)


def _class_folders(folder: Path, split: str) -> Path:
    """Return the folder of a split's classes: archives often hold seg_train/seg_train/<class>."""
    inside = subfolders(folder)
    if len(inside) != 1 or holds_images(inside[0]):
        return folder
    found = split_of(inside[0].name)
    return inside[0] if found and found[0] == split else folder


def holds_images(folder: Path) -> bool:
    return any(is_image(file.name) for file in folder.iterdir())


def _names(folder: Path) -> set[str]:
    return {class_name(inside.name) for inside in subfolders(folder)}


def class_name(text: str) -> str:
    """Return a class's name in one spelling: macOS writes an é as two code points, others as one."""
    return unicodedata.normalize("NFC", text)


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder that are not ignored and not made by a run."""
    found = (p for p in folder.iterdir() if p.is_dir() and not is_ignored(p.name))
    return sorted(p for p in found if p.name not in OUTPUTS or holds_images(p))
