"""Which locations of an image made a logit: an exact decomposition, for every second-order pooling.

Give every location a mass m_p, how much it counts in the pooling; it is 1. Descriptors r before
normalisation are homogeneous in the masses: r(c·m) = c^degree · r(m). By Euler's theorem, for any
weights w,

    Σ_p ∂(w·r)/∂m_p = degree · w·r      at m = 1,

so ∂(w·r)/∂m_p / degree is the share of location p in w·r. A logit is w·r/‖r‖ + constant, the constant
being the bias less the product of w with the head's mean. The norm is held fixed, and the constant is
divided as the squared norm is, since r·r/‖r‖² = 1. One vector-Jacobian product through the pooling,
with the cotangent w/‖r‖ + constant · r/‖r‖², gives all shares. They sum to the logit.

A constant under a root belongs to no location: its part of the logit, next to nothing for the signed
root, is spread evenly. All-zero maps have zero shares.
"""

import torch
from torch import Tensor

from bcnn.models.bilinear_cnn import BCNN


def evidence(model: BCNN, images: Tensor, target: Tensor, against: Tensor | None = None) -> Tensor:
    """Return each location's share of a logit, or of the difference of two: (batch, h, w).

    Each image's shares sum to logits[target] - logits[against], in float32 at least, with classes
    `target` and `against` (batch,); locations above zero are evidence for `target`.
    """
    with torch.no_grad():
        maps = model.backbone(images)
    return shares(model, maps, target, against)


def shares(model: BCNN, maps: Tensor, target: Tensor, against: Tensor | None = None) -> Tensor:
    """Return `evidence` from maps (batch, channels, h, w) → (batch, h, w)."""
    no_autocast = torch.autocast(maps.device.type, enabled=False)
    # Tensors made in inference mode take no part in gradients; their copies do.
    with torch.inference_mode(False), torch.enable_grad(), no_autocast:
        maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32)).clone()
        weight, constant = model.head.linear(target)
        if against is not None:
            other_weight, other_constant = model.head.linear(against)
            weight, constant = weight - other_weight, constant - other_constant
        weight, constant = (part.detach().to(maps.dtype) for part in (weight, constant))
        mass = maps.new_ones(len(maps), maps[0, 0].numel(), requires_grad=True)
        pooled = model.pooling.pool(maps, mass)
        r = pooled.detach()
        norm = r.norm(dim=1, keepdim=True).clamp_min(1e-12)
        cotangent = weight / norm + constant[:, None] * r / norm**2
        (gradient,) = torch.autograd.grad(pooled, mass, cotangent)
        total = gradient / model.pooling.degree
        logit = (weight * r).sum(dim=1) / norm[:, 0] + constant
        rest = (logit - total.sum(dim=1)) / total.shape[1]
        return (total + (rest * r.any(dim=1))[:, None]).unflatten(1, maps.shape[2:])
