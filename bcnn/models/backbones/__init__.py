"""Backbones: normalised images → feature maps."""

from collections.abc import Callable
from typing import Any

from bcnn.models.backbones.base import Backbone
from bcnn.models.backbones.timm import Timm
from bcnn.models.backbones.vgg16 import VGG16
from bcnn.utils.errors import UserError

# By the name in a configuration and in a checkpoint. Add your own before you train or load a model.
BACKBONES: dict[str, Callable[..., Backbone]] = {"vgg16": VGG16, "timm": Timm}


def make_backbone(name: str, project: int | None = None, **options: Any) -> Backbone:
    """Return a backbone by a key of `BACKBONES` and its class's arguments, projected if `project`."""
    if name not in BACKBONES:
        raise UserError(f"there is no backbone {name}: choose from {', '.join(BACKBONES)}")
    backbone = BACKBONES[name](**options)
    if project is not None:
        backbone.project(project)
    return backbone.eval()
