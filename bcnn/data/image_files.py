"""Image files below a folder, and those that the paths of a command line name."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from bcnn.data.image_io import SUFFIXES
from bcnn.utils.console import logger
from bcnn.utils.errors import UserError

# What systems, network drives and archivers add; .DS_Store, ._* and .ipynb_checkpoints are hidden.
SYSTEM_FILES = {
    *("#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recycle", "__macosx", "desktop.ini"),
    *("lost+found", "recycler", "system volume information", "thumbs.db"),
}


def is_ignored(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or made by the system."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def is_image(path: str) -> bool:
    """Return whether a file of this name is taken for an image; decoding may need a plug-in."""
    name = os.path.basename(path)
    return not is_ignored(name) and name.lower().endswith(SUFFIXES)


def images_below(folder: str | Path) -> Iterator[str]:
    """Yield the images among `files_below`."""
    return filter(is_image, files_below(folder))


def files_below(folder: str | Path) -> Iterator[str]:
    """Yield the files of a folder and of those below it, sorted by name, without ignored ones.

    A folder is entered once, however many links lead to it.
    """
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        entered = []
        for name in sorted(folders):
            target = os.path.realpath(os.path.join(parent, name))
            if target not in seen and not is_ignored(name):
                seen.add(target)
                entered.append(name)
        folders[:] = entered
        yield from (os.path.join(parent, name) for name in sorted(files) if not is_ignored(name))


def find_images(paths: Sequence[str]) -> list[str]:
    """Return the images that paths name, in their order, and sorted by name within each.

    A path is a file, whatever its name, a folder with all below it, a pattern (`*.jpg`, `**/*.png`), or
    "-": standard input, a file a line.
    """
    found: list[str] = []
    left_out: dict[str, None] = {}  # a set in order
    for path in paths:
        if path == "-":
            images = [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line]
        elif os.path.isfile(path):
            images = [path]
        else:
            matches = [path] if os.path.isdir(path) else sorted(glob.glob(path, recursive=True))
            each = (files_below(match) if os.path.isdir(match) else [match] for match in matches)
            files = dict.fromkeys(chain(*each))  # "**" matches folders, and the files in them
            images = [file for file in files if is_image(file)]
            left_out |= dict.fromkeys(file for file in files if not is_image(file))
        if not images:
            raise UserError(f"no images: {'standard input is empty' if path == '-' else path}")
        found += images
    if left_out:
        logger.warning(f"{len(left_out)} files left out: {count_suffixes(left_out)}")
    return found


def count_suffixes(files: Collection[str]) -> str:
    """Return how many of the files have each suffix: `2 .txt, 1 without a suffix`."""
    counts = Counter(os.path.splitext(file)[1] or "without a suffix" for file in files)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def listed(names: Iterable[str], most: int = 10) -> str:
    """Return names with commas between, at most `most`, and the number of the others."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _raise(error: OSError) -> None:
    raise error
