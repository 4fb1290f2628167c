"""The matrix square root by products of matrices alone, as ONNX can compute it.

The Newton–Schulz iteration Y ← YT, Z ← TZ, T = (3I - ZY)/2, from Y = M/tr M and Z = I, makes each root
√λ of an eigenvalue grow up to 1.5-fold in a step, to 1. Then Y is the root of M/tr M, and Z that of its
inverse. Pooled matrices have many small eigenvalues, which the usual 5 steps leave too small. Here each
step is scaled for the whole interval [`SMALLEST`, 1] of roots: they grow up to 2.6-fold, and 10 steps
are enough.

Roots below `SMALLEST` times that of the trace come out too small, by no more than themselves. More
steps would diverge in float32: on eigenvalues of zero, of which a matrix of fewer locations than
channels has many, Z and its rounding error grow to 1/`SMALLEST`.

Sources: Li et al., "Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix
Square Root Normalization", CVPR 2018; the scaling, Chen & Chow, "A Stable Scaling of Newton-Schulz for
Improving the Sign Function Computation of a Hermitian Matrix", 2014.
"""

import torch
from torch import Tensor

from bcnn.models.pooling.bilinear import Bilinear, weighted_features

SMALLEST = 1e-3


class NewtonSchulz(Bilinear):
    """`Sqrt` by iteration: in float32 within 1e-3, or 1e-2 where an image's locations are all alike."""

    def __init__(self, channels: int, centred: bool = False, root: str | None = None) -> None:
        super().__init__(channels, root)
        self.centred = centred
        self.degree *= 0.5

    def matrix(self, maps: Tensor, mass: Tensor | None = None) -> Tensor:
        b = weighted_features(maps, mass, self.centred)
        # An export of any number of locations has no integer for it.
        thin = isinstance(b.shape[2], int) and b.shape[2] < b.shape[1]
        gram = b.mT @ b if thin else b @ b.mT
        # The trace keeps the result homogeneous; clamped, its root has a finite gradient at zero.
        trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None].clamp_min(1e-24)
        y = gram / trace
        eye = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
        z = eye.expand_as(y)
        low = SMALLEST  # roots that began in `SMALLEST`..1 are in low..1
        while low < 1 - 1e-4:
            scale = (3 / (1 + low + low**2)) ** 0.5
            t = 1.5 * scale * eye - 0.5 * scale**3 * (z @ y)
            y, z = y @ t, t @ z
            low = scale * low * (3 - (scale * low) ** 2) / 2
        return b @ z @ b.mT * trace.rsqrt() if thin else y * trace.sqrt()
