"""Batches of images: one tensor, or one of each shape where shapes differ."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate


@dataclass(frozen=True)
class RaggedBatch:
    """Images of several shapes, with what callers ask of images (batch, 3, height, width).

    What computes with them takes the `stacks`, and `in_order` restores the order.
    """

    stacks: Sequence[Tensor]  # the images of each shape (n, 3, height, width)
    order: Tensor  # (batch,): the row of each image in all stacks together
    ndim = 4

    def __len__(self) -> int:
        return len(self.order)

    def to(self, *args: Any, **options: Any) -> "RaggedBatch":
        return self._each(lambda stack: stack.to(*args, **options))

    def flip(self, axis: int) -> "RaggedBatch":
        return self._each(lambda stack: stack.flip(axis))

    def pin_memory(self) -> "RaggedBatch":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "RaggedBatch":
        return RaggedBatch([*map(change, self.stacks)], self.order)


Images = Tensor | RaggedBatch


def stack_images(images: Sequence[Tensor]) -> Images:
    """Return images (3, height, width) as a batch, in their order."""
    positions: dict[torch.Size, list[int]] = defaultdict(list)
    for position, image in enumerate(images):
        positions[image.shape].append(position)
    stacks = [default_collate([images[i] for i in same]) for same in positions.values()]
    if len(stacks) == 1:
        return stacks[0]
    return RaggedBatch(stacks, torch.tensor([*chain(*positions.values())]).argsort())


def stacks(images: Images) -> Sequence[Tensor]:
    """Return the images of each shape together, (n, 3, height, width)."""
    return images.stacks if isinstance(images, RaggedBatch) else [images]


def in_order(images: Images, found: Sequence[Tensor]) -> Tensor:
    """Return what was found for images (batch, …), from what was found for each of their `stacks`."""
    return torch.cat([*found])[images.order] if isinstance(images, RaggedBatch) else found[0]


def collate(samples: Sequence[tuple[Tensor, int]]) -> tuple[Images, Tensor]:
    """Return a batch of images, and their labels (batch,)."""
    images, labels = zip(*samples, strict=True)
    return stack_images(images), torch.tensor(labels)
