"""The weights that a new backbone starts from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bcnn.data.splits import SplitRecord
from bcnn.models.backbones.vgg16 import PUBLISHED, normalization_of
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.description import is_description, record_of, understanding
from bcnn.models.state_dict import below, load_state, read_state_dict, validate_state
from bcnn.models.third_party import is_original
from bcnn.utils.errors import UserError


def initialise_backbone(model: BCNN, weights: str, normalization: str | None = None) -> None:
    """Load the weights of a new model's backbone, and set the normalisation that belongs to them.

    The weights of a checkpoint add its record of images to `model.split`.

    Args:
        weights: one of the backbone's `weights`, to download; "random", to keep the initialisation; or
            a file, under the backbone's names or its authors'.
        normalization: "imagenet" or "imagenet_features", for a file that leaves it open.
    """
    backbone = model.backbone
    if weights == "random":
        if not backbone.mean.any():  # timm's networks have theirs
            backbone.set_normalization(*normalization_of("imagenet"))
        return
    if weights in backbone.weights:
        tensors = backbone.download(weights)
    elif Path(weights).expanduser().exists():
        tensors, about = read_state_dict(weights)
        if record := _record(tensors, about, weights):
            model.split = model.split.after(record) if model.split else record
        tensors = _from_file(model, tensors, about, weights, normalization)
    else:
        known = ", ".join([*backbone.weights, "random"])
        raise UserError(f"model.weights={weights}: no such file; this backbone has {known}")
    own = backbone.state_dict()
    expected = {key: own[key] for key in own if not key.startswith("projection.")}
    validate_state(expected, tensors, weights)
    load_state(backbone, {key: tensors[key] for key in expected}, weights)


def _record(tensors: dict[str, Tensor], about: Mapping[str, Any], path: str) -> SplitRecord | None:
    """Return the record of images of a whole network, empty if it has none; None for features alone."""
    if is_description(about):
        with understanding(path):
            return record_of(about) or SplitRecord()
    return SplitRecord() if is_original(tensors) else None


def _from_file(
    model: BCNN,
    tensors: dict[str, Tensor],
    about: Mapping[str, Any],
    path: str,
    normalization: str | None,
) -> dict[str, Tensor]:
    """Return the state of the backbone in a file, with the mean and std of its weights."""
    if is_original(tensors):
        normalization = normalization or "imagenet"
    tensors = below("backbone.", tensors)
    if model.backbone.state_dict().keys().isdisjoint(tensors):
        tensors = model.backbone.convert(tensors)
    if {"mean", "std"} <= tensors.keys():
        return tensors
    text = " ".join(map(str, [Path(path).name, *about.values()]))
    for key, published in PUBLISHED.items():
        if published.name in text or Path(published.url).name in text:
            normalization = key
    if normalization not in PUBLISHED:
        raise UserError(
            f"{path} does not name the normalisation of its images: set model.normalization to "
            "imagenet (mean 0.485…, std 0.229…) or imagenet_features (mean 0.482…, std 1/255)"
        )
    mean, std = normalization_of(normalization)
    return {**tensors, "mean": mean, "std": std}
