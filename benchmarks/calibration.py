"""Calibration: coverage of prediction sets, and how well images of no known class are recognised.

Of a checkpoint of stage last, with its training and test images, and images of other things:
python benchmarks/calibration.py CKPT IMAGES UNKNOWN
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.image_files import find_images
from bcnn.evaluation.metrics import as_text, proportion, unknown_metrics
from bcnn.evaluation.neighbours import descriptors
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.calibration import Calibration, Subspace, prediction_sets
from bcnn.models.checkpoint import load_model
from bcnn.training.calibrate import SAMPLE
from bcnn.training.convex_stage import fold_numbers
from bcnn.training.logistic_regression import ConvexProblem
from bcnn.utils.console import console, track
from bcnn.utils.device import best_device

DRAWS, HIDDEN = 20, 3  # of calibration images, and of a quarter of the classes
L2 = 1e-6


def described(model: BCNN, data: FineGrainedDataModule, samples: Sequence[tuple[str, int]]) -> Tensor:
    """Return the descriptors (images, width) of images."""
    loader = data.evaluation_dataloader(samples)
    found = track(descriptors(model, loader), "describing", len(loader), "batches")
    return torch.cat([batch.half().cpu() for batch in found]).float()


def coverage(model: BCNN, x: Tensor, labels: Tensor, wanted: float) -> tuple[list[float], list[float]]:
    """Return coverage and mean size of sets on half of the images, calibrated by the other half."""
    with torch.no_grad():
        logits = model.head.cpu()(x)
    shares, sizes = [], []
    for draw in range(DRAWS):
        half = torch.randperm(len(x), generator=torch.Generator().manual_seed(draw)) < len(x) // 2
        made = Calibration.of(logits[half], labels[half], torch.zeros(int(half.sum())), Subspace(1))
        probabilities = (logits[~half] / made.temperature).softmax(dim=1)
        sets = prediction_sets(probabilities, made.threshold(wanted))
        shares.append(sets.gather(1, labels[~half, None]).float().mean().item())
        sizes.append(sets.sum(dim=1).float().mean().item())
    return shares, sizes


def hidden(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], far: Tensor, seed: int
) -> list[float]:
    """Return refused known images, and AUROC and accepted images of hidden classes and of others."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(int(train[1].max()) + 1, generator=generator)
    numbers = torch.full_like(order, -1)
    numbers[order[len(order) // 4 :]] = torch.arange(len(order) - len(order) // 4)
    kept = numbers[train[1]] >= 0
    x, labels = train[0][kept], numbers[train[1]][kept]
    problem = ConvexProblem(x, labels, int(labels.max()) + 1)
    folds = fold_numbers(labels, 5, range(len(labels)))
    solution, logits = problem.solve(L2), problem.held_out(L2, folds)
    sample = torch.randperm(len(x), generator=generator)[:SAMPLE]
    residual = torch.empty(len(x))
    for fold in range(5):
        space = Subspace.of(x[sample[folds[sample] != fold]])
        residual[folds == fold] = space.residual(x[folds == fold])
    calibration = Calibration.of(logits, labels, residual, Subspace.of(x[sample]))

    def novelty(of: Tensor) -> Tensor:
        return calibration.novelty((of - problem.mean) @ solution.weight.mT + solution.bias, of)

    known = numbers[test[1]] >= 0
    usual = novelty(test[0][known])
    pair = [unknown_metrics(usual, novelty(of)) for of in (test[0][~known], far)]
    refused = float((usual > 0).double().mean())
    return [refused, *(number for each in pair for number in (each.auroc, each.accepted.value))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("ckpt", "images", "unknown"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    model = load_model(asked.ckpt).to(best_device())
    data = FineGrainedDataModule(**{"list" if asked.images.is_file() else "root": asked.images})
    data.use_preprocessing(model.preprocessing)
    data.setup()
    everything = (data.train + data.val, data.test)
    labels = [torch.tensor([label for _, label in samples]) for samples in everything]
    x = [described(model, data, samples) for samples in everything]
    paths = find_images([str(asked.unknown)])
    far = described(model, data, [(path, 0) for path in paths])
    with torch.no_grad():
        logits = model.head.cpu()(x[1])
    found = {"top-1": logits.argmax(dim=1) == labels[1]}
    if calibration := model.cpu().calibration:
        shares = (logits / calibration.temperature).softmax(dim=1)
        sets = prediction_sets(shares, calibration.threshold(0.95))
        found["coverage of its own 95 % sets"] = sets.gather(1, labels[1][:, None])
    for name, hits in found.items():
        value, interval = as_text("share", proportion(int(hits.sum()), len(hits)))
        console.print(f"{name}: {value} ({interval})")
    table = Table("coverage asked for", "mean", "least", "largest", "mean size")
    table.title = f"{DRAWS} draws of {len(x[1]) // 2} calibration images"
    for wanted in (0.9, 0.95):
        shares, sizes = coverage(model, x[1], labels[1], wanted)
        numbers = (np.mean(shares), min(shares), max(shares))
        table.add_row(f"{wanted:.0%}", *(f"{n:.1%}" for n in numbers), f"{np.mean(sizes):.2f}")
    console.print(table)
    table = Table("draw", "known refused", "near AUROC", "near accepted", "far AUROC", "far accepted")
    table.title = f"a quarter of the classes hidden (near), {len(far)} other images (far)"
    for seed in range(HIDDEN):
        row = hidden((x[0], labels[0]), (x[1], labels[1]), far, seed)
        table.add_row(str(seed), *(f"{n:.3f}" for n in row))
    console.print(table)
