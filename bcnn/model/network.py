"""The network: VGG-16 features, bilinear pooling, one linear classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms import v2

from bcnn.data.splits import Split
from bcnn.data.transforms import (
    MIN_SIZE,
    Resize,
    evaluation_transform,
    load_image,
    resized_side,
    upright_rgb,
)
from bcnn.model.pooling.bilinear import bilinear_descriptor, packed_size

CHANNELS = 512  # of relu5_3
BLOCK = 3456  # columns, a 38th of a descriptor
BLOCKS = 4  # at a time

# Where the convolutions are in `BCNN.features`, by their names in the VGG paper.
# fmt: off
LAYERS = {
    "conv1_1": 0, "conv1_2": 2,
    "conv2_1": 5, "conv2_2": 7,
    "conv3_1": 10, "conv3_2": 12, "conv3_3": 14,
    "conv4_1": 17, "conv4_2": 19, "conv4_3": 21,
    "conv5_1": 24, "conv5_2": 26, "conv5_3": 28,
}
# fmt: on

Photograph = str | Path | Image.Image


class Centering(nn.Module):
    """The mean over the images that is taken off their descriptors.

    Descriptors of different images are much alike. A step that moves all of them together is told to
    the classifier, whose weights are large, as one and the same change of every image's logits, and
    the loss explodes. With their mean gone it is told nothing: see docs/finetune.md.

    In training with `batch_mean` it is the mean of the batch; else it is `mean`, a constant that could
    as well be part of the classifier's bias.

    Source: "mean-only batch normalization", Salimans & Kingma, "Weight Normalization", NIPS 2016, §3.
    """

    mean: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.batch_mean = False
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Descriptors (batch, width) → their mean (width,)."""
        return x.mean(dim=0) if self.training and self.batch_mean else self.mean


