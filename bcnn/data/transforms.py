"""From an upright image to the uint8 tensor that the model takes."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image

Resize = Literal["keep", "squash"]
Interpolation = Literal["bilinear", "bicubic"]

STRIP = 8  # an image over this many times as long as wide is cut before it is resized


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the square that the network takes."""

    size: int = 448  # px, side of the square
    resize: Resize = "keep"  # the short side to `side`; "squash": both sides
    crop_pct: float = 1.0  # share of the resized side that the square takes, as in timm
    interpolation: Interpolation = "bilinear"

    def __str__(self) -> str:
        return f"{self.size} px ({self.resize}, crop_pct {self.crop_pct:g}, {self.interpolation})"

    @property
    def side(self) -> int:
        """Short side in pixels that an image is resized to: the least that decoding must leave."""
        return round(self.size / self.crop_pct)

    def evaluation(self) -> v2.Compose:
        """Return resize and centre crop: PIL image → uint8 tensor (3, size, size)."""
        return v2.Compose([v2.ToImage(), self._resized(self.side), v2.CenterCrop(self.size)])

    def training(self, scale: float | None = None, stride: int = 1, min_size: int = 1) -> v2.Compose:
        """Return random crop and horizontal flip: PIL image → uint8 tensor (3, side, side).

        Args:
            scale: least share of the image's area that a crop takes, of an aspect from 4:5 to 5:4
                (Szegedy et al., CVPR 2015, §6). It is resized to nine tenths of `size`, as crops show
                objects larger than evaluation does (Touvron et al., NeurIPS 2019, §3).
                None: resize as in evaluation and crop `size`.
            stride: of the network's maps; the smaller side is a multiple of it.
            min_size: smallest side that the network takes.
        """
        crop: list[torch.nn.Module]
        if scale is None:
            crop = [self._resized(self.side), v2.RandomCrop(self.size)]
        else:
            side = max(min_size, stride * round(0.9 * self.size / stride))
            mode = InterpolationMode(self.interpolation)
            crop = [v2.RandomResizedCrop(side, (scale, 1.0), (0.8, 1.25), mode)]
            if self.resize == "squash":  # to a side at which the smallest crop is not enlarged
                crop.insert(0, self._resized(math.ceil(side / math.sqrt(scale))))
        return v2.Compose([v2.ToImage(), *crop, v2.RandomHorizontalFlip()])

    def crop(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return left, top, right, bottom of `evaluation`'s crop in pixels of an image, not rounded."""
        across, down = width * self.crop_pct, height * self.crop_pct
        if self.resize == "keep":
            across = down = min(across, down)
        left, top = (width - across) / 2, (height - down) / 2
        return left, top, left + across, top + down

    def _resized(self, side: int) -> torch.nn.Module:
        mode = InterpolationMode(self.interpolation)
        if self.resize == "squash":
            return v2.Resize([side, side], mode)
        return v2.Lambda(partial(_resize_short_side, side=side, mode=mode), Image)


def _resize_short_side(image: Image, side: int, mode: InterpolationMode) -> Image:
    """Resize the short side of an image; of a strip, take only a central part, 4 to 8 times as long.

    A line of 1 × 3,000 pixels would grow to 448 × 1,344,000. The cut is where pixels begin before and
    after resizing, as nearly as possible, so that the middle is the same as that of the whole strip.
    """
    height, width = image.shape[-2:]
    short, long = sorted((height, width))
    if long <= STRIP * short:
        return F.resize(image, [side], mode)
    resized = int(side * long / short)
    # Pixels cut from each end, before and after; the latter even, for `CenterCrop`'s rounding.
    least, most = -(-(long - STRIP * short) // 2), (2 * long - STRIP * short) // 4
    cuts = [(cut, 2 * round(cut * resized / long / 2)) for cut in range(least, most + 1)]
    before, after = min(cuts, key=lambda pair: abs(pair[0] * resized / long - pair[1]))
    rest = resized - 2 * after
    if width == long:
        return F.resize(image[..., before : long - before], [side, rest], mode)
    return F.resize(image[..., before : long - before, :], [rest, side], mode)
