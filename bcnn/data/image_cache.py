"""Photographs at the size that training needs, kept on disk.

A core decodes and crops 20 photographs of 12 megapixels a second, even at a quarter of their size, and
75 of what is kept of them (at 448 px, AVX2; `bcnn benchmark stage=data`): a GPU that trains on 700 a
second waits for the one and not for the other.
"""

import hashlib
import math
import os
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from PIL import Image

from bcnn.data.formats import open_image
from bcnn.data.image_io import MARGIN, VERSION, decode, load_image, opened
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, cache_dir

WORTH = 2  # times the short side that is kept: a smaller photograph is decoded as it is
QUALITY = 95  # of the JPEG that is kept
LONGEST = 65_500  # px, of a side that a JPEG can have


def load_reduced(path: str | Path, side: int) -> Image.Image:
    """As `load_image`, of a copy `MARGIN` times the side that the first call for a large file makes.

    What comes out is the same whether the copy is there, is made, or cannot be kept.

    Args:
        path: of the file.
        side: the short side in pixels that the image is going to be resized to.

    Raises:
        UserError: the file cannot be decoded.
    """
    least = math.ceil(MARGIN * side)
    with opened(path) as file:
        copy = _copy(path, least)
        if copy.is_file():
            return load_image(copy)
        large = min(file.size) >= WORTH * least
        image = decode(file, side)
    scale = least / min(image.size)
    size = [round(scale * edge) for edge in image.size]
    if not large or max(size) > LONGEST:
        return image
    content = BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(content, "JPEG", quality=QUALITY, subsampling=0)
    with suppress(UserError), atomic_write(copy) as part:  # without room for it, it is made again
        part.write_bytes(content.getvalue())
    with open_image(content) as file:
        return decode(file, None)


def _copy(path: str | Path, least: int) -> Path:
    """Where that of a file is: another where the file, or what is asked of it, is another."""
    state = os.stat(path)
    about = (os.path.abspath(path), state.st_size, state.st_mtime_ns, least, VERSION)
    name = hashlib.sha256(os.fsencode(repr(about))).hexdigest()[:32]
    return cache_dir() / "reduced" / name[:2] / f"{name}.jpg"
