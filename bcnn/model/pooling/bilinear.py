"""Bilinear pooling and its normalisations: pure functions, tensors in and tensors out.

An image's *descriptor* is its pooled, square-rooted and L2-normalised feature matrix. With symmetric
features that matrix is symmetric, so only the upper triangle is kept ("packed"), the entries off the
diagonal scaled by √2. This is an orthonormal change of coordinates: inner products, hence norms,
logits and the trajectory of SGD with momentum and weight decay, stay as they are.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT_EPS = 1e-10  # under the square root, as in the source


def packed_size(channels: int) -> int:
    """Entries in the upper triangle of a `channels` × `channels` matrix (512 → 131,328)."""
    return channels * (channels + 1) // 2


def bilinear_pool(features: Tensor) -> Tensor:
    """Mean over the locations of the outer product of the features with themselves.

    Args:
        features: (batch, channels, height, width).

    Returns:
        (batch, channels, channels), in float32 at least: squares of float16 activations overflow.

    Source: Lin et al., "Bilinear CNN Models for Fine-grained Visual Recognition", ICCV 2015, §3.
    """
    with torch.autocast(features.device.type, enabled=False):
        x = features.flatten(2).to(torch.promote_types(features.dtype, torch.float32))
        return (x @ x.mT).div_(x.shape[2])


def signed_sqrt(x: Tensor) -> Tensor:
    """sign(x)·√(|x| + 1e-10), elementwise (Lin et al. 2015, §3.1; the constant is the source's)."""
    return x.sign() * (x.abs() + ROOT_EPS).sqrt()


def plain_sqrt(x: Tensor) -> Tensor:
    """√(x + 1e-5) of x ≥ 0, elementwise, as HaoMood's bilinear-cnn has it: of 0 it is not 0."""
    return (x + 1e-5).sqrt()


ROOTS = {"signed": signed_sqrt, "plain": plain_sqrt}


def bilinear_descriptor(features: Tensor, root: str = "signed") -> Tensor:
    """Pool, keep the upper triangle, take square roots, and L2-normalise.

    Args:
        features: (batch, channels, height, width), of any floating type, under any autocast.
        root: one of `ROOTS`.

    Returns:
        (batch, channels·(channels + 1)/2), rows of unit length (all-zero features: a zero row), in
        float32 at least.
    """
    pooled = bilinear_pool(features)
    with torch.autocast(features.device.type, enabled=False):
        index, scale = _upper_triangle(pooled)
        return F.normalize(ROOTS[root](pooled.flatten(1).index_select(1, index)) * scale)


def pack(matrix: Tensor) -> Tensor:
    """Coordinates of each matrix's symmetric part: (n, c, c) → (n, c·(c + 1)/2).

    Diagonal entries stay, pairs off it become (m_ij + m_ji)/√2. Packing the weights of a linear layer
    on the full matrix gives those of the equivalent layer on packed descriptors.
    """
    symmetric = (matrix + matrix.mT) / 2
    index, scale = _upper_triangle(matrix)
    return symmetric.flatten(1).index_select(1, index) * scale


def unpack(packed: Tensor) -> Tensor:
    """The symmetric matrices that pack to these rows: (n, c·(c + 1)/2) → (n, c, c)."""
    channels = (math.isqrt(8 * packed.shape[1] + 1) - 1) // 2
    matrix = packed.new_zeros(len(packed), channels, channels)
    index, scale = _upper_triangle(matrix)
    matrix.flatten(1).index_copy_(1, index, packed / scale)
    return matrix + matrix.triu(1).mT


def _upper_triangle(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices of the upper triangle, and the scale of each entry: 1 on the diagonal, √2 off it."""
    channels = matrix.shape[-1]
    row, column = torch.triu_indices(channels, channels, device=matrix.device)
    scale = matrix.new_full(row.shape, math.sqrt(2)).masked_fill_(row == column, 1)
    return row * channels + column, scale
