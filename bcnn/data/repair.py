"""Files with all of their pixels that Pillow refuses nevertheless, as files that it reads."""

import hashlib
import re
from io import BytesIO
from itertools import product

from PIL.JpegImagePlugin import JpegImageFile

PNG = b"\x89PNG\r\n\x1a\n"
CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}  # that the upright pixels depend on
TURNED_BY = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"  # texts that may hold an orientation

START, SCAN, END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"  # markers of a JPEG


def png_pixels(content: bytes) -> bytes:
    """Return a PNG without the chunks that its pixels do not depend on.

    Pillow refuses a text or a colour profile of more than 1 MB, and a wrong checksum of either.
    """
    kept, start = [PNG], len(PNG)
    while start < len(content):  # a chunk is its length, name, data and checksum
        data = start + 8
        end = data + int.from_bytes(content[start : data - 4], "big") + 4
        if content[data - 4 : data] in CHUNKS or content.startswith(TURNED_BY, data):
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


def jpeg_with_end(content: bytes) -> bytes:
    """Return a JPEG with the end marker that it lacks; raise OSError if it lacks pixels, too.

    A decoder takes the bits that are missing from what follows, so the pixels change with that.
    """
    content = content.rstrip(END[:1])
    with JpegImageFile(BytesIO(content)) as jpeg:
        assert jpeg.fp
        first = content.rindex(SCAN, 0, jpeg.fp.tell())  # a thumbnail before it has scans of its own
    scans = content[first:].split(SCAN)[1:]
    restart = bytes([0xFF, 0xD0 + len(re.findall(rb"\xff[\xd0-\xd7]", scans[-1])) % 8])
    noise = b"\xaa" * 64
    ended, noisy = content + END, content + noise + restart + noise + END
    complete = not content.endswith(END) and _coefficients(scans) == 64 * jpeg.layers
    if not complete or _digest(ended) != _digest(noisy):
        raise OSError("image file is truncated")
    return ended


def _coefficients(scans: list[bytes]) -> int:
    """Return how many coefficients scans hold to the last bit, of 64 for each component."""
    found: set[tuple[int, int]] = set()
    for scan in scans:
        count, *header = scan[2:14].ljust(12, b"\0")
        lowest, highest, precision = header[2 * count : 2 * count + 3]
        if not precision & 15:  # the bits that are left to later scans
            found.update(product(header[: 2 * count : 2], range(lowest, highest + 1)))
    return len(found)


def _digest(content: bytes) -> bytes:
    with JpegImageFile(BytesIO(content)) as jpeg:
        return hashlib.sha256(jpeg.tobytes()).digest()
