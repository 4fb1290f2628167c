"""A contact sheet: some images of every class in one picture."""

from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from bcnn.data.layout import Samples
from bcnn.data.transforms import load_image

THUMB = 96  # px, side of an image's place
CAPTION = 20  # px, height of the line above a class's images
COLUMNS = 16  # images side by side
MOST_CLASSES = 1600

_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def contact_sheet(classes: list[str], samples: Samples, picture: Path) -> None:
    """Write a PNG with the images of each class in a row under its name, as many as there is room for.

    Args:
        classes: the first `MOST_CLASSES` of them are shown.
        samples: images that can be decoded.
        picture: the file to write; its folder is made.
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
        draw.text((left + 2, top + 3), _fitted(f"{name} ({len(paths)})", font, width), "black", font)
        for place, path in enumerate(_spread(paths, each)):
            thumb = ImageOps.contain(load_image(path), (THUMB - 2, THUMB - 2))
            sheet.paste(thumb, (left + place * THUMB, top + CAPTION))
    picture.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(picture)


def _spread(paths: list[str], count: int) -> list[str]:
    """`count` of the paths, evenly far apart: neighbours are often shots of one scene."""
    return paths if len(paths) <= count else [paths[i * len(paths) // count] for i in range(count)]


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut where it would run into the next class's."""
    if font.getlength(text) <= width - 6:
        return text
    while text and font.getlength(text + "…") > width - 6:
        text = text[:-1]
    return text + "…"
