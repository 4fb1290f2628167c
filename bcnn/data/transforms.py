"""From a file to the uint8 tensor that the model takes."""

import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from bcnn.errors import UserError

Resize = Literal["keep", "squash"]

MIN_SIZE = 32  # px; smaller images leave fewer than 2 × 2 locations after VGG-16's four pools

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves this many times the side needed.
# On 272 photographs of flowers, at the least that each allows: 1 changes the top-1 of four, 1.5 and 2
# that of none.
MARGIN = 1.5


def load_image(path: str | Path, side: int | None = None) -> Image.Image:
    """Any image that Pillow opens, as `upright_rgb`.

    Args:
        path: of the file.
        side: the short side in pixels that the image is going to be resized to. A JPEG of several
            times that is then decoded at a fraction of its size. None: whole.

    Raises:
        UserError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            if side is not None:
                least = math.ceil(MARGIN * side)
                file.draft(None, (least, least))  # Pillow's name for it; of JPEGs only
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
    return image if image.mode == "RGB" else image.convert("RGB")


def training_transform(
    size: int, resize: Resize, crop_pct: float = 1.0, scale: float | None = None
) -> v2.Compose:
    """Random crop and horizontal flip: PIL image → uint8 tensor (3, side, side).

    Args:
        size: side in pixels of the crops of evaluation.
        resize: as in evaluation; "squash" makes the image square before it is cropped.
        crop_pct: as in evaluation, where `scale` is None.
        scale: the least share of the image's area that a crop takes, of an aspect within 4:5 and 5:4,
            before it is resized to nine tenths of `size`, in whole steps of the maps, 16 px (Szegedy
            et al., "Going deeper with convolutions", CVPR 2015, §6). Parts of an image show things
            larger than evaluation does, which the smaller side makes up for (Touvron et al., "Fixing
            the train-test resolution discrepancy", NeurIPS 2019, §3).
            None: the image is resized as in evaluation, and the crop is of that scale and size.
    """
    crop: list[torch.nn.Module]
    if scale is None:
        crop = [_resize(resized_side(size, crop_pct), resize), v2.RandomCrop(size)]
    else:
        side = max(MIN_SIZE, 16 * round(0.9 * size / 16))
        crop = [v2.RandomResizedCrop(side, scale=(scale, 1.0), ratio=(0.8, 1.25), antialias=True)]
        if resize == "squash":  # to a side of which the smallest crop need not be enlarged
            crop.insert(0, _resize(math.ceil(side / math.sqrt(scale)), resize))
    return v2.Compose([v2.ToImage(), *crop, v2.RandomHorizontalFlip()])


def evaluation_transform(size: int, resize: Resize, crop_pct: float = 1.0) -> v2.Compose:
    """Resize and centre crop: PIL image → uint8 tensor (3, size, size)."""
    resized = _resize(resized_side(size, crop_pct), resize)
    return v2.Compose([v2.ToImage(), resized, v2.CenterCrop(size)])


def resized_side(size: int, crop_pct: float = 1.0) -> int:
    """The short side in pixels that crops of `size` are cut from."""
    return round(size / crop_pct)


def evaluation_crop(
    width: int, height: int, resize: Resize, crop_pct: float = 1.0
) -> tuple[float, float, float, float]:
    """Where `evaluation_transform` looks on an image: left, top, right, bottom in its pixels.

    The transform rounds to pixels of the resized image; this does not.
    """
    across, down = width * crop_pct, height * crop_pct
    if resize == "keep":
        across = down = min(across, down)
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def _resize(side: int, resize: Resize) -> torch.nn.Module:
    """Short side to `side` pixels, keeping the aspect ratio, or both sides ("squash")."""
    return v2.Resize([side, side] if resize == "squash" else [side], antialias=True)
