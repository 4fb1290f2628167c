"""Networks of timm, convolutional or transformers, up to their last maps."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bcnn.models.backbones.base import Backbone
from bcnn.utils.errors import UserError


class Timm(Backbone):
    """A network of timm (Wightman, "PyTorch Image Models", 2019) with its weights' normalisation.

    Args:
        model: timm's name, as resnet50.a1_in1k; the part after the dot names published weights.
        level: index of the maps: -1 the last, -2 those of the stage before.
    """

    network: Any
    weights = ("pretrained",)

    def __init__(self, model: str, level: int = -1) -> None:
        super().__init__()
        self.model = model
        self.network = _create(model)
        published: dict[str, Any] = self.network.pretrained_cfg
        self.levels = self.network.prune_intermediate_layers([level], prune_norm=False)
        info = self.network.feature_info
        chosen = (info if isinstance(info, list) else info.info)[self.levels[-1]]
        self.channels, self.stride = chosen["num_chs"], chosen["reduction"]
        self.size_divisor = self.stride
        self.layers = tuple(dict.fromkeys(map(_layer, dict(self.network.named_parameters()))))
        with suppress(AssertionError):  # raised by networks without gradient checkpointing
            self.network.set_grad_checkpointing(True)
            self.supports_grad_checkpointing = True
        self.licence = published.get("license") or ""
        if published.get("interpolation") != "bilinear":
            self.interpolation = "bicubic"  # timm's default
        self.set_normalization(published["mean"], published["std"])
        self.eval()
        largest = published["input_size"][-1]  # which all networks take
        sides = range(2 * self.stride, largest, self.stride)
        self.min_size = next((side for side in sides if self.locations(side) >= 2), largest)

    def download(self, weights: str) -> dict[str, Tensor]:
        network = _create(self.model, pretrained=True)
        network.prune_intermediate_layers(self.levels, prune_norm=False)
        return self.convert(network.state_dict())

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors under timm's names as a state, with the normalisation of the weights."""
        state = {f"network.{name}": tensor for name, tensor in tensors.items()}
        return {**state, "mean": self.mean, "std": self.std}

    def unfreeze_from(self, name: str | None) -> None:
        first = self.layers.index(name) if name else 0
        for parameter, tensor in self.network.named_parameters():
            tensor.requires_grad_(self.layers.index(_layer(parameter)) >= first)

    def forward_features(self, x: Tensor) -> Tensor:
        self.network.set_grad_checkpointing(self.grad_checkpointing)
        with _constant_padding() if torch.compiler.is_exporting() else nullcontext():
            return self.network.forward_intermediates(
                x, indices=self.levels, norm=True, output_fmt="NCHW", intermediates_only=True
            )[-1]


def _create(model: str, **options: Any) -> Any:
    """Create a network that takes images of any size; raise UserError where timm has none.

    A name like "hf-hub:…" in a checkpoint would download a stranger's configuration, and unknown
    weights would silently have the default normalisation.
    """
    import timm

    name, _, tag = model.partition(".")
    if not timm.is_model(name):
        raise UserError(f"timm has no network {model}: see timm.list_models()")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise UserError(f"timm has no weights {tag} of {name}: choose from {', '.join(tags)}")
    try:
        return timm.create_model(model, dynamic_img_size=True, **options)
    except TypeError:  # most have no such option, and need none
        return timm.create_model(model, **options)


def _constant_padding() -> AbstractContextManager[Any]:
    """Have timm pad as TensorFlow does without asking for the sides, which are multiples of the stride.

    Where sides are unknown, torch.export does not come to an end with timm's formula.
    """

    def padding(side: int, kernel_size: int, stride: int, dilation: int) -> int:
        return max((kernel_size - 1) * dilation + 1 - stride, 0)

    return patch("timm.layers.padding.get_same_padding", padding)


def _layer(parameter: str) -> str:
    """Return the part of a network with a parameter: its first name, and the number of a block."""
    first, second, *_ = [*parameter.split("."), ""]
    return f"{first}.{second}" if second.isdigit() else first
