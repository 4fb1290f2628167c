"""The head: one linear classifier on rows that a mean is taken off."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcnn.utils.distributed import mean_over_ranks

BLOCK = 3456  # columns, a 38th of a packed bilinear row
BLOCKS = 4  # at a time


class Head(nn.Linear):
    """W·(x − mean) + b: rows (batch, width) → logits (batch, classes).

    Rows of different images are much alike. A step that moves all of them together is told to the
    classifier, whose weights are large, as one and the same change of every image's logits, and the
    loss explodes. With their mean gone it is told nothing: see docs/finetune.md.

    In training with `batch_mean` it is the mean of the batch, of all ranks together; else it is `mean`,
    a constant that could as well be part of the bias.

    Source: "mean-only batch normalization", Salimans & Kingma, "Weight Normalization", NIPS 2016, §3.
    """

    mean: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.batch_mean = False
        self.register_buffer("mean", torch.zeros(width))
        # The problem is convex: zero is as good a start as any, and the same for all.
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (batch, width), of any precision → logits (batch, classes), in float32 at least.

        A row has many small entries; summing them in half precision would cost accuracy and saves
        nothing beside the convolutions.
        """
        in_training = self.training and self.batch_mean
        mean = mean_over_ranks(rows.mean(dim=0)) if in_training else self.mean
        with torch.autocast(rows.device.type, enabled=False):
            if rows.device.type == "cpu":
                logits: Tensor = _CenteredLinear.apply(rows, mean, self.weight, self.bias)
                return logits
            bias = self.bias - self.weight @ mean
            return F.linear(rows.to(self.weight.dtype), self.weight, bias)

    @torch.no_grad()
    def center_on(self, mean: Tensor) -> None:
        """Take `mean` (width,) off the rows and make up for it in the bias: same logits."""
        self.bias.add_(self.weight @ (mean - self.mean))
        self.mean.copy_(mean)

    def linear(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of classes (n,), the weights on a row (n, width), and what else is in their logits (n,)."""
        weight = self.weight[labels]
        return weight, self.bias[labels] - weight @ self.mean


class _CenteredLinear(torch.autograd.Function):
    """W·(x − mean) + b, for x in any precision, multiplied and summed in that of W.

    On a CPU, where most of a step from the store is spent here, on matrices that are wide and low. So
    nothing as large as x is made, of W there is one gradient, and `BLOCKS` times `BLOCK` columns are
    taken at a time, which are converted and read again within the processor's cache; the rest of the
    columns come last.
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


def _blocks(x: Tensor) -> list[Tensor]:
    """Views of (rows, width), each (up to `BLOCKS`, rows, `BLOCK`), the last (1, rows, rest)."""
    whole = x.shape[1] // BLOCK * BLOCK
    views = x[:, :whole].unflatten(1, (-1, BLOCK)).transpose(0, 1).split(BLOCKS) if whole else ()
    rest = [x[:, whole:].unsqueeze(0)] if whole < x.shape[1] else []
    return [*views, *rest]
