"""State dicts of the two-script original and of HaoMood's bilinear-cnn, in and out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bcnn.models.backbones.vgg16 import normalization_of
from bcnn.models.bilinear_cnn import BCNN, DEFAULT, PREPROCESSING
from bcnn.models.pooling.bilinear import pack, unpack
from bcnn.utils.errors import UserError

CHANNELS = 512  # of VGG-16's relu5_3
CLASSIFIERS = {"classifiers.0": "signed", "fc": "plain"}  # with the root that each is trained on


def is_original(tensors: dict[str, Tensor]) -> bool:
    """Return whether a state dict has VGG's features and one of these classifiers."""
    return "features.0.weight" in tensors and any(f"{name}.weight" in tensors for name in CLASSIFIERS)


def from_original(
    tensors: dict[str, Tensor],
    path: str | Path,
    classes: list[str] | None = None,
    normalization: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of a `BCNN` with the same logits, and its description; see `load_model`."""
    name = next(name for name in CLASSIFIERS if f"{name}.weight" in tensors)
    weight = tensors[f"{name}.weight"]
    if weight.ndim != 2 or weight.shape[1] != CHANNELS**2 or not weight.is_floating_point():
        raise UserError(f"{path}: {name}.weight is not of floating point on {CHANNELS**2} inputs")
    if classes and len(classes) != len(weight):
        raise UserError(
            f"{path} was trained on {len(weight)} classes, the images have {len(classes)}: train "
            "stage=last on these images first"
        )
    state = {f"backbone.{key}": t for key, t in tensors.items() if key.startswith("features.")}
    state["backbone.mean"], state["backbone.std"] = normalization_of(normalization or "imagenet")
    state["head.weight"] = pack(weight.float().view(-1, CHANNELS, CHANNELS))
    state["head.bias"] = tensors.get(f"{name}.bias", torch.zeros(len(weight)))
    state["head.mean"] = torch.zeros(state["head.weight"].shape[1])
    return state, {
        "backbone": DEFAULT["backbone"],
        "pooling": {"name": "bilinear", "root": CLASSIFIERS[name]},
        "project": None,
        "classes": classes or [str(k) for k in range(len(weight))],
        "preprocessing": asdict(PREPROCESSING),
        "split": None,
        "calibration": None,
        "taxonomy": None,
        "assumed": f"{path} has no preprocessing: {PREPROCESSING} is assumed"
        + ("" if classes else ", and numbers as the names of the classes"),
    }


def to_original(model: BCNN) -> dict[str, Tensor]:
    """Return the model's state under the original's names, with the classifier 262,144 wide.

    The original normalises images as torchvision's IMAGENET1K_V1. Another normalisation is folded into
    the first convolution, exactly but for the outermost pixels: their padding is zero under either.
    """
    chosen = {**model.chosen, "pooling": {"root": "signed", **model.chosen["pooling"]}}
    if chosen != {**DEFAULT, "pooling": {"name": "bilinear", "root": "signed"}, "project": None}:
        raise UserError(
            "the original's layout is for vgg16 with bilinear pooling and signed roots alone"
        )
    backbone, head = model.backbone, model.head
    state = {key: value for key, value in backbone.state_dict().items() if key.startswith("features.")}
    mean, std = (part.to(backbone.mean) for part in normalization_of("imagenet"))
    first = state["features.0.weight"]
    shift = (first * (mean - backbone.mean) / backbone.std).sum((1, 2, 3))
    state["features.0.weight"] = first * (std / backbone.std)
    state["features.0.bias"] = state["features.0.bias"] + shift
    state["classifiers.0.weight"] = unpack(head.weight.detach()).flatten(1)
    state["classifiers.0.bias"] = (head.bias - head.weight @ head.mean).detach()
    return state
