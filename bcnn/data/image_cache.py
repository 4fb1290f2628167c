"""Large training images kept on disk at the size that training needs (speeds: benchmarks/data.py)."""

import hashlib
import math
import os
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from PIL import Image

from bcnn.data.image_io import MARGIN, VERSION, decode, file_state, load_image, open_image, opened
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, cache_dir

WORTH = 2  # an image is kept if its short side is this many times that of the copy
QUALITY = 95  # of the copies, which are JPEGs
LONGEST = 65_500  # px, the longest side of a JPEG


def load_reduced(path: str | Path, side: int) -> Image.Image:
    """Load an image as `load_image` does; a large one from a copy of `MARGIN` times the side.

    The first call for a file makes the copy. The result is the same if the copy cannot be written.
    """
    copy_side = math.ceil(MARGIN * side)
    with opened(path) as file:
        key = repr((os.path.abspath(path), file_state(path), copy_side, VERSION))
        name = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
        copy = cache_dir() / "reduced" / name[:2] / f"{name}.jpg"
        if copy.is_file():
            return load_image(copy)
        is_large = min(file.size) >= WORTH * copy_side
        image = decode(file, side)
    scale = copy_side / min(image.size)
    size = [round(scale * edge) for edge in image.size]
    if not is_large or max(size) > LONGEST:
        return image
    content = BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(content, "JPEG", quality=QUALITY, subsampling=0)
    with suppress(UserError), atomic_write(copy) as part:  # no room: the next call makes it again
        part.write_bytes(content.getvalue())
    with open_image(content) as file:
        return decode(file, None)
