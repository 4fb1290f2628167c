"""The interface of a backbone."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from bcnn.data.transforms import Interpolation
from bcnn.utils.errors import UserError


class Backbone(nn.Module):
    """Normalises images and computes feature maps.

    A subclass implements `forward_features` and `unfreeze_from`, and sets the attributes. The mean and
    standard deviation are buffers, saved with the weights that were trained with them. A backbone
    stays in evaluation mode: batches are small, so BatchNorm keeps its statistics.
    """

    channels: int  # of its maps; `project` changes it
    stride: int  # pixels from one location to the next
    min_size: int  # side in pixels of the smallest image with 2 × 2 locations
    size_divisor: int = 1  # the sides of images are multiples of it
    layers: tuple[str, ...] = ()  # names for `unfreeze_from`, from the input up
    weights: tuple[str, ...] = ()  # names of published weights for `download`
    supports_grad_checkpointing: bool = False  # whether `forward_features` uses `grad_checkpointing`
    licence: str = ""  # of the published weights; "": unknown
    interpolation: Interpolation = "bilinear"  # of the images that the weights were trained on
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False  # recompute activations in the backward pass
        self.compiling = False  # torch.compile the training step
        self.projection: nn.Module = nn.Identity()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    def set_normalization(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        """Set the mean and standard deviation of each channel, for images in 0..1."""
        self.mean.copy_(torch.as_tensor(mean).view(3, 1, 1))
        self.std.copy_(torch.as_tensor(std).view(3, 1, 1))

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 3, height, width) → maps (batch, channels, height // stride, width // stride).

        Maps are smaller where convolutions have no padding: see `offset`. Images are RGB, uint8 in
        0..255 or floating point in 0..1.
        """
        return self.projection(self.unprojected(images))

    def unprojected(self, images: Tensor) -> Tensor:
        """Compute the maps without the projection; see `forward`."""
        sides = images.shape[2:]
        odd = any(side < self.min_size or side % self.size_divisor for side in sides)
        if images.ndim != 4 or images.shape[1] != 3 or odd:
            raise ValueError(
                "expected images of shape (batch, 3, height, width) with sides of at least "
                f"{self.min_size} px, multiples of {self.size_divisor}, got {tuple(images.shape)}"
            )
        x = images.to(self.mean.dtype)
        if not images.is_floating_point():
            x = x / 255
        maps = self._compiled if self.compiling and torch.is_grad_enabled() else self.forward_features
        return maps((x - self.mean) / self.std)

    @cached_property
    def _compiled(self) -> Callable[[Tensor], Tensor]:
        return torch.compile(self.forward_features)

    @cached_property
    def offset(self) -> float:
        """Pixels from an image's edge to the middle of its first location.

        It is half a stride where maps have a location for each stride. Fewer or more of them lie in the
        middle of the smallest image that has as many, as padding is the same on all sides.
        """
        count = self.locations(self.min_size)
        if count * self.stride == self.min_size:
            return self.stride / 2
        smallest = bisect_left(range(self.min_size), count, key=self.locations)
        return (smallest - (count - 1) * self.stride) / 2

    @torch.no_grad()
    def locations(self, width: int, height: int | None = None) -> int:
        """Return how many locations a row of an image, by default a square, has: 0 if it is refused."""
        try:
            return self.forward_features(self.mean.new_zeros(1, 3, height or width, width)).shape[3]
        except Exception:  # networks raise many types
            return 0

    def project(self, channels: int) -> None:
        """Append a 1 × 1 convolution to `channels`, which at first selects the first of its input."""
        if type(channels) is not int or not 0 < channels <= self.channels:
            raise UserError(f"model.project={channels}: a whole number from 1 to {self.channels}")
        # skip_init draws no random numbers: the other weights of a seed stay the same.
        self.projection = convolution = skip_init(nn.Conv2d, self.channels, channels, 1, bias=False)
        nn.init.dirac_(convolution.weight)
        self.channels = channels

    def initialise(self) -> None:
        """Draw random weights; by default those of the layers' constructors stay."""

    def download(self, weights: str) -> dict[str, Tensor]:
        """Return the state of published weights (one of `weights`), with mean and std."""
        raise NotImplementedError

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors under their authors' names as a state of this backbone."""
        return dict(tensors)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the maps (batch, channels, h, w) of normalised images (batch, 3, height, width)."""
        raise NotImplementedError

    def unfreeze_from(self, name: str | None) -> None:
        """Train the layers from `name` (one of `layers`) up, or all of them (None)."""
        raise NotImplementedError
