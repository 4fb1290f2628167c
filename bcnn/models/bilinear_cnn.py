"""The network: a backbone, a second-order pooling, a linear head."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bcnn.data.image_io import load_image, upright_rgb
from bcnn.data.splits import SplitRecord
from bcnn.data.transforms import Preprocessing
from bcnn.models import backbones, pooling
from bcnn.models.backbones import Backbone
from bcnn.models.description import refuse_nonsense
from bcnn.models.head import Head
from bcnn.models.pooling import Pooling
from bcnn.models.registry import make
from bcnn.utils.errors import UserError

Photograph = str | Path | Image.Image | np.ndarray

PREPROCESSING = Preprocessing()
DEFAULT = {"backbone": {"name": "vgg16"}, "pooling": {"name": "bilinear"}}


class BCNN(nn.Module):
    """Bilinear CNN: by default the symmetric one on VGG-16 (Lin et al., ICCV 2015).

    The model takes images as they come from a decoder and normalises them itself.

    Args:
        classes: names, in the order of the logits.
        preprocessing: how an image becomes the square that it is trained and tested on.
        backbone: name and options of the backbone; None: VGG-16.
        pooling: name and options of the pooling; None: bilinear.
        project: channels that the maps are projected to; None: as they come.
        split: which images it was trained, validated and tested on, where that is known.

    Attributes:
        assumed: of a model that was opened, what its file leaves open; a sentence, or "".

    Raises:
        UserError: there is no such backbone or pooling, or fewer channels than `project`.
    """

    assumed = ""

    def __init__(
        self,
        classes: Sequence[str],
        preprocessing: Preprocessing = PREPROCESSING,
        backbone: Mapping[str, Any] | None = None,
        pooling: Mapping[str, Any] | None = None,
        project: int | None = None,
        split: SplitRecord | None = None,
    ) -> None:
        super().__init__()
        self.classes = list(classes)
        self.preprocessing = preprocessing
        self.split = split
        self.chosen: dict[str, Any] = {
            "backbone": dict(backbone or DEFAULT["backbone"]),
            "pooling": dict(pooling or DEFAULT["pooling"]),
        }
        if project is not None:
            self.chosen["project"] = project
        self.backbone = make_backbone(**self.chosen["backbone"], project=project)
        self.pooling = make_pooling(self.backbone.channels, **self.chosen["pooling"])
        self.head = Head(self.pooling.width, len(self.classes))
        self.backbone.initialise()  # after the head: a seed gives the weights that it always gave
        self.to(memory_format=torch.channels_last)

    def description(self) -> dict[str, Any]:
        """What another of this network is made from (`build`), in names, numbers and lists."""
        return {
            **self.chosen,
            "preprocessing": asdict(self.preprocessing),
            "classes": self.classes,
            "split": self.split.plain() if self.split else None,
        }

    def descriptor(self, images: Tensor) -> Tensor:
        """Rows of images as a backbone takes them.

        Returns:
            (batch, width), of unit length, in float32 at least.
        """
        rows: Tensor = self.pooling(self.backbone(images))
        return rows

    def forward(self, images: Tensor) -> Tensor:
        """Images as a backbone takes them → logits (batch, classes)."""
        logits: Tensor = self.head(self.descriptor(images))
        return logits

    @torch.no_grad()
    def predict(self, images: Tensor | Photograph | Sequence[Photograph]) -> Tensor:
        """Probabilities of the classes, in the order of `classes`.

        Args:
            images: a PIL image, a path or an array (height, width, 3) of uint8, or a list of them: each
                is framed; or a tensor as a backbone takes it, as it is.

        Returns:
            (batch, classes), rows that sum to one, in float32 at least.

        Raises:
            UserError: a file cannot be decoded.
            ValueError: floating point is not in 0..1.
            TypeError: it is none of these.
        """
        if isinstance(images, Tensor):
            if images.is_floating_point() and (images > 2).any():  # a little over 1 comes of resizing
                raise ValueError("floating point is in 0..1, and larger values are in it: give uint8")
        else:
            if isinstance(images, str | Path | Image.Image):
                images = [images]
            elif isinstance(images, np.ndarray) and images.ndim == 3:
                images = images[None]
            framed = [self._framed(each) for each in images]
            size = self.preprocessing.size
            images = torch.stack(framed) if framed else torch.empty(0, 3, size, size)
        return self(images.to(self.head.bias.device)).softmax(dim=1)

    def _framed(self, photograph: Photograph) -> Tensor:
        if isinstance(photograph, str | Path):
            image = load_image(photograph, self.preprocessing.side)
        elif isinstance(photograph, Image.Image):
            image = upright_rgb(photograph)
        elif isinstance(photograph, np.ndarray) and photograph.dtype == np.uint8:
            image = Image.fromarray(photograph).convert("RGB")
        else:
            raise TypeError(
                f"{type(photograph).__name__} is no photograph: give a path, a PIL image, or an array "
                "of uint8 (height, width, 3)"
            )
        framed: Tensor = self.preprocessing.evaluation()(image)
        return framed


def build(description: Mapping[str, Any]) -> BCNN:
    """The network that `BCNN.description` describes, with the weights of a new one.

    Args:
        description: what it leaves out has its default, but for the classes.

    Raises:
        UserError: it makes no sense, or names a backbone or a pooling that there is not.
    """
    refuse_nonsense(description)
    preprocessing, split = (
        Preprocessing(**description.get("preprocessing", {})),
        description.get("split"),
    )
    made = BCNN(
        description["classes"],
        preprocessing,
        description.get("backbone"),
        description.get("pooling"),
        description.get("project"),
        SplitRecord.from_plain(split) if split else None,
    )
    smallest, multiple = made.backbone.min_size, made.backbone.size_divisor
    if preprocessing.size < smallest or preprocessing.size % multiple:
        raise UserError(
            f"its preprocessing.size should be {smallest} at least, and a multiple of {multiple}"
        )
    return made


def make_backbone(name: str, project: int | None = None, **options: Any) -> Backbone:
    """A backbone by its name, whose maps are projected to `project` channels if that is a number.

    Raises:
        UserError: there is none, it has no such option, or fewer channels.
    """
    made = make(backbones, Backbone, name, **options)  # type: ignore[type-abstract]
    if project is not None:
        made.project(project)
    return made


def make_pooling(channels: int, name: str, **options: Any) -> Pooling:
    """A pooling of maps of `channels` by its name. Raises UserError where there is none."""
    return make(pooling, Pooling, name, channels, **options)
