"""Contact sheets: some images of every class in one picture, and pairs that look the same."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from bcnn.data.image_io import load_image
from bcnn.data.index import Samples
from bcnn.utils.files import atomic_write
from bcnn.utils.terminal import printable

THUMB = 96  # px, side of an image's place
CAPTION = 20  # px, height of the line above a class's images
COLUMNS = 16  # images side by side
MOST_CLASSES = 1600
MOST_PAIRS = 200

_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def contact_sheet(classes: list[str], samples: Samples, picture: Path) -> None:
    """Write a PNG with the images of each class in a row under its name, as many as there is room for.

    Args:
        classes: the first `MOST_CLASSES` of them are shown.
        samples: images that can be decoded.
        picture: the file to write; its folder is made.

    Raises:
        UserError: it cannot be written.
    """
    shown = classes[:MOST_CLASSES]
    members: list[list[str]] = [[] for _ in classes]
    for path, label in samples:
        members[label].append(path)
    each = next((n for n in (8, 4, 2) if len(shown) * n <= 20 * COLUMNS), 1)  # images a class
    across = COLUMNS // each
    width, height = each * THUMB, CAPTION + THUMB
    sheet = Image.new("RGB", (across * width, -(-len(shown) // across) * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(_FONT, 12)
    for index, (name, paths) in enumerate(zip(shown, members, strict=False)):
        left, top = index % across * width, index // across * height
        caption = _caption(printable(name), f" ({len(paths)})", font, width - 6)
        draw.text((left + 2, top + 3), caption, "black", font)
        for place, path in enumerate(_spread(paths, each)):
            thumb = ImageOps.contain(load_image(path, THUMB), (THUMB - 2, THUMB - 2))
            sheet.paste(thumb, (left + place * THUMB, top + CAPTION))
    with atomic_write(picture) as part:
        sheet.save(part)


def pair_sheet(pairs: Sequence[tuple[str, str]], picture: Path) -> None:
    """Write a PNG of pairs of images, side by side over the names of their folders and files.

    Args:
        pairs: the first `MOST_PAIRS` of them are shown.
        picture: the file to write; its folder is made.

    Raises:
        UserError: it cannot be written.
    """
    shown, across = pairs[:MOST_PAIRS], COLUMNS // 4
    width, height = 4 * THUMB, 2 * (THUMB + CAPTION)
    sheet = Image.new("RGB", (across * width, -(-len(shown) // across) * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(_FONT, 12)
    for index, pair in enumerate(shown):
        left, top = index % across * width, index // across * height
        for path, x in zip(pair, (left, left + 2 * THUMB), strict=True):
            thumb = ImageOps.contain(load_image(path, 2 * THUMB), (2 * THUMB - 2, 2 * THUMB - 2))
            sheet.paste(thumb, (x, top + CAPTION))
            name = printable(str(Path(*Path(path).parts[-2:])))
            draw.text((x + 2, top + 3), _caption(name, "", font, 2 * THUMB - 6), "black", font)
    with atomic_write(picture) as part:
        sheet.save(part)


def _spread(paths: list[str], count: int) -> list[str]:
    """`count` of the paths, evenly far apart: neighbours are often shots of one scene."""
    return paths if len(paths) <= count else [paths[i * len(paths) // count] for i in range(count)]


def _caption(name: str, count: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Both, the name cut where it would run into the next class's."""
    if font.getlength(name + count) <= width:
        return name + count
    while name and font.getlength(f"{name}…{count}") > width:
        name = name[:-1]
    return f"{name}…{count}"
