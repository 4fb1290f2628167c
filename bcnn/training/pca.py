"""The principal axes of a data set's local features, which maps are projected to.

A pooled matrix has as many entries as pairs of channels. Most of what local features differ by lies in
few directions, so the matrix of their first coordinates along these axes is much smaller and about as
good. The axes are the eigenvectors of the features' covariance; the projected maps keep their mean.

Source: the 1 × 1 reduction before pooling, Lin et al., "Bilinear CNN Models for Fine-grained Visual
Recognition", PAMI 2018, §6, and Li et al., "iSQRT-COV", CVPR 2018, §3; here found in closed form.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from bcnn.data.batches import stacks
from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.models.backbones import Backbone
from bcnn.training.feature_data import identify_maps
from bcnn.training.feature_store import key_of
from bcnn.utils.console import track
from bcnn.utils.device import autocast
from bcnn.utils.files import atomic_write, cache_folder


@torch.no_grad()
def fit_principal_axes(
    backbone: Backbone, data: FineGrainedDataModule, device: torch.device, precision: str
) -> None:
    """Set a backbone's projection to the first principal axes of a sample of the training images.

    They are cached: others, if only by rounding, would lead to another store of descriptors. The
    backbone is on the CPU; `device` computes the maps, in a `precision` by Lightning's name.
    """
    loader = data.sample_dataloader()
    sample = [data.digests[path] for path, _ in loader.dataset.samples]  # type: ignore[attr-defined]
    identity = identify_maps(backbone, data, precision, projected=False) | {"images": sample}
    file = cache_folder("axes") / f"{key_of(identity)}.npy"
    weight = backbone.projection.weight
    assert isinstance(weight, Tensor)
    if file.is_file():
        axes = torch.from_numpy(np.load(file))
    else:
        backbone.to(device).eval()  # batch normalisation would use, and change, its statistics
        batches = track(loader, "principal axes", unit="batches")
        with autocast(device, precision):
            axes = principal_axes(
                backbone.unprojected(stack.to(device))
                for images, _ in batches
                for stack in stacks(images)
            )
        with atomic_write(file) as part:
            np.save(part, axes)
        backbone.to("cpu")
    weight.copy_(axes[: len(weight), :, None, None])


def principal_axes(batches: Iterable[Tensor]) -> Tensor:
    """Return the axes (channels, channels) of maps (batch, channels, h, w), largest variance first."""
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for maps in batches:
        x = maps.transpose(0, 1).flatten(1).cpu().double()
        count += x.shape[1]
        total = total + x.sum(dim=1)
        products = products + x @ x.mT
    mean = total / count
    axes = torch.linalg.eigh(products / count - mean.outer(mean)).eigenvectors.mT.flip(0)
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return (axes * largest.sign()).float()  # of the two signs, that of a positive largest entry
