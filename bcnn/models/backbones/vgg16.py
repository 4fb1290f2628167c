"""VGG-16 up to relu5_3, without pool5: the features of the bilinear CNN papers."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.vgg import cfgs, make_layers

from bcnn.models.backbones import Backbone

# Where the convolutions are in `VGG16.features`, by their names in the VGG paper.
# fmt: off
LAYERS = {
    "conv1_1": 0, "conv1_2": 2,
    "conv2_1": 5, "conv2_2": 7,
    "conv3_1": 10, "conv3_2": 12, "conv3_3": 14,
    "conv4_1": 17, "conv4_2": 19, "conv4_3": 21,
    "conv5_1": 24, "conv5_2": 26, "conv5_3": 28,
}
# fmt: on


class VGG16(Backbone):
    """Simonyan & Zisserman, "Very deep convolutional networks", ICLR 2015, configuration D."""

    channels = 512
    stride = 16
    min_size = 32  # 2 × 2 locations after four pools
    layers = tuple(LAYERS)
    supports_grad_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=False)[:-1]
        for i, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):  # before its ReLU: the same, on a quarter of it
                self.features[i - 1], self.features[i] = layer, self.features[i - 1]

    def initialise(self) -> None:
        """As torchvision does it (He et al., ICCV 2015)."""
        for layer in self.features:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def unfreeze_from(self, name: str | None) -> None:
        first = LAYERS[name] if name else 0
        for index, layer in enumerate(self.features):
            layer.requires_grad_(index >= first)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images (batch, 3, h, w) → relu5_3 (batch, 512, h // 16, w // 16).

        The maps lie in memory as the weights do. On a CPU where that is channels last, the pools are
        computed again in the backward pass: where their maxima were (int64) takes as much memory as
        their inputs do in half precision. So is conv1_1, whose output is as large as any and soon made.
        In float32 (see `training_layout`) that costs an eighth of the step, and on a GPU a tenth: there
        nothing is.
        With `grad_checkpointing`, the first two blocks are computed again, two images at a time: they have
        most of the activations (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
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
    """`layers(x)`, keeping nothing but x for the backward pass."""
    y: Tensor = checkpoint(layers, x, use_reentrant=False, preserve_rng_state=False)
    return y
