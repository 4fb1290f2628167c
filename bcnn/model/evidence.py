"""Which places of an image spoke for a class: the exact reading that a bilinear network allows.

The pooled matrix is a sum over the locations, G = (1/N) Σ_p x_p x_pᵀ, so whatever is linear in it falls
apart into what each location brings. The descriptor d is G's signed root over its norm. An entry of d
is shared out among the locations as that entry of G is, d_ij · x_pi x_pj / (N G_ij), and so is the
product of d with a class's weights W. What is constant in a logit, the bias less the weights' product
with the centering mean, is shared out as the squared norm is, 1 = Σ_ij |G_ij| / Σ_ij |G_ij|, and so is
what the constant under the root brings. The shares then sum to the logit.

How this stands to the gradient A = ∂logit/∂G: the norm makes the logit the same for G and 2G, so
⟨A, G⟩ = 0 (Euler) and x_pᵀ A x_p / N alone sums to nothing. With n_p the location's part of the squared
norm, a location's share is

    n_p · logit + 2 x_pᵀ A x_p / N:

its due part of the whole, and how far it moved the logit from there; the 2 undoes the square root's
degree of ½. For features ≥ 0, as relu5_3's are.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bcnn.model.network import BCNN
from bcnn.model.pooling.bilinear import ROOT_EPS, ROOTS, bilinear_pool, unpack

SMALLEST = math.sqrt(ROOT_EPS)  # that a root is where it is not 0


@torch.no_grad()
def evidence(model: BCNN, images: Tensor, target: Tensor, against: Tensor | None = None) -> Tensor:
    """Each location's share of a logit, or of the difference of two.

    Args:
        images: (batch, 3, height, width), as the model takes them.
        target: (batch,), the class of each image whose logit is shared out.
        against: (batch,), the class whose logit is taken off: "why this and not that".

    Returns:
        (batch, height // 16, width // 16), in float32 at least. Each map sums to
        logits[target] - logits[against]; places above zero spoke for `target`. All-zero features have
        zero shares.
    """
    return shares(model, model.feature_maps(images), target, against)


@torch.no_grad()
def shares(model: BCNN, maps: Tensor, target: Tensor, against: Tensor | None = None) -> Tensor:
    """As `evidence`, from maps (batch, 512, h, w) → (batch, h, w): for several classes of one image."""
    with torch.autocast(maps.device.type, enabled=False):
        pooled = bilinear_pool(maps)
        weight, constant = _linear(model, target)
        if against is not None:
            other_weight, other_constant = _linear(model, against)
            weight, constant = weight - other_weight, constant - other_constant
        root = ROOTS[model.root](pooled)
        norm = root.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
        x = maps.flatten(2).to(pooled.dtype)
        matrix = unpack(weight.to(pooled.dtype)) / norm
        by_location = ((matrix / root.abs().clamp_min(SMALLEST) @ x) * x).sum(dim=1) / x.shape[2]
        logit = (matrix * root).sum(dim=(1, 2)) + constant.to(pooled.dtype)
        norm_by_location = F.normalize(x.sum(dim=1) ** 2, p=1)
        total = by_location + norm_by_location * (logit - by_location.sum(dim=1))[:, None]
        return total.unflatten(1, maps.shape[2:])


def _linear(model: BCNN, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image's class, the weights on the descriptor and what else is in the logit."""
    weight = model.classifier.weight[target]
    return weight, model.classifier.bias[target] - weight @ model.centering.mean
