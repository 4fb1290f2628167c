"""Backbones: normalised images in, maps of local features out. A file each; its name is the choice."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from bcnn.data.transforms import Interpolation
from bcnn.utils.errors import UserError


class Backbone(nn.Module):
    """What the network asks of its features.

    A subclass says, as attributes of the class or of the instance:
        channels: of its maps; of those that are projected once they are.
        stride: pixels from one location to the next.
        min_size: side in pixels of the smallest image that leaves 2 × 2 locations.
        size_divisor: that the sides of images have to be of, 1 for convolutions.
        layers: names that `unfreeze_from` takes, from the first up.
        supports_grad_checkpointing: whether its `forward_features` heed `grad_checkpointing`.
        licence: of the weights that are published for it; "": not known.
        interpolation: that images were resized by when these were trained.
    and implements `forward_features` and `unfreeze_from`. Images are normalised here, with the mean and standard
    deviation that the weights were trained with, so the two cannot be mispaired.
    """

    channels: int
    stride: int
    min_size: int
    size_divisor: int = 1
    layers: tuple[str, ...] = ()
    supports_grad_checkpointing: bool = False
    licence: str = ""
    interpolation: Interpolation = "bilinear"
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False  # of activations: less memory in training, more time
        self.compiling = False  # by torch.compile, what is computed in training
        self.projection: nn.Module = nn.Identity()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the per-channel mean and standard deviation of images in 0..1."""
        self.mean.copy_(torch.tensor(mean).view(3, 1, 1))
        self.std.copy_(torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Maps of images, projected where the backbone is told to.

        Args:
            images: (batch, 3, height, width), RGB, uint8 in 0..255 or floating point in 0..1.

        Returns:
            (batch, channels, height // stride, width // stride).

        Raises:
            ValueError: images of another shape, too small, or of sides that are no multiple.
        """
        projected: Tensor = self.projection(self.unprojected(images))
        return projected

    def unprojected(self, images: Tensor) -> Tensor:
        """As `forward`, but for the projection."""
        sides = images.shape[2:]
        if images.ndim != 4 or images.shape[1] != 3 or min(sides) < self.min_size:
            raise ValueError(
                "expected images of shape (batch, 3, height, width) with sides of at least "
                f"{self.min_size} px, got {tuple(images.shape)}"
            )
        if any(side % self.size_divisor for side in sides):
            raise ValueError(
                f"expected sides that are multiples of {self.size_divisor} px, got {tuple(sides)}"
            )
        x = images.to(self.mean.dtype)
        if not images.is_floating_point():
            x = x / 255
        maps = self._compiled if self.compiling and torch.is_grad_enabled() else self.forward_features
        return maps((x - self.mean) / self.std)

    @cached_property
    def _compiled(self) -> Callable[[Tensor], Tensor]:
        return torch.compile(self.forward_features)

    def project(self, channels: int) -> None:
        """Give the maps this many channels, by a 1 × 1 convolution after all else: at first the first.

        Raises:
            UserError: that is more than they have, or none.
        """
        if type(channels) is not int or not 0 < channels <= self.channels:
            raise UserError(f"model.project={channels}: a whole number from 1 to {self.channels}")
        # Without a draw, so that a seed gives the other weights that it always gave.
        convolution: nn.Conv2d = skip_init(nn.Conv2d, self.channels, channels, 1, bias=False)
        nn.init.dirac_(convolution.weight)
        self.projection = convolution
        self.channels = channels

    def initialise(self) -> None:
        """Draw weights to train from without any that are trained; as the layers come, by default."""

    def published(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Trained weights by the names in this module.

        Args:
            tensors: of a file, under the names that the authors of the network gave them; None: of the
                place where they are published.

        Raises:
            UserError: they are those of another network, or cannot be had.
        """
        if tensors is None:
            raise UserError("model.weights=pretrained is for the backbone timm: give a name, or a file")
        return dict(tensors)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images → maps, as `forward`."""
        raise NotImplementedError

    def unfreeze_from(self, name: str | None) -> None:
        """Train the layers from `name` (one of `layers`) up, or all of them (None)."""
        raise NotImplementedError
