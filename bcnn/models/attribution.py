"""Which places of an image spoke for a class: the exact reading that a second-order pooling allows.

Give every location a mass m_p, how much it counts in the pooling; it is 1. Pooled rows r are
homogeneous in the masses: r(c·m) = c^degree · r(m). So by Euler's theorem, for any weights w on a row,

    Σ_p ∂(w·r)/∂m_p = degree · w·r      at m = 1,

and ∂(w·r)/∂m_p / degree is location p's share of w·r. A logit is w·r/‖r‖ + constant, the constant
being the bias less the weights' product with the head's mean. The norm is held, and the constant is
shared out as the squared norm is, r·r/‖r‖² = 1. One vector-Jacobian product through the pooling, with
the cotangent w/‖r‖ + constant · r/‖r‖², gives all shares, and they sum to the logit.

A constant under a root is no location's: what it makes of a logit (next to nothing, for the signed
root) is spread evenly. All-zero maps have zero shares.
"""

import torch
from torch import Tensor

from bcnn.models.bilinear_cnn import BCNN


def evidence(model: BCNN, images: Tensor, target: Tensor, against: Tensor | None = None) -> Tensor:
    """Each location's share of a logit, or of the difference of two.

    Args:
        images: (batch, 3, height, width), as the model takes them.
        target: (batch,), the class of each image whose logit is shared out.
        against: (batch,), the class whose logit is taken off: "why this and not that".

    Returns:
        (batch, h, w) of the backbone's maps, in float32 at least. Each map sums to
        logits[target] - logits[against]; places above zero spoke for `target`.
    """
    with torch.no_grad():
        maps = model.backbone(images)
    return shares(model, maps, target, against)


def shares(model: BCNN, maps: Tensor, target: Tensor, against: Tensor | None = None) -> Tensor:
    """As `evidence`, from maps (batch, channels, h, w) → (batch, h, w)."""
    # Tensors made in inference mode take no part in gradients; their copies do.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(maps.device.type, enabled=False),
    ):
        maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32)).clone()
        weight, constant = model.head.linear(target)
        if against is not None:
            other_weight, other_constant = model.head.linear(against)
            weight, constant = weight - other_weight, constant - other_constant
        weight, constant = (part.detach().to(maps.dtype) for part in (weight, constant))
        mass = maps.new_ones(len(maps), maps[0, 0].numel(), requires_grad=True)
        rows = model.pooling.pool(maps, mass)
        r = rows.detach()
        norm = r.norm(dim=1, keepdim=True).clamp_min(1e-12)
        cotangent = weight / norm + constant[:, None] * r / norm**2
        (gradient,) = torch.autograd.grad(rows, mass, cotangent)
        total = gradient / model.pooling.degree
        logit = (weight * r).sum(dim=1) / norm[:, 0] + constant
        rest = (logit - total.sum(dim=1)) / total.shape[1]
        total = total + (rest * r.any(dim=1))[:, None]
    return total.unflatten(1, maps.shape[2:])
