"""γ-democratic pooling: locations are weighted so that none dominates.

In a plain sum, features that are large, or frequent in the image, dominate. A location's contribution
is its inner product with the pooled matrix, α_i·Σ_j α_j·⟨x_i, x_j⟩². Damped Sinkhorn steps find weights
α that make it the γ-th power of the contribution without weights: γ = 1 changes nothing, γ = 0 makes
all contributions equal.

Source: Lin, Maji & Koniusz, "Second-order Democratic Aggregation", ECCV 2018.
"""

import torch
from torch import Tensor

from bcnn.models.pooling.bilinear import Bilinear
from bcnn.utils.errors import UserError

STEPS = 10  # the paper's, as is their damping by a square root
SILENT = 1e-16  # a location of a smaller contribution is not weighted


class Democratic(Bilinear):
    """The pooled matrix of weighted locations, with γ from 0 to 1, and a root of its entries."""

    def __init__(self, channels: int, gamma: float = 0.5, root: str | None = "signed") -> None:
        if not isinstance(gamma, int | float) or not 0 <= gamma <= 1:
            raise UserError(f"model.pooling.gamma={gamma}: a number from 0 to 1")
        super().__init__(channels, root)
        self.gamma = gamma
        self.degree *= (1 + gamma) / 2

    def matrix(self, maps: Tensor, mass: Tensor | None = None) -> Tensor:
        x = maps.flatten(2)
        mass = x.new_ones(1, x.shape[2]) if mass is None else mass
        # A factor common to all weights does not change the descriptor: features have lengths up to 1.
        unit = x / x.detach().norm(dim=1).amax(dim=1)[:, None, None].clamp_min(1e-24)
        kernel = (unit.mT @ unit).square()
        alone = (kernel @ mass[..., None]).squeeze(-1)
        silent = alone <= SILENT
        target = alone.masked_fill(silent, 1) ** self.gamma
        weights = torch.ones_like(alone)  # α; a mass stands for so many copies of its location
        for _ in range(STEPS):
            others = (kernel @ (mass * weights)[..., None]).squeeze(-1).masked_fill(silent, 1)
            weights = (weights * target / others).sqrt()
        return super().matrix(maps, mass * weights)
