"""The network: a backbone, a second-order pooling, a linear head."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bcnn.data.batches import Images, in_order, stack_images, stacks
from bcnn.data.image_io import load_image, upright_rgb
from bcnn.data.splits import SplitRecord
from bcnn.data.taxonomy import Taxonomy
from bcnn.data.transforms import Preprocessing
from bcnn.models.backbones import make_backbone
from bcnn.models.calibration import Calibration
from bcnn.models.head import Head
from bcnn.models.pooling import make_pooling
from bcnn.utils.device import autocast

ImageLike = str | Path | Image.Image | np.ndarray

PREPROCESSING = Preprocessing()
DEFAULT = {"backbone": {"name": "vgg16"}, "pooling": {"name": "bilinear"}}
ROUNDING = 1e-3  # by which pixels in 0..1 may be out of range


class BCNN(nn.Module):
    """Bilinear CNN; by default the symmetric one on VGG-16 (Lin et al., ICCV 2015).

    The model normalises images itself.

    Args:
        classes: names, in the order of the logits.
        preprocessing: how an image becomes the input of training and evaluation; its `divisor` and
            `min_size` become those of the backbone.
        backbone: name and options for `make_backbone`; None: VGG-16.
        pooling: name and options for `make_pooling`; None: bilinear.
        project: channels to project the maps to; None: no projection.
        split: the images that it is trained, validated and tested on, where known.
        calibration: numbers of axes and images for `Calibration`; None: the model is not calibrated.
        taxonomy: names of the classes on the levels above them; None: there are no such levels.
    """

    assumed = ""  # of a model from a file without a description: a sentence on what was assumed

    def __init__(
        self,
        classes: Sequence[str],
        preprocessing: Preprocessing = PREPROCESSING,
        backbone: Mapping[str, Any] | None = None,
        pooling: Mapping[str, Any] | None = None,
        project: int | None = None,
        split: SplitRecord | None = None,
        calibration: Mapping[str, int] | None = None,
        taxonomy: Taxonomy | None = None,
    ) -> None:
        super().__init__()
        self.classes = list(classes)
        self.split = split
        self.taxonomy = taxonomy
        backbone, pooling = dict(backbone or DEFAULT["backbone"]), dict(pooling or DEFAULT["pooling"])
        self.chosen: dict[str, Any] = {"backbone": backbone, "pooling": pooling, "project": project}
        self.backbone = make_backbone(**backbone, project=project)
        divisor = math.lcm(self.backbone.stride, self.backbone.size_divisor)
        self.preprocessing = replace(preprocessing, divisor=divisor, min_size=self.backbone.min_size)
        self.pooling = make_pooling(self.backbone.channels, **pooling)
        self.head = Head(self.pooling.width, len(self.classes))
        self.calibration = Calibration(**calibration) if calibration else None
        self.backbone.initialise()  # after the head, whose draws come first for a seed
        self.to(memory_format=torch.channels_last)

    def description(self) -> dict[str, Any]:
        """Return what `build` makes the same network from, in names, numbers and lists."""
        return {
            **self.chosen,
            "preprocessing": asdict(self.preprocessing),
            "classes": self.classes,
            "split": self.split.plain() if self.split else None,
            "calibration": self.calibration.sizes() if self.calibration else None,
            "taxonomy": self.taxonomy,
        }

    def with_pooling(self, pooling: Mapping[str, Any], project: int | None = None) -> "BCNN":
        """Return a network with another pooling and a new head, whose layers below share the weights.

        This network has no projection; the other one projects maps to `project` channels.
        """
        tensors = (*self.backbone.parameters(), *self.backbone.buffers())
        other = copy.deepcopy(self, {id(tensor): tensor for tensor in tensors})
        if project is not None:
            other.backbone.project(project)
        other.pooling = make_pooling(other.backbone.channels, **pooling)
        other.chosen = {**self.chosen, "pooling": dict(pooling), "project": project}
        other.head, other.calibration = Head(other.pooling.width, len(self.classes)), None
        return other

    def at_level(self, level: int) -> "BCNN":
        """Return an untrained network on maps of timm's network before those of this one.

        It has a copy of the weights up to there, no projection and the same pooling.
        """
        chosen = {**self.chosen, "backbone": {**self.chosen["backbone"], "level": level}}
        other = BCNN(
            self.classes, self.preprocessing, **chosen, split=self.split, taxonomy=self.taxonomy
        )
        state = self.backbone.state_dict()
        other.backbone.load_state_dict({name: state[name] for name in other.backbone.state_dict()})
        return other

    def become(self, other: "BCNN") -> None:
        """Take the parts, the calibration and the sides of images of a network of the same classes."""
        self.chosen, self.backbone, self.pooling = other.chosen, other.backbone, other.pooling
        self.head, self.calibration = other.head, other.calibration
        divisor, min_size = other.preprocessing.divisor, other.preprocessing.min_size
        self.preprocessing = replace(self.preprocessing, divisor=divisor, min_size=min_size)

    def replace_head(self, classes: Sequence[str]) -> None:
        """Set the classes, with a new head and without what belongs to the old one."""
        self.classes, self.calibration, self.taxonomy = list(classes), None, None
        self.head = Head(self.pooling.width, len(self.classes))

    def descriptor(self, images: Images) -> Tensor:
        """Images (see `Backbone.forward`) → descriptors (batch, width) of unit length."""
        return self.pool(images, self.maps(images))

    def maps(self, images: Images) -> list[Tensor]:
        """Images → their maps before the projection, for each of their `stacks`."""
        return [self.backbone.unprojected(stack) for stack in stacks(images)]

    def pool(self, images: Images, maps: Sequence[Tensor]) -> Tensor:
        """Images and their `maps` → descriptors (batch, width) of unit length."""
        return in_order(images, [self.pooling(self.backbone.projection(x)) for x in maps])

    def forward(self, images: Images) -> Tensor:
        """Images (see `Backbone.forward`) → logits (batch, classes)."""
        return self.head(self.descriptor(images))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities of the classes (batch, classes), calibrated where the model is.

        nan for an image of which a logit is not finite: torch's softmax hides the -∞ that float16
        overflows to.
        """
        finite = logits.isfinite().all(dim=-1, keepdim=True)
        scaled = logits / self.calibration.temperature if self.calibration else logits
        return scaled.softmax(dim=-1).where(finite, math.nan)

    @torch.no_grad()
    def predict(self, images: Tensor | ImageLike | Sequence[ImageLike], batch_size: int = 16) -> Tensor:
        """Return the probabilities of the classes (batch, classes), in float32 at least.

        Convolutions are computed in the fastest precision of the device, as `bcnn predict` does.

        Args:
            images: a path, a PIL image or an array (height, width, 3) of uint8, or a list of them,
                preprocessed as in evaluation; or a tensor (batch, 3, height, width), uint8 in 0..255 or
                floating point in 0..1, taken without preprocessing.
        """
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        elif isinstance(images, np.ndarray) and images.ndim == 3:
            images = images[None]
        device = self.head.bias.device
        probabilities = [self.head.bias.new_empty(0, len(self.classes))]
        for start in range(0, len(images), batch_size):
            batch: Any = images[start : start + batch_size]
            if not isinstance(batch, Tensor):
                batch = stack_images([self._preprocessed(image) for image in batch])
            elif batch.is_floating_point() and not ((batch - 0.5).abs() < 0.5 + ROUNDING).all():
                raise ValueError("pixels are outside 0..1: the model normalises images itself")
            with autocast(device):
                probabilities.append(self.probabilities(self(batch.to(device))))
        return torch.cat(probabilities)

    def _preprocessed(self, image: ImageLike) -> Tensor:
        if isinstance(image, str | Path):
            image = load_image(image, self.preprocessing.side)
        else:
            image = upright_rgb(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
        return self.preprocessing.evaluation()(image)
