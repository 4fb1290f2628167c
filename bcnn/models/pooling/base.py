"""The interface of a pooling."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pooling(nn.Module):
    """Pools the maps of an image into one descriptor.

    A subclass takes the number of channels first, sets `width` and `degree`, and implements `pool`.
    """

    width: int  # entries of a descriptor
    degree: float  # pool(maps, c · mass) = c^degree · pool(maps, mass), up to constants under a root

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def pool(self, maps: Tensor, mass: Tensor | None = None) -> Tensor:
        """Maps (batch, channels, h, w), float32 at least → descriptors before normalisation.

        `mass` (batch, h · w) is how much each location counts; None: 1.
        """
        raise NotImplementedError

    def exportable(self) -> "Pooling":
        """Return a pooling of ONNX's operators with the same descriptors, within a bound it states."""
        return self

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (batch, channels, h, w) → descriptors (batch, width) of unit length; of zeros, zeros.

        Autocast is off and float32 the least precision: squares of float16 activations overflow.
        """
        with torch.autocast(maps.device.type, enabled=False):
            return F.normalize(self.pool(maps.to(torch.promote_types(maps.dtype, torch.float32))))
