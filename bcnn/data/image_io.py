"""From a file to an upright RGB image with values 0..255."""

import errno
import hashlib
import importlib
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import jpeg_factory

from bcnn.data.repair import PNG, START, jpeg_with_end, png_pixels
from bcnn.data.urls import is_url, open_file
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, cache_dir

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves this many times the side needed.
# Of 272 images of flowers, 1 changes the top-1 of four, 1.5 and 2 that of none.
MARGIN = 1.5

# Of JPEGs, which are decoded at a fraction of their size; a progressive one takes 6 bytes a pixel.
# Pillow's limit for others is 179 megapixels, which take up to 16 bytes each.
JPEG_PIXELS = 256e6

WORTH = 2  # a reduced copy is kept if its short side is this many times that of the copy
QUALITY = 95  # of the copies, which are JPEGs
LONGEST = 65_500  # px, the longest side of a JPEG

# Increase with every change of what decoding returns: older caches are then not used.
VERSION = 4

# Pillow's names. Others are not decoded by Pillow, or are programs: Ghostscript runs PostScript.
FORMATS = {
    *("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA"),
    *("TIFF", "WEBP"),
}
HEIC = (".heic", ".heif")

ORIENTATION = 0x0112  # a tag of EXIF
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF

if find_spec("pillow_heif"):  # at import, so that every process that decodes has it
    importlib.import_module("pillow_heif").register_heif_opener()
SUFFIXES = (*HEIC, *(s for s, name in Image.registered_extensions().items() if name in FORMATS))


def file_state(path: str | Path) -> tuple[int, int, int, int]:
    """Return size, modification time, change time and inode; raise OSError if it is no regular file."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe may never end
        raise OSError("not a regular file")
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def open_image(file: BinaryIO) -> ImageFile.ImageFile:
    """Open an image of one of `FORMATS`, whatever the file is named; pixels are not decoded yet."""
    if file.read(len(PNG)) == PNG:
        file.seek(0)
        file = BytesIO(png_pixels(file.read()))
    file.seek(0)
    try:
        return Image.open(file, "r", [name for name in Image.ID if name in FORMATS])
    except Image.DecompressionBombError:
        file.seek(0)
        if file.read(2) != START:
            raise
        file.seek(0)
        image = jpeg_factory(file)
        if image.width * image.height > JPEG_PIXELS:
            raise ValueError(f"it has more than {JPEG_PIXELS / 1e6:.0f} megapixels") from None
        return image


def load_image(path: str | Path, side: int | None = None) -> Image.Image:
    """Load an image of one of `FORMATS`: see `upright_rgb`; raise UserError if it cannot be decoded.

    A JPEG several times as large as `side`, the short side in pixels that the image will be resized to,
    is decoded at a fraction of its size.
    """
    with opened(path) as file:
        return decode(file, side)


def load_reduced(path: str | Path, side: int) -> Image.Image:
    """Load an image as `load_image` does; a large one from a copy that the first call makes."""
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


@contextmanager
def opened(path: str | Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image as `open_image` does; errors here and in the block are UserErrors that name it."""
    try:
        if not is_url(path):
            file_state(path)
        with open_file(path) as content, open_image(content) as file:
            yield file
    except Exception as error:  # decoders raise many types
        raise UserError(f"cannot read the image {path}: {reason(path, error)}") from error


def reason(path: str | Path, error: Exception) -> str:
    """Return on one line why an image could not be decoded."""
    if isinstance(error, UnidentifiedImageError):
        if str(path).lower().endswith(HEIC) and "HEIF" not in Image.OPEN:
            return "HEIC needs a plug-in: pip install pillow-heif"
        return "not an image, damaged at its beginning, or of a format that is not supported"
    if isinstance(error, FileNotFoundError):  # fsspec's has a name alone
        return os.strerror(errno.ENOENT)
    message = getattr(error, "strerror", None) or str(error)
    return " ".join(message.split()) or type(error).__name__


def decode(file: ImageFile.ImageFile, side: int | None) -> Image.Image:
    """Decode an open image: see `load_image`."""
    if side is not None:
        file.draft(None, 2 * (math.ceil(MARGIN * side),))  # has an effect on JPEGs only
    try:
        return upright_rgb(file)
    except OSError:
        if file.format not in ("JPEG", "MPO") or not file.fp:
            raise
        file.fp.seek(0)
        return decode(open_image(BytesIO(jpeg_with_end(file.fp.read()))), side)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return the image turned by its EXIF orientation, as RGB with values 0..255, on white.

    Grey of more than 8 bits or in floats is scaled so that white becomes 255. White is 1 where floats
    do not exceed it, else the largest number of 8, 10, 12, 14 or 16 bits: the fewest that hold the
    values, and the largest value that the file states. ValueError: white is unknown, or Pillow does not
    read all bits.
    """
    raw_modes = " ".join(str(tile.args) for tile in getattr(image, "tile", []))  # gone once decoded
    image.load()
    try:
        orientation = int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises many types at damaged EXIF data
        orientation = 1
    # Bits of a TIFF's channel; 0 in other formats.
    bits = int(max(getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (0,))))
    if image.mode.startswith(("I", "F")):
        image = _eight_bit_grey(image, bits)
    elif raw_modes:
        _validate_bits(image, raw_modes, bits)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")  # a copy
    image.info = {}  # or a second call would turn it again
    image.getexif()[ORIENTATION] = orientation
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _eight_bit_grey(image: Image.Image, bits: int) -> Image.Image:
    values = np.asarray(image, np.float32)
    low, high = float(values.min()), float(values.max())
    is_float = image.mode == "F"
    # Floats a little above 1 may be glare in an image of 0..1, which would be black if 255 were white.
    if not 0 <= low <= high <= 65535 or (is_float and 1 < high < 16):
        values_run = f"its values run from {low:g} to {high:g} and it is unknown which is white"
        raise ValueError(f"{values_run}: save it with 8 bits a channel")
    stated = 2**bits - 1 if bits < 16 else max(image.tag_v2.get(MAX_SAMPLE_VALUE, (0,)))  # type: ignore[attr-defined]
    most = max(high, stated if stated <= 65535 else 0)
    unit_range = is_float and high <= 1
    white = 1 if unit_range else next(2**n - 1 for n in (8, 10, 12, 14, 16) if most < 2**n)
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _validate_bits(image: Image.Image, raw_modes: str, bits: int) -> None:
    """Raise ValueError where Pillow drops bits that matter.

    Of 16 bits a channel it keeps the upper 8; of 16-bit TIFF planes it reads half.
    """
    lost = bits > 8
    if re.search(";16[BLN]", raw_modes):
        channels = dict(zip(image.getbands(), np.reshape(image.getextrema(), (-1, 2)), strict=True))
        lost = max(high for band, (_, high) in channels.items() if band not in "Aa") < 64
    if lost:
        raise ValueError("its 16 bits a channel cannot be read in full: save it with 8 bits a channel")
