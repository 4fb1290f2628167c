"""Which folders are splits, and which are classes, by their names and what is in them."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from bcnn.data.image_files import images_below, is_ignored, is_image, listed
from bcnn.utils.errors import UserError

# Names of splits, as folders or in lists.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout", "heldout"), "test"),
}
FILLERS = {"set", "data", "images", "photos", "split"}  # words without meaning beside a split's name
OUTPUTS = ("outputs", "multirun")  # folders that a run in a folder of images makes


def validate_class_folders(root: Path, inside: Mapping[str, set[str]]) -> None:
    """Raise UserError if two folders that were taken for classes hold the same folders, as splits do.

    `inside` has the folders with images below each. Classes often share one name, as photos/.
    """
    holders: dict[str, list[str]] = defaultdict(list)
    for folder, names in inside.items():
        looks = {_look(name): name for name in names}
        shared = Counter(other for look in looks for other in holders[look])
        if alike := [other for other, count in shared.items() if count > 1]:
            same = sorted(name for look, name in looks.items() if alike[0] in holders[look])
            raise UserError(
                f"{root}: {alike[0]}/ and {folder}/ hold the same folders ({listed(same, 3)}): "
                f"call splits train/, val/ and test/, or move classes into {root}/train"
            )
        for look in looks if len(looks) > 1 else ():
            holders[look].append(folder)


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
        others = parts and folder not in (*parts.values(), unlabelled_test(root))
        if others and any(images_below(folder)):
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


def class_folders(part: Path, nested: bool) -> list[Path]:
    """Return the folders in a split or root; of nested ones those that hold images or no folders."""
    found = []
    for folder in subfolders(part):
        below = class_folders(folder, nested) if nested else []
        found += [*below, *([folder] if not below or holds_images(folder) else [])]
    return found


def unlabelled_test(root: Path) -> Path | None:
    """Return the folder of test images without classes, as Kaggle has beside train/; None without."""
    tests = (folder for folder in subfolders(root) if split_of(folder.name) == ("test", ""))
    return next((each for each in tests if holds_images(each) and not subfolders(each)), None)


def split_of(name: str) -> tuple[str, str] | None:
    """Return the split that a name means, and the rest of the name ("seg" of seg_train)."""
    words = [word.removesuffix("set") for word in re.findall(r"[^\W\d_]+|\d+", name.casefold())]
    if "".join(words) in SPLIT_NAMES:  # hold_out
        return SPLIT_NAMES["".join(words)], ""
    splits = [word for word in words if word in SPLIT_NAMES]
    if len(splits) != 1:
        return None
    affix = (word for word in words if word and word not in {*splits, *FILLERS})
    return SPLIT_NAMES[splits[0]], " ".join(affix)


def _class_folders(folder: Path, split: str) -> Path:
    """Return the folder of a split's classes: archives often hold seg_train/seg_train/<class>."""
    inside = subfolders(folder)
    if len(inside) != 1 or holds_images(inside[0]):
        return folder
    found = split_of(inside[0].name)
    return inside[0] if found and found[0] == split else folder


def holds_images(folder: Path) -> bool:
    return any(is_image(file.name) for file in folder.iterdir())


def count_images(folder: Path) -> int:
    """Return the number of images in a folder, without those of the folders in it."""
    return sum(is_image(file.name) for file in folder.iterdir())


def _names(folder: Path) -> set[str]:
    return {class_name(inside.name) for inside in subfolders(folder)}


def class_name(text: str) -> str:
    """Return a class's name in one spelling: macOS writes an é as two code points, others as one."""
    return unicodedata.normalize("NFC", text)


def confusable_names(names: Iterable[str]) -> list[str]:
    """Return the names that look the same as another on a screen: `'iris' = 'iris\\u200b'`."""
    alike = defaultdict(list)
    for name in names:
        alike[_look(name)].append(name)
    return [" = ".join(map(repr, group)) for group in alike.values() if len(group) > 1]


def _look(name: str) -> str:
    """Return what is seen of a name, without regard to case, width and blanks."""
    visible = (c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    text = " ".join("".join(visible).split())
    return text if len(text) == 1 else text.lower()  # a and A are classes of handwriting


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder that are not ignored and not made by a run."""
    found = (p for p in folder.iterdir() if p.is_dir() and not is_ignored(p.name))
    return sorted(p for p in found if p.name not in OUTPUTS or holds_images(p))
