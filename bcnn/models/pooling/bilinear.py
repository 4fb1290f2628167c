"""Bilinear pooling with the signed square root.

The pooled matrix is symmetric, so only its upper triangle is kept ("packed"), with the entries off the
diagonal scaled by √2. This is an orthonormal change of coordinates: inner products do not change, nor
do norms, logits and the path of SGD with momentum and weight decay.

Source: Lin et al., "Bilinear CNN Models for Fine-grained Visual Recognition", ICCV 2015, §3.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bcnn.models.pooling.base import Pooling
from bcnn.utils.errors import UserError

ROOTS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "signed": lambda x: x.sign() * (x.abs() + 1e-10).sqrt(),  # §3.1
    "plain": lambda x: (x + 1e-5).sqrt(),  # HaoMood's, of x ≥ 0
    None: lambda x: x,
}


def packed_size(channels: int) -> int:
    """Return the number of entries of a packed matrix (512 channels → 131,328)."""
    return channels * (channels + 1) // 2


def weighted_features(maps: Tensor, mass: Tensor | None = None, centred: bool = False) -> Tensor:
    """Return B (batch, channels, locations) of which B·Bᵀ is the pooled matrix or the covariance."""
    x = maps.flatten(2)
    weight = (x.new_ones(1, x.shape[2]) if mass is None else mass)[:, None]
    if centred:
        x = x - (x * weight).sum(dim=2, keepdim=True) / weight.sum(dim=2, keepdim=True)
    return x * (weight / x.shape[2]).sqrt()


class Bilinear(Pooling):
    """The packed upper triangle of the pooled matrix, and a root (of `ROOTS`) of its entries."""

    index: Tensor

    def __init__(self, channels: int, root: str | None = "signed") -> None:
        if root not in ROOTS:
            raise UserError(f"model.pooling.root={root}: choose signed, plain or null (none)")
        super().__init__(channels)
        self.root = root
        self.width = packed_size(channels)
        self.degree = 0.5 if root else 1.0
        # A constant: not every program that runs an exported model can compute it.
        self.register_buffer("index", _upper_triangle(channels), persistent=False)

    def matrix(self, maps: Tensor, mass: Tensor | None = None) -> Tensor:
        """Return the mean of x·xᵀ over locations of features x, (batch, channels, channels)."""
        x = maps.flatten(2)
        weighted = x if mass is None else x * mass[:, None]
        return (weighted @ x.mT).div_(x.shape[2])

    def pool(self, maps: Tensor, mass: Tensor | None = None) -> Tensor:
        matrix = self.matrix(maps, mass)
        entries = matrix.flatten(1).index_select(1, self.index)
        return ROOTS[self.root](entries) * _scale(self.index, matrix)


def pack(matrix: Tensor) -> Tensor:
    """Pack the symmetric part of matrices: (n, c, c) → (n, c·(c + 1)/2).

    Diagonal entries stay, pairs off it become (m_ij + m_ji)/√2. Packing the weights of a linear layer
    on the full matrix gives those of the equivalent layer on packed descriptors.
    """
    index = _upper_triangle(matrix.shape[-1]).to(matrix.device)
    return ((matrix + matrix.mT) / 2).flatten(1).index_select(1, index) * _scale(index, matrix)


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack` for symmetric matrices: (n, c·(c + 1)/2) → (n, c, c)."""
    channels = (math.isqrt(8 * packed.shape[1] + 1) - 1) // 2
    matrix = packed.new_zeros(len(packed), channels, channels)
    index = _upper_triangle(channels).to(packed.device)
    matrix.flatten(1).index_copy_(1, index, packed / _scale(index, matrix))
    return matrix + matrix.triu(1).mT


def _upper_triangle(channels: int) -> Tensor:
    """Return flat indices of the upper triangle of a matrix (channels, channels)."""
    row, column = torch.triu_indices(channels, channels)
    return row * channels + column


def _scale(index: Tensor, matrix: Tensor) -> Tensor:
    """Return the scales of entries at flat indices: 1 on the diagonal, √2 off it."""
    on_diagonal = index % (matrix.shape[-1] + 1) == 0
    return matrix.new_full(index.shape, math.sqrt(2)).masked_fill_(on_diagonal, 1)