class BCNN(nn.Module):
    """Symmetric bilinear CNN on VGG-16 up to relu5_3, without pool5 (Lin et al., ICCV 2015).

    The model takes images as they come from a decoder and normalises them itself, with the mean and
    standard deviation that its weights were trained with, so the two cannot be mispaired.

    Args:
        classes: names, in the order of the logits.
        size: side in pixels of the square crops it is trained and tested on.
        resize: how an image gets to that size: its short side ("keep") or both ("squash").
        crop_pct: share of the resized side that the crop takes.
        split: which images it was trained, validated and tested on, where that is known.
        root: which square root the descriptor has, one of `bcnn.model.pooling.bilinear.ROOTS`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        size: int = 448,
        resize: Resize = "keep",
        crop_pct: float = 1.0,
        split: Split | None = None,
        root: str = "signed",
    ) -> None:
        super().__init__()
        self.split = split
        self.root = root
        self.classes = list(classes)
        self.size = size
        self.resize = resize
        self.crop_pct = crop_pct
        self.checkpointing = False  # of activations: see `feature_maps`
        self.features = make_layers(cfgs["D"], batch_norm=False)[:-1]
        for i, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):  # before its ReLU: the same, on a quarter of it
                self.features[i - 1], self.features[i] = layer, self.features[i - 1]
        self.centering = Centering(packed_size(CHANNELS))
        self.classifier = nn.Linear(packed_size(CHANNELS), len(self.classes))
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))
        for layer in self.features:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        # The classifier's problem is convex: zero is as good a start as any, and the same for all.
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.to(memory_format=torch.channels_last)

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the per-channel mean and standard deviation of images in 0..1."""
        self.mean.copy_(torch.tensor(mean).view(3, 1, 1))
        self.std.copy_(torch.tensor(std).view(3, 1, 1))

    def open_from(self, name: str | None) -> None:
        """Train the layers of the features from `name` (one of `LAYERS`) up, or all of them (None)."""
        first = LAYERS[name] if name else 0
        for index, layer in enumerate(self.features):
            layer.requires_grad_(index >= first)

    def feature_maps(self, images: Tensor) -> Tensor:
        """Maps of relu5_3.

        The pools are computed again in the backward pass: where their maxima were (int64) takes as
        much memory as their inputs do in half precision. So is conv1_1, whose output is as large as
        any and soon made. With `checkpointing`, so are the first two blocks, two images at a time,
        whose activations are most of all (Chen et al., "Training Deep Nets with Sublinear Memory
        Cost", 2016).

        Args:
            images: (batch, 3, height, width), RGB, uint8 in 0..255 or floating point in 0..1.

        Returns:
            (batch, 512, height // 16, width // 16).

        Raises:
            ValueError: images of another shape, or under 32 px.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f"expected images of shape (batch, 3, height, width) with sides of at least "
                f"{MIN_SIZE} px, got {tuple(images.shape)}"
            )
        x = images.to(self.mean.dtype)
        if not images.is_floating_point():
            x = x / 255
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if not torch.is_grad_enabled():
            return self.features(x)
        if self.checkpointing:
            start = LAYERS["conv3_1"]
            x = torch.cat([_recomputed(self.features[:start], part) for part in x.split(2)])
        else:
            start = LAYERS["conv1_2"] + 1
            x = _recomputed(self.features[:start], x)  # only until conv1_2 has its input
        for layer in self.features[start:]:
            x = _recomputed(layer, x) if isinstance(layer, nn.MaxPool2d) else layer(x)
        return x

    def descriptor(self, images: Tensor) -> Tensor:
        """Packed bilinear descriptors of images as for `feature_maps`.

        Returns:
            (batch, 131328), rows of unit length, in float32 at least.
        """
        return bilinear_descriptor(self.feature_maps(images), self.root)

    def logits(self, descriptors: Tensor) -> Tensor:
        """Classify descriptors: (batch, 131328) → (batch, classes), in float32 at least.

        Descriptors, of any precision, have 131,328 small entries; summing them in half precision would
        cost accuracy and saves nothing beside the convolutions.
        """
        weight, bias = self.classifier.weight, self.classifier.bias
        with torch.autocast(descriptors.device.type, enabled=False):
            logits: Tensor = _CenteredLinear.apply(
                descriptors, self.centering(descriptors), weight, bias
            )
            return logits

    @torch.no_grad()
    def center_on(self, mean: Tensor) -> None:
        """Take `mean` (131328,) off the descriptors and make up for it in the bias: same logits."""
        self.classifier.bias.add_(self.classifier.weight @ (mean - self.centering.mean))
        self.centering.mean.copy_(mean)

    def forward(self, images: Tensor) -> Tensor:
        """Images as for `feature_maps` → logits (batch, classes)."""
        return self.logits(self.descriptor(images))

    def transforms(self) -> v2.Compose:
        """Resize and centre crop of its evaluation: PIL image → uint8 tensor (3, size, size)."""
        return evaluation_transform(self.size, self.resize, self.crop_pct)

    @property
    def resized_side(self) -> int:
        """The short side in pixels that `transforms` resizes to: what `load_image` need not exceed."""
        return resized_side(self.size, self.crop_pct)

    @torch.no_grad()
    def predict(self, images: Tensor | Photograph | Sequence[Photograph]) -> Tensor:
        """Probabilities of the classes, in the order of `classes`.

        Args:
            images: a PIL image or a path, or a list of them: each goes through `transforms`; or a
                tensor as for `feature_maps`, taken as it is.

        Returns:
            (batch, classes), rows that sum to one, in float32 at least.

        Raises:
            UserError: a file cannot be decoded.
        """
        if not isinstance(images, Tensor):
            photographs = [images] if isinstance(images, Photograph) else images
            transform = self.transforms()
            images = torch.stack(
                [
                    transform(
                        load_image(p, self.resized_side)
                        if isinstance(p, str | Path)
                        else upright_rgb(p)
                    )
                    for p in photographs
                ]
            )
        return self(images.to(self.mean.device)).softmax(dim=1)


class _CenteredLinear(torch.autograd.Function):
    """W·(x - mean) + b, for x in any precision, multiplied and summed in that of W.

    Most of a step from the store is spent here, on matrices that are wide and low. So nothing as large
    as x is made, of W there is one gradient, and `BLOCKS` times `BLOCK` columns are taken at a time,
    which are converted and read again within the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, weight)
        products = weight.new_zeros(weight.shape[0], x.shape[0])  # `len` would fix an exported batch
        for left, right in zip(_blocks(weight), _blocks(x), strict=True):
            products += torch.bmm(left, _dense(right, weight.dtype).mT).sum(dim=0)
        return products.mT + (bias - weight @ mean)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, weight = ctx.saved_tensors
        of_x, of_mean, of_weight, _ = ctx.needs_input_grad
        total = gradient.sum(dim=0)
        weight_gradient = torch.empty_like(weight) if of_weight else None
        if weight_gradient is not None:
            for out, right in zip(_blocks(weight_gradient), _blocks(x), strict=True):
                left = gradient.mT.expand(len(right), -1, -1)
                out.copy_(torch.bmm(left, _dense(right, weight.dtype)))
            weight_gradient.addr_(total, mean, alpha=-1)
        return (
            gradient @ weight if of_x else None,
            -(total @ weight) if of_mean else None,
            weight_gradient,
            total,
        )


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format)


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Views of (rows, 131328), each (`BLOCKS`, rows, `BLOCK`), the last one of fewer blocks."""
    return x.unflatten(1, (-1, BLOCK)).transpose(0, 1).split(BLOCKS)


def _recomputed(layers: nn.Module, x: Tensor) -> Tensor:
    """`layers(x)`, keeping nothing but x for the backward pass."""
    y: Tensor = checkpoint(layers, x, use_reentrant=False, preserve_rng_state=False)
    return y
