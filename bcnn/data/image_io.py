"""From a file to an upright RGB image in 0..255."""

import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from bcnn.data.formats import open_image
from bcnn.utils.errors import UserError

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves this many times the side needed.
# On 272 photographs of flowers, at the least that each allows: 1 changes the top-1 of four, 1.5 and 2
# that of none.
MARGIN = 1.5

# Of the decoding, up by one with every change of what comes out: what was remembered of before is not
# believed.
VERSION = 2

ORIENTATION = 0x0112  # the tag of EXIF and TIFF
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF

# How the file's pixels come to lie upright, by the orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str | Path, side: int | None = None) -> Image.Image:
    """An image of any of `bcnn.data.formats.FORMATS`, as `upright_rgb`.

    Args:
        path: of the file.
        side: the short side in pixels that the image is going to be resized to. A JPEG of several
            times that is then decoded at a fraction of its size. None: whole.

    Raises:
        UserError: the file cannot be decoded.
    """
    with opened(path) as file:
        return decode(file, side)


@contextmanager
def opened(path: str | Path) -> Iterator[ImageFile]:
    """As `open_image`. Raises UserError: it cannot be opened, or what is done with it fails."""
    try:
        with open_image(path) as file:
            yield file
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no image {path}") from error
    except Exception as error:  # decoders raise whatever the bytes lead them into
        raise UserError(f"cannot read the image {path} ({error}): repair or remove it") from error


def decode(file: ImageFile, side: int | None) -> Image.Image:
    """As `load_image`, of a file that is open."""
    if side is not None:
        least = math.ceil(MARGIN * side)
        file.draft(None, (least, least))  # Pillow's name for it; of JPEGs only
    return upright_rgb(file)


def upright_rgb(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says, as RGB in 0..255; transparency shows white.

    Grey of more than 8 bits or in floats is scaled so that white becomes 255. White is 1 where floats
    do not exceed it, else the largest number of 8, 10, 12, 14 or 16 bits: the fewest that hold what
    the file has, and what it says it may have.

    Raises:
        ValueError: it cannot be told which value is white, or Pillow does not read all of the bits.
    """
    raw_modes = " ".join(str(tile.args) for tile in getattr(image, "tile", []))  # gone once decoded
    image.load()
    turn = TURNS.get(_orientation(image))
    if image.mode.startswith(("I", "F")):
        image = _eight_bit_grey(image)
    elif raw_modes:
        _refuse_lost_bits(image, raw_modes)
    if turn is None:
        image = image.copy()
    else:
        image = image.transpose(turn)
        for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
            image.info.pop(key, None)  # or it would be turned again
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """What the EXIF says, 1 where it says nothing or cannot be read."""
    try:
        return _exif_orientation(image.info.get("exif", b"")) or image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises whatever the bytes lead it into
        return 1


def _exif_orientation(exif: bytes) -> int:
    """The orientation in the first directory, 0 without one; Pillow's reader stops at an odd tag."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = "<" if tiff.startswith(b"II") else ">"
    integers = {1: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i"}  # by EXIF's number of the type
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == ORIENTATION and kind in integers:
                return int(struct.unpack_from(f"{order}{integers[kind]}", tiff, entry + 8)[0])
    except struct.error:  # it ends before
        pass
    return 0


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, np.float32)
    low, high = float(values.min()), float(values.max())
    real = image.mode == "F"
    # A float a little above 1 may be the glare of an image in 0..1, which as 0..255 would be black.
    if not 0 <= low <= high <= 65535 or (real and 1 < high < 16):
        raise ValueError(
            f"its values run from {low:g} to {high:g}, and which of them is white is not known: save "
            "it with 8 bits a channel"
        )
    most = max(high, _largest_stated(image))
    white = 1 if real and high <= 1 else next(2**n - 1 for n in (8, 10, 12, 14, 16) if most < 2**n)
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _largest_stated(image: Image.Image) -> int:
    """The largest value that the file says a pixel can have, 0 where it says nothing."""
    bits = _bits_per_sample(image)
    if bits < 16:
        return 2**bits - 1
    largest = max(getattr(image, "tag_v2", {}).get(MAX_SAMPLE_VALUE, (0,)))
    return int(largest) if largest <= 65535 else 0


def _bits_per_sample(image: Image.Image) -> int:
    """Of a TIFF, 0 of others."""
    return int(max(getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (0,))))


def _refuse_lost_bits(image: Image.Image, raw_modes: str) -> None:
    """Of 16 bits a channel Pillow keeps the upper 8; of planes, as TIFF may have, it reads half."""
    lost = _bits_per_sample(image) > 8
    if re.search(";16[BLN]", raw_modes):
        channels = dict(zip(image.getbands(), np.reshape(image.getextrema(), (-1, 2)), strict=True))
        lost = max(high for band, (_, high) in channels.items() if band not in "Aa") < 64
    if lost:
        raise ValueError(
            "its 16 bits a channel cannot be read faithfully: save it with 8 bits a channel"
        )
