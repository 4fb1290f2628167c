"""JPEGs that cost a decoder what photographs cost it."""

from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from bcnn.utils.progress import track

_DISCS = 4000


def write(folder: Path, size: tuple[int, int], count: int) -> None:
    """`count` photographs of `size` (width, height) into the new `folder`."""
    folder.mkdir()
    for index in track(range(count), f"making {folder.name}"):
        image = photograph(size, np.random.default_rng(index))
        image.save(folder / f"{index:04d}.jpg", quality=90)


def photograph(size: tuple[int, int], rng: Generator) -> Image.Image:
    """Dead leaves and a sensor's noise: edges at every scale, and about as many bits as a photograph.

    Source: discs with radii of density r^-3 that hide one another share the statistics of natural
    images: Lee, Mumford & Huang, "Occlusion models for natural images", IJCV 2001.
    """
    width, height = size
    image = Image.new("RGB", size)
    canvas = ImageDraw.Draw(image)
    radii = min(size) * np.minimum(0.004 / np.sqrt(rng.uniform(1e-4, 1, _DISCS)), 0.33)
    centres = rng.uniform((0, 0), size, (_DISCS, 2))
    colours = rng.integers(0, 256, (_DISCS, 3))
    for radius, centre, colour in zip(radii, centres, colours, strict=True):
        box = (*(centre - radius), *(centre + radius))
        canvas.ellipse(box, fill=tuple(colour.tolist()))
    light = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float32)
    noise = rng.normal(0, 4, (height, width, 1)).astype(np.float32)
    return Image.fromarray((light + noise).clip(0, 255).astype(np.uint8))
