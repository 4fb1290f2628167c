"""Evidence over the photograph that it was found in."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageOps

COLOURS = colormaps["PuOr_r"]  # orange for, purple against: told apart in every colour vision
SIDE = 640  # px of a panel, the photograph's long side

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the photograph


def overlay(photograph: Image.Image, box: Box, shares: np.ndarray, limit: float) -> Image.Image:
    """The photograph in grey, coloured where places spoke for a class (orange) or against (purple).

    Args:
        photograph: upright, RGB.
        box: what the shares cover.
        shares: (height, width), a number a location.
        limit: the share that has the full colour; the weaker, the more of the photograph is seen.
    """
    left, top, right, bottom = (round(edge) for edge in box)
    right, bottom = max(right, left + 1), max(bottom, top + 1)  # of a line of pixels, too
    small = Image.fromarray(shares.astype(np.float32) / limit)
    large = small.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    unit = np.zeros((photograph.height, photograph.width), np.float32)
    unit[top:bottom, left:right] = np.asarray(large).clip(-1, 1)
    grey = np.asarray(ImageOps.grayscale(photograph), np.float32)[..., None] / 255
    colour = COLOURS(unit / 2 + 0.5)[..., :3]
    opacity = 0.9 * np.abs(unit)[..., None] ** 0.7
    mixed = (0.25 + 0.7 * grey) * (1 - opacity) + colour * opacity
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def scaled(box: Box, scale: float) -> Box:
    """The same part of a picture of another size."""
    left, top, right, bottom = (edge * scale for edge in box)
    return left, top, right, bottom


def framed(picture: Image.Image, crop: Box) -> Image.Image:
    """The picture with a thin frame around what the network saw of it, seen on dark and on light."""
    left, top, right, bottom = (round(edge) for edge in crop)
    framed = picture.copy()
    draw = ImageDraw.Draw(framed)
    for apart, colour in ((0, "white"), (1, "black")):
        draw.rectangle(
            (left - apart, top - apart, right - 1 + apart, bottom - 1 + apart), outline=colour
        )
    return framed


def evidence_figure(
    photograph: Image.Image,
    crop: Box,
    box: Box,
    title: str,
    maps: Sequence[tuple[str, np.ndarray]],
) -> Figure:
    """The photograph with the outline of the crop that the network saw, and its evidence beside it.

    Args:
        photograph: upright, RGB.
        crop: what the network saw.
        box: what the maps cover.
        title: over the whole.
        maps: a title and the shares (height, width) of each; each has a scale of its own.
    """
    scale = SIDE / max(photograph.size)
    width, height = (max(1, round(side * scale)) for side in photograph.size)
    small = photograph.resize((width, height), Image.Resampling.LANCZOS)
    crop, box = scaled(crop, scale), scaled(box, scale)
    panels = 1 + len(maps)
    figure = Figure(figsize=(width / 150 * panels + 1.5, height / 150 + 1.2), layout="constrained")
    figure.suptitle(_printable(title), fontsize=11, parse_math=False)
    axes = figure.subplots(1, panels)
    axes[0].imshow(small)
    axes[0].set_title("what the network saw", fontsize=10)
    for panel, (name, shares) in zip(axes[1:], maps, strict=True):
        limit = float(np.abs(shares).max()) or 1.0
        panel.imshow(overlay(small, box, shares, limit))
        panel.set_title(_printable(name), fontsize=10, parse_math=False)
        scalar = ScalarMappable(Normalize(-limit, limit), COLOURS)
        figure.colorbar(scalar, ax=panel, label="logits a place", shrink=0.9, format="%+.2g")
    for panel in axes:
        left, top, right, bottom = crop
        for colour, thickness in (("black", 2.5), ("white", 1.0)):  # seen on dark and on light
            outline = Rectangle((left, top), right - left, bottom - top, fill=False, clip_on=False)
            outline.set(edgecolor=colour, linewidth=thickness)
            panel.add_patch(outline)
        panel.set_axis_off()
    return figure


def _printable(text: str) -> str:
    """Without the control characters and undecodable bytes of file names, which fonts do not have."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text)
