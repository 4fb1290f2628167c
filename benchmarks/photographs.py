"""Synthetic JPEGs that cost a decoder what photographs do."""

from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from bcnn.utils.console import track

DISCS = 4000


def write(folder: Path, size: tuple[int, int], count: int) -> None:
    """Write images of `size` (width, height) into two class folders."""
    for index in track(range(count), f"making images of {size[0]} × {size[1]} px"):
        path = folder / "ab"[index % 2] / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(size, np.random.default_rng(index)).save(path, quality=90)


def photograph(size: tuple[int, int], rng: Generator) -> Image.Image:
    """Draw discs that hide one another, and a sensor's noise.

    With radii of density r^-3 they have the statistics of natural images: Lee, Mumford & Huang,
    "Occlusion models for natural images", IJCV 2001.
    """
    image = Image.new("RGB", size)
    canvas = ImageDraw.Draw(image)
    radii = min(size) * np.minimum(0.004 / np.sqrt(rng.uniform(1e-4, 1, DISCS)), 0.33)
    centres = rng.uniform((0, 0), size, (DISCS, 2))
    colours = rng.integers(0, 256, (DISCS, 3))
    for radius, centre, colour in zip(radii, centres, colours, strict=True):
        canvas.ellipse((*(centre - radius), *(centre + radius)), fill=tuple(colour.tolist()))
    light = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float32)
    noise = rng.normal(0, 4, (size[1], size[0], 1)).astype(np.float32)
    return Image.fromarray((light + noise).clip(0, 255).astype(np.uint8))
