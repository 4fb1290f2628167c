"""Second-order poolings: maps of an image in, one row out. A file each; its name is the choice."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pooling(nn.Module):
    """What the network asks of its pooling.

    A subclass takes the number of channels first, says `width`, the entries of a row, and implements
    `pool`.
    """

    width: int
    degree: float  # pool(maps, c · mass) = c^degree · pool(maps, mass), up to constants under a root

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def pool(self, maps: Tensor, mass: Tensor | None = None) -> Tensor:
        """Rows before they are made of unit length.

        Args:
            maps: (batch, channels, h, w), of any floating type.
            mass: (batch, h · w), how much each location counts; None: 1.

        Returns:
            (batch, width), in float32 at least.
        """
        raise NotImplementedError

    def exportable(self) -> "Pooling":
        """A pooling of the same rows, within a bound that it states, of what ONNX can compute.

        Raises:
            UserError: there is none.
        """
        return self

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (batch, channels, h, w), under any autocast → rows (batch, width) of unit length.

        In float32 at least: squares of float16 activations overflow. All-zero maps give a zero row.
        """
        with torch.autocast(maps.device.type, enabled=False):
            return F.normalize(self.pool(maps))
