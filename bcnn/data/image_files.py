"""Image files below a folder, and those that the paths of a command line name."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from posixpath import normpath

from bcnn.data.image_io import SUFFIXES
from bcnn.data.lists import SUFFIXES as LISTS
from bcnn.data.lists import paths_of_list
from bcnn.data.urls import files_at, is_file, is_url, member
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
    name = os.path.basename(member(path))
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


def find_images(paths: Iterable[str]) -> list[str]:
    """Return the images of `stream_images`."""
    return [*stream_images(paths)]


def stream_images(paths: Iterable[str]) -> Iterator[str]:
    """Yield the images that paths name, in their order, and sorted by name within each.

    A path is a file, whatever its name; a list of `data.lists.SUFFIXES`; a folder with all below it; a
    pattern (`*.jpg`, `**/*.png`); a URL of one of these; or "-": standard input, a file a line. All but
    patterns and URLs of folders are read as the images are needed.
    """
    left_out: Counter[str] = Counter()
    for path in paths:
        images = _images_of(path, left_out)
        if (first := next(images, None)) is None:
            raise UserError(f"no images: {'standard input is empty' if path == '-' else path}")
        yield first
        yield from images
    if left_out:
        logger.warning(f"{left_out.total()} files left out: {suffix_counts(left_out)}")


def _images_of(path: str, left_out: Counter[str]) -> Iterator[str]:
    """Yield the images of one path; count the suffixes of other files in its folders."""
    if path == "-":
        yield from (os.fsdecode(line) for each in sys.stdin.buffer if (line := each.rstrip(b"\r\n")))
    elif is_file(path):
        yield from paths_of_list(path) if member(path).lower().endswith(LISTS) else [path]
    else:
        for file in _files_of(path):
            if is_image(file):
                yield file
            else:
                left_out[suffix_of(file)] += 1


def _files_of(path: str) -> Iterable[str]:
    """Return the files of a folder, a pattern, or a URL of one of these, without ignored ones."""
    if is_url(path):
        names = {url: normpath(member(url).removeprefix(path)) for url in files_at(path)}
        return (url for url, name in names.items() if not any(map(is_ignored, name.split("/"))))
    matches = [path] if os.path.isdir(path) else sorted(glob.glob(path, recursive=True))
    files = chain(*(files_below(each) if os.path.isdir(each) else [each] for each in matches))
    return dict.fromkeys(files) if len(matches) > 1 else files  # "**" finds some twice


def suffix_of(file: str) -> str:
    """Return the suffix of a file, or words for none."""
    return os.path.splitext(member(file))[1] or "without a suffix"


def suffix_counts(suffixes: Counter[str]) -> str:
    """Return how many files have each `suffix_of`: `2 .txt, 1 without a suffix`."""
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())


def listed(names: Iterable[str], most: int = 10) -> str:
    """Return names with commas between, at most `most`, and the number of the others."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename}: {error.strerror}") from error
