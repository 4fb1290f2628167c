"""From an upright image to the uint8 tensor that the model takes."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image

from bcnn.utils.errors import UserError, validate_choice, validate_share

Resize = Literal["keep", "squash", "whole"]
Interpolation = Literal["bilinear", "bicubic"]

TRAIN_SIZE = 0.9  # side of a training crop, in sides of evaluation's square
TRAIN_ASPECT = 0.8  # width to height of a training crop at least; at most its inverse
STRIP = 8  # an image over this many times as long as wide is cut or, if whole, squashed


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes what the network takes: a square, or the whole image at a square's area."""

    size: int = 448  # px, side of the square
    resize: Resize = "keep"  # the short side to `side`; "squash": both; "whole": to `whole_sides`
    crop_pct: float = 1.0  # share of the resized side that the square takes, as in timm
    interpolation: Interpolation = "bilinear"
    divisor: int = 1  # of the sides of whole images and training crops: `BCNN` sets what it needs
    min_size: int = 1  # px, the smallest of these sides

    def validate(self) -> None:
        """Raise UserError at a value that is no choice, or an option that would have no effect."""
        validate_choice("data.resize", self.resize, get_args(Resize))
        validate_choice("data.interpolation", self.interpolation, (None, *get_args(Interpolation)))
        validate_share("data.crop_pct", self.crop_pct)
        if self.resize == "whole" and self.crop_pct != 1:
            raise UserError(
                f"data.crop_pct={self.crop_pct:g} has no effect on data.resize=whole: use crop_pct=1"
            )

    def __str__(self) -> str:
        return f"{self.size} px ({self.resize}, crop_pct {self.crop_pct:g}, {self.interpolation})"

    @property
    def side(self) -> int:
        """Short side in pixels that an image is resized to: the least that decoding must leave."""
        return round(self.size / self.crop_pct)

    def evaluation(self) -> v2.Compose:
        """Return resize and centre crop: PIL image → uint8 tensor (3, size, size).

        Of "whole" there is no crop, and the sides are `whole_sides`.
        """
        if self.resize == "whole":
            return v2.Compose([v2.ToImage(), v2.Lambda(self._whole, Image)])
        return v2.Compose([v2.ToImage(), self._resized(self.side), v2.CenterCrop(self.size)])

    def training(self, scale: float | None = None) -> v2.Compose:
        """Return random crop and horizontal flip: PIL image → uint8 tensor (3, side, side).

        Args:
            scale: least share of the image's area that a crop takes, of an aspect from 4:5 to 5:4
                (Szegedy et al., CVPR 2015, §6). It is resized to nine tenths of `size`, as crops show
                objects larger than evaluation does (Touvron et al., NeurIPS 2019, §3).
                None: resize as in evaluation, "whole" as "keep", and crop `size`.
        """
        crop: list[torch.nn.Module]
        if scale is None:
            crop = [self._resized(self.side), v2.RandomCrop(self.size)]
        else:
            side = self.multiple(TRAIN_SIZE * self.size)
            mode = InterpolationMode(self.interpolation)
            aspects = (TRAIN_ASPECT, 1 / TRAIN_ASPECT)
            crop = [v2.RandomResizedCrop(side, (scale, 1.0), aspects, mode)]
            if self.resize == "squash":  # to a side at which the smallest crop is not enlarged
                crop.insert(0, self._resized(math.ceil(side / math.sqrt(scale))))
        return v2.Compose([v2.ToImage(), *crop, v2.RandomHorizontalFlip()])

    def training_side(self, scale: float | None, margin: float) -> int:
        """Return `side` for training: `margin` times as long, no crop of an image is enlarged."""
        least = TRAIN_SIZE * self.size / math.sqrt(TRAIN_ASPECT * (scale or 1))
        return max(self.side, math.ceil(least / margin))

    def whole_sides(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height in pixels that a whole image is resized to.

        Their product is about size², their ratio that of the image, up to `STRIP`.
        """
        ratio = min(max(width / height, 1 / STRIP), STRIP)
        return self.multiple(self.size * ratio**0.5), self.multiple(self.size / ratio**0.5)

    def crop(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return left, top, right, bottom of `evaluation`'s crop in pixels of an image, not rounded."""
        across, down = width * self.crop_pct, height * self.crop_pct
        if self.resize == "keep":
            across = down = min(across, down)
        left, top = (width - across) / 2, (height - down) / 2
        return left, top, left + across, top + down

    def multiple(self, side: float) -> int:
        """Return the side in pixels nearest to this one that the network takes."""
        return max(self.min_size, self.divisor * round(side / self.divisor))

    def _whole(self, image: Image) -> Image:
        height, width = image.shape[-2:]
        across, down = self.whole_sides(width, height)
        return F.resize(image, [down, across], InterpolationMode(self.interpolation))

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
