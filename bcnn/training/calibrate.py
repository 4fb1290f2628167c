"""Calibrate a trained model by images that it was not trained on."""

import torch

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.draws import draw_sample
from bcnn.data.index import Samples
from bcnn.evaluation.neighbours import descriptors
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.calibration import ENOUGH, Calibration, Subspace
from bcnn.training.convex_stage import HeldOut
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.logistic_regression import BLOCK
from bcnn.utils.console import track

SAMPLE = 256  # training images whose descriptors span the subspace


@torch.no_grad()
def calibrate(
    model: BCNN,
    data: FineGrainedDataModule,
    features: FineGrainedDataModule | CachedFeatureDataModule,
    held_out: HeldOut | None,
    precision: str,
) -> Calibration | None:
    """Return a calibration by validation images or, if these are few, by cross-validation.

    None without either.

    Cross-validation would have more images, but is too good where training images come in series, since
    a fold then knows the next one. Its logits are also of the mean of an image and its mirror image.

    Args:
        features: that the loaders of are read: images, or stored descriptors.
        held_out: of cross-validation in stage `last`.
    """
    sample = draw_sample(data.train, data.digests, SAMPLE, data.seed)
    if held_out and len(data.val) < min(ENOUGH, len(held_out.images)):
        assert isinstance(features, CachedFeatureDataModule)
        return _by_folds(features, sample, held_out, model.head.bias.device)
    if not data.val:
        return None
    spanning = descriptors(model, features.evaluation_dataloader(sample), precision)
    space = Subspace.of(torch.cat([*spanning]))
    batches = descriptors(model, features.evaluation_dataloader(data.val), precision)
    found = [
        (model.head(x).cpu(), space.residual(x).cpu())
        for x in track(batches, "calibrating", unit="batches")
    ]
    logits, residual = map(torch.cat, zip(*found, strict=True))
    labels = torch.tensor([label for _, label in data.val])
    return Calibration.of(logits, labels, residual, space)


def _by_folds(
    features: CachedFeatureDataModule,
    sample: Samples,
    held_out: HeldOut,
    device: torch.device,
) -> Calibration:
    """Return the calibration by training images, each measured in a subspace without its fold."""
    train = features.data.train
    folds = dict(zip((path for path, _ in train), held_out.folds.tolist(), strict=True))
    spanning = features.descriptors(sample)[0][:].to(device)
    fold_of = torch.tensor([folds[path] for path, _ in sample], device=device)
    residual = torch.empty(len(train))
    for fold in track(held_out.folds.unique().tolist(), "calibrating", unit="folds"):
        members = (held_out.folds == fold).nonzero()[:, 0]
        space = Subspace.of(spanning[fold_of != fold])
        stored, _ = features.descriptors([train[i] for i in members.tolist()])
        blocks = [stored[i : i + BLOCK].to(device) for i in range(0, len(members), BLOCK)]
        residual[members] = torch.cat([space.residual(block) for block in blocks]).cpu()
    known = held_out.images
    return Calibration.of(held_out.logits, held_out.labels, residual[known], Subspace.of(spanning))
