"""The matrix square root of the pooled matrix, and other powers: exact, by eigendecomposition.

With B = U·diag(s)·Vᵀ the features over the root of their number, the pooled matrix is M = B·Bᵀ =
U·diag(λ)·Uᵀ, λ = s², and its power U·diag(λ^α)·Uᵀ. Autograd through an eigendecomposition divides by
differences of eigenvalues, and gives NaN where they repeat; in the gradient of a power these cancel.
With G the gradient of the result, H = UᵀGU, and D_ij = (λ_i^α - λ_j^α)/(λ_i - λ_j), for the root
1/(s_i + s_j), the gradient of B is

    2 · (U·(H∘D)·diag(s) + (G·U - U·H)·diag(s^(2α-1))) · Vᵀ,

bounded for α = ½, however small s is. Directions with s = 0 have no gradient.

Sources: Lin & Maji, "Improved Bilinear Pooling with CNNs", BMVC 2017; Ionescu et al., "Matrix
Backpropagation for Deep Networks with Structured Layers", ICCV 2015.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bcnn.models.pooling.bilinear import Bilinear, weighted_features
from bcnn.models.pooling.newton_schulz import NewtonSchulz
from bcnn.utils.errors import UserError

SMALLEST = 1e-7  # relative to the largest s; less is rounding


class Sqrt(Bilinear):
    """The pooled matrix's power α, over 0 and up to 1, and a root of its entries.

    With `centred` the matrix is the covariance of the features in place of their second moment.
    """

    def __init__(
        self, channels: int, centred: bool = False, root: str | None = None, power: float = 0.5
    ) -> None:
        if not isinstance(power, int | float) or not 0 < power <= 1:
            raise UserError(f"model.pooling.power={power}: a number over 0 and up to 1")
        super().__init__(channels, root)
        self.centred = centred
        self.power = power
        self.degree *= power

    def matrix(self, maps: Tensor, mass: Tensor | None = None) -> Tensor:
        return _Power.apply(weighted_features(maps, mass, self.centred), self.power)

    def exportable(self) -> NewtonSchulz:
        if self.power != 0.5:
            raise UserError(f"ONNX has no form of the pooling sqrt with power={self.power}: use pt2")
        return NewtonSchulz(self.channels, self.centred, self.root)


class _Power(torch.autograd.Function):
    """B (batch, channels, locations), power α → (B·Bᵀ)^α (batch, channels, channels)."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, power: float) -> Tensor:
        u, s, v = (part.to(b) for part in _svd(b))
        ctx.save_for_backward(u, s, v)
        ctx.power = power
        return u * s[:, None] ** (2 * power) @ u.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        u, s, v = ctx.saved_tensors
        g = (gradient + gradient.mT) / 2 @ u
        h = u.mT @ g
        log = 2 * s.log()
        larger = torch.maximum(log[:, :, None], log[:, None])
        gap = (log[:, :, None] - log[:, None]).abs().neg()
        ratio = torch.where(gap < 0, (ctx.power * gap).expm1() / gap.expm1(), ctx.power)
        inside = h * ratio * ((ctx.power - 1) * larger).exp()
        s = s[:, None]
        of_b = u @ inside * s + (g - u @ h) * s ** (2 * ctx.power - 1)
        return 2 * of_b @ v.mT, None


def _svd(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, s, V of b (batch, m, n) in float64, from the smaller of bᵀb and b·bᵀ.

    In float32, LAPACK fails to converge on matrices with many eigenvalues of zero. Where s is zero or
    rounding it is replaced by 1, and the columns of U and V by zeros.
    """
    if isinstance(b.shape[2], int) and b.shape[1] < b.shape[2]:  # an export of any n has no integer
        v, s, u = _svd(b.mT)
        return u, s, v
    b = b.to("cpu" if b.device.type == "mps" else b.device, torch.float64)  # mps has no float64
    gram = b.mT @ b
    # Maps that are not finite give descriptors that are not, in place of an error of LAPACK.
    v = torch.linalg.eigh(gram.where(gram.isfinite(), 0)).eigenvectors
    u = b @ v
    s = u.norm(dim=1)
    none = s <= SMALLEST * s.amax(dim=1, keepdim=True)
    s = s.masked_fill(none, 1)
    return (u / s[:, None]).masked_fill(none[:, None], 0), s, v.masked_fill(none[:, None], 0)
