"""Which photographs the paths on a command line mean."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Sequence

from bcnn.data.formats import files_below, is_image
from bcnn.utils.errors import UserError
from bcnn.utils.terminal import say


def find_images(paths: Sequence[str]) -> list[str]:
    """Photographs, in the order of `paths`, and by name within each; says which files it leaves out.

    Args:
        paths: files, taken whatever their names; folders, searched to the bottom; patterns
            (`*.jpg`, `**/*.png`); "-": standard input, a file a line, which need not exist.

    Raises:
        UserError: a path stands for no image.
    """
    if not paths:
        raise UserError("which photographs? name files, folders or patterns: see --help")
    found: list[str] = []
    left_out: dict[str, str] = {}
    for path in paths:
        if os.path.isfile(path):
            matches = [path]
        else:
            matches = _listed() if path == "-" else _matching(path, left_out)
        if not matches:
            raise UserError(f"no images: {'standard input is empty' if path == '-' else path}")
        found += matches
    if left_out:
        counts = Counter(left_out.values()).most_common()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        say(f"{len(left_out)} files left out: {reasons}", file=sys.stderr)
    return found


def _listed() -> list[str]:
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line.strip()]


def _matching(pattern: str, left_out: dict[str, str]) -> list[str]:
    """Images below a folder, or that a pattern matches, or below the folders that it matches."""
    found: list[str] = []
    for match in [pattern] if os.path.isdir(pattern) else sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(match):
            for path, reason in files_below(match):
                if reason:
                    left_out[path] = reason
                else:
                    found.append(path)
        elif is_image(os.path.basename(match)):
            found.append(match)
    return list(dict.fromkeys(found))  # "**" matches folders, and what is in them
