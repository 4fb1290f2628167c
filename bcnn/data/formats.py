"""Which files of a folder are images."""

import importlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

HEIC = (".heic", ".heif")

# Of the formats that Pillow names; the others are no photographs, or are identified but not decoded.
FORMATS = {
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
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

# Folders that network drives and archivers add; .DS_Store, ._* and .ipynb_checkpoints are hidden, and
# Thumbs.db and the backups of editors (a.jpg~, a.jpg.bak, #a.jpg#) do not end like an image.
LITTER = {"@eadir", "__macosx"}


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


def images_below(folder: str | Path) -> Iterator[str]:
    """Images of a folder, those in folders under it too, by name."""
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        yield from (os.path.join(path, name) for name in sorted(files) if is_image(name))


def _suffixes() -> tuple[str, ...]:
    registered = Image.registered_extensions()
    return (*HEIC, *(suffix for suffix, name in registered.items() if name in FORMATS))


_SUFFIXES = _suffixes()
