"""The photographs that are most like others to a network: those with the nearest rows."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.device import autocast


@torch.no_grad()
def rows(
    model: BCNN, batches: Iterable[tuple[Tensor, Tensor]], precision: str | None = None
) -> Iterator[Tensor]:
    """Rows (batch, width) of batches of (inputs, labels), in float32, on the model's device.

    Args:
        model: in evaluation mode.
        batches: inputs are images, or stored rows.
        precision: Lightning's name; None: the fastest of the device.
    """
    device = model.head.bias.device
    for inputs, _ in batches:
        if inputs.ndim == 4:
            with autocast(device, precision):
                inputs = model.descriptor(inputs.to(device))
        yield inputs.to(device, torch.float32, copy=True)  # a store's next batch takes this one's place


def nearest(queries: Tensor, others: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Of each query the nearest of other rows, of which a batch at a time is in memory.

    Args:
        queries: (n, width), of unit length as are the others: distances go from 0, the same, to √2,
            nothing shared.
        others: batches (m, width).
        count: how many, at most all.

    Returns:
        Distances and indices, (n, count), the nearest first, on the CPU.
    """
    best, places, done = (
        torch.empty(len(queries), 0),
        torch.empty(len(queries), 0, dtype=torch.int64),
        0,
    )
    for batch in others:
        exact = "donot_use_mm_for_euclid_dist"  # the other way, what is the same is a thousandth apart
        apart = torch.cdist(queries, batch.to(queries), compute_mode=exact).cpu()
        found = torch.arange(done, done + len(batch)).expand(len(queries), -1)
        best, places = torch.cat([best, apart], dim=1), torch.cat([places, found], dim=1)
        best, order = best.topk(min(count, best.shape[1]), largest=False)
        places = places.gather(1, order)
        done += len(batch)
    return best, places
