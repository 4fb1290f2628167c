"""Nearest images by the distance of their descriptors."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from bcnn.evaluation.report import Neighbour
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.console import track
from bcnn.utils.device import autocast


@torch.no_grad()
def descriptors(
    model: BCNN, batches: Iterable[tuple[Tensor, Tensor]], precision: str | None = None
) -> Iterator[Tensor]:
    """Yield the descriptors (batch, width) of each batch, in float32, on the model's device.

    Batches are (inputs, labels); inputs and precision as for `bcnn.evaluation.inference.infer`.
    """
    device = model.head.bias.device
    for inputs, _ in batches:
        if inputs.ndim == 4:
            with autocast(device, precision):
                inputs = model.descriptor(inputs.to(device))
        yield inputs.to(device, torch.float32, copy=True)  # a store reuses the batch's memory


def nearest(queries: Tensor, others: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return distances and indices (n, count) of the nearest descriptors, at most all, on the CPU.

    Queries (n, width) and batches of others (m, width) have unit length. Distances lie between 0
    (equal) and √2 (orthogonal), the nearest first. One batch is in memory at a time.
    """
    distances, indices = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    seen = 0
    for batch in others:
        exact = "donot_use_mm_for_euclid_dist"  # a matrix product puts equal ones 0.001 apart
        found = torch.cdist(queries, batch.to(queries), compute_mode=exact).cpu()
        numbers = torch.arange(seen, seen + len(batch)).expand(len(queries), -1)
        distances, indices = torch.cat([distances, found], 1), torch.cat([indices, numbers], 1)
        distances, order = distances.topk(min(count, distances.shape[1]), largest=False)
        indices = indices.gather(1, order)
        seen += len(batch)
    return distances, indices


def nearest_images(
    model: BCNN,
    queries: Iterable[tuple[Tensor, Tensor]],
    others: Iterable[tuple[Tensor, Tensor]],
    samples: Sequence[tuple[str, int]],
    count: int,
    precision: str | None = None,
) -> list[list[Neighbour]]:
    """Return path, class and distance of the `count` nearest images of each image, nearest first.

    Batches are as for `descriptors`; `samples` are (path, label) of the images in `others`.
    """
    asked = torch.cat([*descriptors(model, queries, precision)])
    shown = track(descriptors(model, others, precision), "nearest images", unit="batches")
    distances, indices = nearest(asked, shown, count)
    return [
        [(samples[i][0], model.classes[samples[i][1]], far) for i, far in zip(*found, strict=True)]
        for found in zip(indices.tolist(), distances.tolist(), strict=True)
    ]
