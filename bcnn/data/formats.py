"""Which files of a folder are images, and how they are opened."""

import importlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageFile, UnidentifiedImageError

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


def open_image(path: str | Path) -> ImageFile.ImageFile:
    """As `Image.open`, of `FORMATS` only, whatever the file is named; its pixels are not decoded yet.

    Raises:
        UnidentifiedImageError: the file is of none of these formats.
        OSError: it cannot be opened, or is none: a named pipe would wait for ever.
    """
    if not os.path.isfile(path) and os.path.exists(path):
        raise OSError("not a regular file")
    try:
        image = Image.open(path, "r", [name for name in Image.ID if name in FORMATS])
    except UnidentifiedImageError:
        reason = "not an image, damaged at its beginning, or of a kind that Pillow cannot read"
        if os.path.getsize(path) == 0:
            reason = "an empty file"
        elif str(path).lower().endswith(HEIC) and "HEIF" not in Image.OPEN:
            reason = "HEIC needs a plug-in: pip install pillow-heif"
        raise UnidentifiedImageError(reason) from None
    image.filename = ""  # or Pillow maps the file into memory, and forgets to turn a TIFF upright
    return image


def images_below(folder: str | Path, root: str | Path | None = None) -> Iterator[str]:
    """Those of `files_below` that are images by their names."""
    return (path for path in files_below(folder, root) if is_image(os.path.basename(path)))


def files_below(folder: str | Path, root: str | Path | None = None) -> Iterator[str]:
    """The user's files in a folder and in those under it, by name; broken links too.

    A linked folder is entered once, and not at all where it leads back: to a folder above, or to one
    that is in `root` anyway.

    Args:
        folder: to walk.
        root: of the whole set that `folder` is of; None: `folder`.
    """
    seen = {Path(folder).resolve()}
    base = Path(root or folder).resolve()
    for path, folders, files in os.walk(folder, followlinks=True):
        place = Path(path).resolve()
        names = sorted(name for name in folders if not is_ignored(name))
        folders.clear()
        for name in names:
            below = place / name
            target = below.resolve()
            if target not in seen and (target == below or not _leads_back(target, place, base)):
                seen.add(target)
                folders.append(name)
        with os.scandir(path) as entries:  # the folder has their kinds: no look at each file
            plain = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        begin = os.path.join(path, "")
        for name in sorted(files):
            file = begin + name
            if not is_ignored(name) and (
                name in plain or os.path.isfile(file) or not os.path.exists(file)
            ):
                yield file


def _leads_back(target: Path, place: Path, root: Path) -> bool:
    if place.is_relative_to(target) or root.is_relative_to(target):
        return True
    # The folders that the walk passes by, such as a hidden store, are reached by links alone.
    return target.is_relative_to(root) and not any(map(is_ignored, target.relative_to(root).parts))


def _suffixes() -> tuple[str, ...]:
    registered = Image.registered_extensions()
    return (*HEIC, *(suffix for suffix, name in registered.items() if name in FORMATS))


_SUFFIXES = _suffixes()
