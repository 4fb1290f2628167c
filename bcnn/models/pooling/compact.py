"""Compact bilinear pooling: a random sketch of the pooled matrix, of some thousand entries.

A tensor sketch sends the product of channels i and j to entry h(i) + k(j) (modulo the width) with sign
s(i)·t(j), with h, k, s, t drawn once. Inner products of sketches are those of the pooled matrices, up
to noise. A sketch is linear in the matrix, so the pooled matrix is sketched once, without a Fourier
transform of every location's features.

Source: Gao et al., "Compact Bilinear Pooling", CVPR 2016.
"""

import torch
from torch import Tensor

from bcnn.models.pooling.bilinear import ROOTS, Bilinear


class Compact(Bilinear):
    """A sketch of `width` entries of the pooled matrix, and a root (of `ROOTS`) of its entries."""

    hashes: Tensor  # (2, channels): h and k, drawn with `seed`, saved with the weights
    signs: Tensor  # (2, channels): s and t, likewise

    def __init__(
        self, channels: int, width: int = 8192, root: str | None = "signed", seed: int = 0
    ) -> None:
        super().__init__(channels, root)
        self.width = width
        generator = torch.Generator().manual_seed(seed)
        hashes = torch.randint(width, (2, channels), generator=generator, device="cpu")
        signs = torch.randint(2, (2, channels), generator=generator, device="cpu") * 2.0 - 1
        self.register_buffer("hashes", hashes)
        self.register_buffer("signs", signs)

    def pool(self, maps: Tensor, mass: Tensor | None = None) -> Tensor:
        matrix = self.matrix(maps, mass)
        entries = (matrix * (self.signs[0, :, None] * self.signs[1]).to(matrix.dtype)).flatten(1)
        index = ((self.hashes[0, :, None] + self.hashes[1]) % self.width).flatten()
        sketch = entries.new_zeros(entries.shape[0], self.width)
        return ROOTS[self.root](sketch.scatter_add(1, index.expand_as(entries), entries))
