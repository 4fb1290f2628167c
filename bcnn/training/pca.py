"""The principal axes of a data set's local features, which maps are projected to.

A pooled matrix has as many entries as pairs of channels. Most of what local features differ by lies in
few directions, so the matrix of their first coordinates along these axes is much smaller and about as
good. The axes are the eigenvectors of the features' covariance; the mean is not subtracted.

Source: the 1 × 1 reduction before pooling, Lin et al., "Bilinear CNN Models for Fine-grained Visual
Recognition", PAMI 2018, §6, and Li et al., "iSQRT-COV", CVPR 2018, §3; here found in closed form.
"""

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.image_io import VERSION
from bcnn.models.backbones import Backbone
from bcnn.training.feature_data import hash_tensors, image_digests
from bcnn.utils.console import track
from bcnn.utils.device import autocast
from bcnn.utils.files import atomic_write, cache_folder


@torch.no_grad()
def fit_principal_axes(
    backbone: Backbone, data: FineGrainedDataModule, device: torch.device, precision: str
) -> None:
    """Set a backbone's projection to the first principal axes of a sample of the training images.

    The axes are cached by images, backbone, preprocessing and precision.

    Args:
        backbone: on the CPU, with a projection.
        data: set up.
        device: that computes the maps.
        precision: Lightning's name, of the maps.
    """
    loader = data.sample_dataloader()
    own = {k: v for k, v in backbone.state_dict().items() if not k.startswith("projection.")}
    paths = [path for path, _ in loader.dataset.samples]  # type: ignore[attr-defined]
    identity = {
        "backbone": hash_tensors(own),
        "images": image_digests(data, paths),
        "preprocessing": vars(data.preprocessing),
        "decoding": VERSION,
        "precision": precision,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder("axes") / f"{key}.npy"
    weight = backbone.projection.weight
    assert isinstance(weight, Tensor)
    channels = weight.shape[1]
    try:
        axes = np.load(file)
    except (OSError, ValueError, EOFError):  # there is none, or it is damaged
        axes = np.empty(0)
    if axes.shape != (channels, channels):
        backbone.to(device).eval()  # batch normalisation would use, and change, its statistics
        batches = track(loader, "principal axes", unit="batches")
        with autocast(device, precision):
            axes = principal_axes(
                backbone.unprojected(batch.to(device)) for batch, _ in batches
            ).numpy()
        backbone.to("cpu")
        with atomic_write(file) as part:
            np.save(part, axes)
    weight.copy_(torch.from_numpy(axes)[: len(weight), :, None, None])


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
