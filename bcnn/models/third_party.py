"""The state dicts of others: a classifier on the whole matrix, of the original and of bilinear-cnn."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import VGG16_Weights

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.pooling.bilinear import pack, unpack
from bcnn.utils.errors import UserError

CHANNELS = 512  # of VGG-16's relu5_3

# Their names for the classifier, and the square root that they train it on.
WIDE = {"classifiers.0": "signed", "fc": "plain"}


def is_original(tensors: dict[str, Tensor]) -> bool:
    """Whether a state dict has VGG's features and one of their classifiers."""
    return "features.0.weight" in tensors and any(f"{name}.weight" in tensors for name in WIDE)


def from_original(
    tensors: dict[str, Tensor], path: str | Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict of theirs under this project's names, packed at the same logits, and what it is.

    Raises:
        UserError: the classifier is not of numbers on a matrix of 512 × 512.
    """
    name = next(name for name in WIDE if f"{name}.weight" in tensors)
    weight = tensors[f"{name}.weight"]
    if weight.ndim != 2 or weight.shape[1] != CHANNELS**2:
        raise UserError(
            f"{path}: {name}.weight has shape {tuple(weight.shape)}, expected "
            f"(classes, {CHANNELS**2}): it was trained with another pooling"
        )
    if not weight.is_floating_point():
        raise UserError(f"{path}: {name}.weight is of {weight.dtype}, expected floating point")
    state = {key: value for key, value in tensors.items() if key.startswith("features.")}
    state["head.weight"] = pack(weight.float().view(-1, CHANNELS, CHANNELS))
    state["head.bias"] = tensors.get(f"{name}.bias", torch.zeros(len(weight)))
    about = {
        "pooling": {"name": "bilinear", "root": WIDE[name]},
        "weights": VGG16_Weights.IMAGENET1K_V1.name,  # which both start from
    }
    return state, about


def to_original(model: BCNN) -> dict[str, Tensor]:
    """The model under the original's key names, its classifier in the 262,144-wide layout.

    The original normalises images as torchvision's IMAGENET1K_V1 does. For a model that wants them
    otherwise the first convolution makes up the difference, which is exact but at the outermost
    pixels: there it reads padding, which is zero under either.

    Raises:
        UserError: the model is of another backbone or pooling, or projects its maps.
    """
    plain = model.chosen["backbone"] == {"name": "vgg16"} and "project" not in model.chosen
    pooling = {"root": "signed"} | model.chosen["pooling"]
    if not plain or pooling != {"name": "bilinear", "root": "signed"}:
        raise UserError(
            "the original's layout is for backbone vgg16 with pooling bilinear and signed roots alone"
        )
    backbone, head = model.backbone, model.head
    state = {key: value for key, value in backbone.state_dict().items() if key.startswith("features.")}
    preset = VGG16_Weights.IMAGENET1K_V1.transforms()
    mean, std = (torch.tensor(v).to(backbone.mean).view(3, 1, 1) for v in (preset.mean, preset.std))
    first = state["features.0.weight"]
    shift = (first * (mean - backbone.mean) / backbone.std).sum((1, 2, 3))
    state["features.0.weight"] = first * (std / backbone.std)
    state["features.0.bias"] = state["features.0.bias"] + shift
    weight, bias = head.weight.detach(), head.bias.detach()
    state["classifiers.0.weight"] = unpack(weight).flatten(1)
    state["classifiers.0.bias"] = bias - weight @ head.mean
    return state
