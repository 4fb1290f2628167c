"""From a file to the uint8 tensor that the model takes."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from bcnn.errors import UserError

Resize = Literal["keep", "squash"]

MIN_SIZE = 32  # px; smaller images leave fewer than 2 × 2 locations after VGG-16's four pools


def load_image(path: str | Path) -> Image.Image:
    """Any image that Pillow opens, as `upright_rgb`.

    Raises:
        UserError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            return upright_rgb(file)
    except (
        OSError,
        SyntaxError,
        ValueError,
        RuntimeError,  # of the AVIF decoder
        Image.DecompressionBombError,
    ) as error:
        raise UserError(f"cannot read the image {path} ({error}): repair or remove it") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says, as RGB in 0..255; transparency shows white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bit a pixel; convert() would clip it to 255
        grey = np.asarray(image).clip(0, 65535) // 256
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def training_transform(size: int, resize: Resize, crop_pct: float = 1.0) -> v2.Compose:
    """Resize, random crop and horizontal flip: PIL image → uint8 tensor (3, size, size)."""
    resized = _resize(round(size / crop_pct), resize)
    return v2.Compose([v2.ToImage(), resized, v2.RandomCrop(size), v2.RandomHorizontalFlip()])


def evaluation_transform(size: int, resize: Resize, crop_pct: float = 1.0) -> v2.Compose:
    """Resize and centre crop: PIL image → uint8 tensor (3, size, size)."""
    resized = _resize(round(size / crop_pct), resize)
    return v2.Compose([v2.ToImage(), resized, v2.CenterCrop(size)])


def evaluation_crop(
    width: int, height: int, resize: Resize, crop_pct: float = 1.0
) -> tuple[float, float, float, float]:
    """Where `evaluation_transform` looks on an image: left, top, right, bottom in its pixels.

    The transform rounds to pixels of the resized image; this does not.
    """
    sides = (width, height) if resize == "squash" else (min(width, height),) * 2
    across, down = (crop_pct * side for side in sides)
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def _resize(side: int, resize: Resize) -> torch.nn.Module:
    """Short side to `side` pixels, keeping the aspect ratio, or both sides ("squash")."""
    return v2.Resize([side, side] if resize == "squash" else [side], antialias=True)
