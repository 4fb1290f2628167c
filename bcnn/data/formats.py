"""Which files of a folder are images, and how they are opened."""

import importlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

from bcnn.utils.errors import UserError

HEIC = (".heic", ".heif")

# Of the formats that Pillow and its plug-ins name, those that are opened. The others are no
# photographs, are identified but not decoded, or are programs: Pillow has Ghostscript run PostScript.
FORMATS = {
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "HEIF",
    "JPEG",
    "JPEG2000",
    "MPO",
    "PNG",
    "PPM",
    "QOI",
    "TGA",
    "TIFF",
    "WEBP",
}

# What systems, network drives and archivers add; .DS_Store, ._* and .ipynb_checkpoints are hidden.
LITTER = {"@eadir", "__macosx", "desktop.ini", "thumbs.db"}


def register_plugins() -> None:
    """Teach Pillow the formats of the plug-ins that are installed: pillow-heif, pillow-avif-plugin."""
    if find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    if find_spec("pillow_avif"):
        importlib.import_module("pillow_avif")


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is not the user's."""
    return name.startswith(".") or name.lower() in LITTER


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image; a plug-in may be needed to decode it."""
    return not is_ignored(name) and name.lower().endswith(_SUFFIXES)


def open_image(path: str | Path | BinaryIO) -> ImageFile.ImageFile:
    """As `Image.open`, of `FORMATS` only, whatever the file is named; its pixels are not decoded yet.

    Args:
        path: of the file, or what is in it.

    Raises:
        UnidentifiedImageError: the file is of none of these formats.
        OSError: it cannot be opened, or is none: a named pipe would wait for ever.
    """
    if isinstance(path, str | Path) and not os.path.isfile(path) and os.path.exists(path):
        raise OSError("not a regular file")
    try:
        image = Image.open(path, "r", [name for name in Image.ID if name in FORMATS])
    except UnidentifiedImageError:
        reason = "not an image, damaged at its beginning, or of a kind that Pillow cannot read"
        if isinstance(path, str | Path) and os.path.getsize(path) == 0:
            reason = "an empty file"
        elif str(path).lower().endswith(HEIC) and "HEIF" not in Image.OPEN:
            reason = "HEIC needs a plug-in: pip install pillow-heif"
        raise UnidentifiedImageError(reason) from None
    image.filename = ""  # or Pillow maps the file into memory, and forgets to turn a TIFF upright
    return image


def images_below(folder: str | Path, root: str | Path | None = None) -> Iterator[str]:
    """Those of `files_below` that nothing speaks against."""
    return (path for path, left_out in files_below(folder, root) if not left_out)


def files_below(folder: str | Path, root: str | Path | None = None) -> Iterator[tuple[str, str]]:
    """The user's files in a folder and in those under it, by name, and why one is no image here.

    A linked folder is entered once, and not at all where it leads back: to a folder above, or to one
    that is in `root` anyway. Of several links to an image, or of it and a link, the first counts. A
    link to nowhere is taken for the image that it was.

    Args:
        folder: to walk.
        root: of the whole set that `folder` is of; None: `folder`.

    Raises:
        UserError: a folder cannot be looked into.
    """
    pending = [(str(folder), os.path.realpath(folder))]  # paths, and where they lead
    seen = {pending[0][1]}
    base = Path(root or folder).resolve()
    while pending:
        path, place = pending.pop()
        folders = []
        for entry in _entries(path):
            target = below = os.path.join(place, entry.name)
            if linked := entry.is_symlink():
                target = os.path.realpath(below)
            if not os.path.isdir(target) if linked else not entry.is_dir():
                reason = _left_out(entry) or ("linked twice" if target in seen else "")
                if not reason:
                    seen.add(target)
                yield entry.path, reason
            elif target not in seen and not (linked and _leads_back(Path(target), Path(place), base)):
                seen.add(target)
                folders.append((entry.path, target))
        pending += reversed(folders)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not is_ignored(e.name)), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"cannot look into the folder {folder}: {error.strerror}") from error


def _left_out(entry: os.DirEntry[str]) -> str:
    if not is_image(entry.name):
        return os.path.splitext(entry.name)[1] or "without an ending"
    if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path):
        return ""
    return "not a regular file" if os.path.exists(entry.path) else ""


def _leads_back(target: Path, place: Path, root: Path) -> bool:
    if place.is_relative_to(target) or root.is_relative_to(target):
        return True
    # The folders that the walk passes by, such as a hidden store, are reached by links alone.
    return target.is_relative_to(root) and not any(map(is_ignored, target.relative_to(root).parts))


def _suffixes() -> tuple[str, ...]:
    registered = Image.registered_extensions()
    return (*HEIC, *(suffix for suffix, name in registered.items() if name in FORMATS))


_SUFFIXES = _suffixes()
