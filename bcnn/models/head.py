"""The head: a linear classifier on centred descriptors."""

import torch
from torch import Tensor, nn

from bcnn.utils.distributed import mean_over_ranks


class Head(nn.Linear):
    """W·(x − mean) + b: descriptors (batch, width) → logits (batch, classes).

    Without centring, a step that moves all descriptors together changes every image's logits alike, and
    the loss explodes: see docs/finetune.md. In training steps with `batch_mean` the mean is that of the
    batch on all ranks, else the constant `mean`.

    Source: "mean-only batch normalization", Salimans & Kingma, "Weight Normalization", NIPS 2016, §3.
    """

    mean: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.batch_mean = False
        self.register_buffer("mean", torch.zeros(width))
        nn.init.zeros_(self.weight)  # the problem of stage `last` is convex
        nn.init.zeros_(self.bias)

    def forward(self, descriptors: Tensor) -> Tensor:
        """Descriptors of any precision → logits in that of the weights, float32 at least.

        The equal W·x + (b − W·mean) has a second gradient as large as W, and takes half as long again.
        """
        with torch.autocast(descriptors.device.type, enabled=False):
            x = descriptors.to(self.weight.dtype)
            # Without gradients it predicts, be it in a pause of training: no image may change another.
            of_batch = self.training and self.batch_mean and torch.is_grad_enabled()
            mean = mean_over_ranks(x.mean(dim=0)) if of_batch else self.mean
            return super().forward(x - mean)

    @torch.no_grad()
    def center_on(self, mean: Tensor) -> None:
        """Subtract `mean` (width,) from descriptors, and change the bias to keep the logits."""
        self.bias.add_(self.weight @ (mean - self.mean))
        self.mean.copy_(mean)

    def linear(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights (n, width) and constants (n,) of classes (n,): logit = weight·x + constant."""
        weight = self.weight[labels]
        return weight, self.bias[labels] - weight @ self.mean
