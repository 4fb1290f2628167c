"""VGG-16 up to relu5_3, without pool5: the features of the bilinear CNN papers."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers

from bcnn.models.backbones.base import Backbone
from bcnn.utils.errors import UserError

PUBLISHED = {
    "imagenet": VGG16_Weights.IMAGENET1K_V1,
    "imagenet_features": VGG16_Weights.IMAGENET1K_FEATURES,
}

# Index of each convolution in `VGG16.features`, by its name: each has a ReLU, and each block a pool.
NAMES = ["1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "3_3", "4_1", "4_2", "4_3", "5_1", "5_2", "5_3"]
LAYERS = {f"conv{name}": 2 * k + int(name[0]) - 1 for k, name in enumerate(NAMES)}


def normalization_of(name: str) -> tuple[Tensor, Tensor]:
    """Return mean and std (3, 1, 1) of the images that `PUBLISHED[name]` was trained on."""
    preset = PUBLISHED[name].transforms()
    return torch.tensor(preset.mean).view(3, 1, 1), torch.tensor(preset.std).view(3, 1, 1)


class VGG16(Backbone):
    """Simonyan & Zisserman, "Very deep convolutional networks", ICLR 2015, configuration D."""

    channels = 512
    stride = 16
    min_size = 32
    layers = tuple(LAYERS)
    weights = tuple(PUBLISHED)
    supports_grad_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=False)[:-1]
        for i, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):  # before its ReLU: equal, on a quarter of the values
                self.features[i - 1], self.features[i] = layer, self.features[i - 1]

    def initialise(self) -> None:
        """Draw weights as torchvision does (He et al., ICCV 2015)."""
        for layer in self.features:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def download(self, weights: str) -> dict[str, Tensor]:
        """Return torchvision's weights, kept in torch.hub's folder after a check of their hash."""
        published = PUBLISHED[weights]
        try:
            state = published.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            file = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
            raise UserError(
                f"cannot download the weights '{weights}' ({error}): put {published.url} at {file}"
            ) from error
        mean, std = normalization_of(weights)
        return {**state, "mean": mean, "std": std}

    def unfreeze_from(self, name: str | None) -> None:
        first = LAYERS[name] if name else 0
        for index, layer in enumerate(self.features):
            layer.requires_grad_(index >= first)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images (batch, 3, h, w) → relu5_3 (batch, 512, h // 16, w // 16).

        The maps have the memory layout of the weights. In channels last on a CPU, the backward pass
        recomputes what is large and cheap: the pools, whose indices are int64, and conv1_1. With
        `grad_checkpointing` it recomputes the first two blocks, two images at a time: they have most of
        the activations (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
        """
        channels_last = self.features[0].weight.is_contiguous(memory_format=torch.channels_last)
        x = x.contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        recomputing = self.grad_checkpointing or (channels_last and x.device.type == "cpu")
        if not (recomputing and torch.is_grad_enabled()):
            return self.features(x)
        if self.grad_checkpointing:
            start = LAYERS["conv3_1"]
            x = torch.cat([_recomputed(self.features[:start], part) for part in x.split(2)])
        else:
            start = LAYERS["conv1_2"] + 1
            x = _recomputed(self.features[:start], x)  # only until conv1_2 has its input
        for layer in self.features[start:]:
            x = _recomputed(layer, x) if isinstance(layer, nn.MaxPool2d) else layer(x)
        return x


def _recomputed(layers: nn.Module, x: Tensor) -> Tensor:
    """Return `layers(x)`, keeping only x for the backward pass."""
    return checkpoint(layers, x, use_reentrant=False, preserve_rng_state=False)
