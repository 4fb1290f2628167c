"""Attribution maps over their image."""

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageOps

from bcnn.utils.console import printable

COLOURS = colormaps["PuOr_r"]  # orange for, purple against: distinct in every colour vision

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image


def overlay(image: Image.Image, box: Box, shares: np.ndarray, limit: float) -> Image.Image:
    """Return the image in grey, coloured by the shares (height, width) of the locations in a box.

    A share of `limit` has the full colour; weaker ones let more of the image through.
    """
    left, top, right, bottom = (round(edge) for edge in box)
    right, bottom = max(right, left + 1), max(bottom, top + 1)  # of an image a pixel wide, too
    small = Image.fromarray(shares.astype(np.float32) / limit)
    large = small.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    whole = Image.new("F", image.size)
    whole.paste(large, (left, top))  # a box may end beyond the image
    unit = np.asarray(whole).clip(-1, 1)
    grey = np.asarray(ImageOps.grayscale(image), np.float32)[..., None] / 255
    colour = COLOURS(unit / 2 + 0.5)[..., :3]
    opacity = 0.9 * np.abs(unit)[..., None] ** 0.7
    mixed = (0.25 + 0.7 * grey) * (1 - opacity) + colour * opacity
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def scaled(box: Box, scale: float) -> Box:
    """Return the same part of the image at another size."""
    left, top, right, bottom = (edge * scale for edge in box)
    return left, top, right, bottom


def framed(image: Image.Image, crop: Box) -> Image.Image:
    """Return the image with the crop in a white and a black line, one of which is always visible."""
    left, top, right, bottom = (round(edge) for edge in crop)
    picture = image.copy()
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, right - 1, bottom - 1), outline="white")
    draw.rectangle((left - 1, top - 1, right, bottom), outline="black")
    return picture


def printable_lines(text: str) -> str:
    """Return the text with control characters other than line ends escaped."""
    return "\n".join(map(printable, text.split("\n")))
