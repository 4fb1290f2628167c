"""Which photographs the paths on a command line mean."""

import glob
import os
import sys
from collections.abc import Sequence

from bcnn.data.formats import images_below, is_image
from bcnn.errors import UserError


def find_images(paths: Sequence[str]) -> list[str]:
    """Photographs, in the order of `paths`, and by name within each.

    Args:
        paths: files, taken whatever their names; folders, searched to the bottom; patterns
            (`*.jpg`, `**/*.png`); "-": standard input, a file a line, which need not exist.

    Raises:
        UserError: a path stands for no image.
    """
    if not paths:
        raise UserError("which photographs? name files, folders or patterns: see --help")
    found: list[str] = []
    for path in paths:
        matches = [path] if os.path.isfile(path) else _listed() if path == "-" else _matching(path)
        if not matches:
            raise UserError(f"no images: {'standard input is empty' if path == '-' else path}")
        found += matches
    return found


def _listed() -> list[str]:
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line.strip()]


def _matching(pattern: str) -> list[str]:
    """Images below a folder, or that a pattern matches, or below the folders that it matches."""
    found: list[str] = []
    for match in [pattern] if os.path.isdir(pattern) else sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(match):
            found += images_below(match)
        elif is_image(os.path.basename(match)):
            found.append(match)
    return list(dict.fromkeys(found))  # "**" matches folders, and what is in them
