"""Stage `last` solved to its optimum, for one λ after the other."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcnn.evaluation.predictions import Predictions
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.head import Head
from bcnn.training.callbacks import table_row, validation_cells
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.logistic_regression import BLOCK, ConvexProblem, Descriptors, Progress, Solution
from bcnn.training.module import BCNNModule, in_top_k
from bcnn.utils.console import logger, span, track

MIN_L2 = 1e-9  # the weakest λ that a path is extended to: less is lost in the factor's rounding
LOW_LOSS = 0.01  # validation loss below which a weaker λ has nothing left to gain


@dataclass(frozen=True)
class ConvexResult:
    """What the stage ended with.

    Args:
        checkpoint: the file of the best weights, which the model's head holds as well.
        metrics: their validation figures; empty without validation and cross-validation.
        held_out: predictions of training images by solutions that have not seen their fold, at the best
            λ; None without folds. Images alone in their class are left out.
    """

    checkpoint: Path
    metrics: dict[str, float]
    held_out: Predictions | None


@dataclass
class _Best:
    l2: float
    solution: Solution
    metrics: dict[str, float] = field(default_factory=dict)
    held_out: Tensor | None = None


def run_convex_stage(
    trainer: L.Trainer,
    model: BCNN,
    features: CachedFeatureDataModule,
    *,
    l2: Sequence[float],
    folder: Path,
    loss: nn.Module | None = None,
    folds: int | None = None,
    progress: Progress = track,
) -> ConvexResult:
    """Train the head for each λ, and keep the best by validation loss.

    To several λ, tenths of the last are added while it has the lowest validation loss. Without
    validation images, several λ are compared by cross-validation. Every rank solves the same problem;
    rank 0 writes.

    Args:
        trainer: its ranks, device and loggers are used; it fits nothing.
        model: its head is trained in place.
        features: of the images to train and validate on; missing descriptors are computed.
        l2: the λ, from strong to weak: each solution starts the next.
        folder: gets best.ckpt, or last.ckpt where nothing chooses λ.
        loss: (logits, labels) → loss, convex in the logits; None: cross-entropy.
        folds: of the cross-validation; None: there is none.
        progress: shows how far a part of the work is.

    Raises:
        UserError: from `CachedFeatureDataModule.build` or `ConvexProblem`.
    """
    module = BCNNModule(model, "last")
    trainer.predict(module, datamodule=features, return_predictions=False)  # starts ranks, calls build
    device = trainer.strategy.root_device
    model.to(device).eval()
    descriptors, labels = features.descriptors(features.data.train, views=2)
    problem = ConvexProblem(
        descriptors, labels, len(model.classes), loss, device=device, progress=progress
    )
    crossed = folds if not features.data.val and len(l2) > 1 and len(comparable(labels)) else None
    if crossed:
        logger.info(f"no validation images: λ is chosen by {crossed}-fold cross-validation")
    logger.info(table_row("λ", "train loss", "val loss", "val top-1", "time"))
    path, losses = list(l2), list[float]()
    for number, strength in enumerate(path):  # which grows
        start = time.monotonic()
        (solution,) = progress(map(problem.solve, (strength,)), f"λ {strength:g}", unit="λ")
        set_head(model.head, problem.mean, solution)
        tried = _Best(strength, solution)
        if features.data.val:
            tried.metrics = _validate(model.head, *features.descriptors(features.data.val))
        elif crossed:
            known = comparable(labels)
            tried.held_out = problem.held_out(strength, fold_numbers(labels, crossed)).cpu()
            tried.metrics = _figures("val", tried.held_out[known], labels[known])
        improved = tried.metrics.get("val_loss", 0.0) < min(losses, default=torch.inf)
        if number == 0 or improved or not tried.metrics:
            best = tried
        _report(trainer, number, tried, labels, time.monotonic() - start, improved)
        if tried.metrics:
            losses.append(tried.metrics["val_loss"])
            path += _weaker(path, losses)
    if folds and best.held_out is None:
        best.held_out = problem.held_out(best.l2, fold_numbers(labels, folds)).cpu()
    set_head(model.head, problem.mean, best.solution)
    file = folder / ("best.ckpt" if best.metrics else "last.ckpt")
    trainer.save_checkpoint(file, weights_only=True)
    return ConvexResult(file, best.metrics, _predictions(model, best.held_out, features.data.train))


@torch.no_grad()
def set_head(head: Head, mean: Tensor, solution: Solution) -> None:
    """Copy a solution into a head."""
    head.mean.copy_(mean)
    head.weight.copy_(solution.weight)
    head.bias.copy_(solution.bias)


def comparable(labels: Tensor) -> Tensor:
    """Return the indices of images not alone in their class: a fold without them still knows it."""
    return (labels.bincount()[labels] > 1).nonzero()[:, 0]


def fold_numbers(labels: Tensor, folds: int) -> Tensor:
    """Return a fold for each image: every class is split evenly, neighbours share a fold.

    Neighbouring files may be of one series, whose images would make each other easy.
    """
    numbers = torch.empty_like(labels)
    for label in labels.unique():
        members = labels == label
        count = int(members.sum())
        # Classes of fewer images than folds begin with different folds.
        numbers[members] = (torch.arange(count) * folds // max(count, folds) + label) % folds
    return numbers


@torch.no_grad()
def _validate(head: Head, descriptors: Descriptors, labels: Tensor) -> dict[str, float]:
    starts = range(0, len(labels), BLOCK)
    logits = [head(descriptors[i : i + BLOCK].to(head.bias.device)) for i in starts]
    return _figures("val", torch.cat(logits), labels)


def _figures(split: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
    logits, top5 = logits.cpu(), min(5, logits.shape[1])
    return {
        f"{split}_loss": F.cross_entropy(logits, labels).item(),
        f"{split}_top1": in_top_k(logits, labels).mean().item(),
        f"{split}_top5": in_top_k(logits, labels, top5).mean().item(),
    }


def _report(
    trainer: L.Trainer, number: int, tried: _Best, labels: Tensor, seconds: float, best: bool
) -> None:
    """Log a λ: a row of the table, and its figures to the loggers, as of epoch `number`."""
    train = _figures("train", tried.solution.logits, labels)
    cells = (f"{train['train_loss']:.3g}", *validation_cells(tried.metrics), span(seconds))
    mark = "  best so far" if best and tried.metrics else ""
    logger.info(table_row(f"{tried.l2:.3g}", *cells) + mark)
    solver = {"l2": tried.l2, "gradient_norm": float(tried.solution.gradient_norm)}
    for each in trainer.loggers:
        each.log_metrics({"epoch": number, **solver, **train, **tried.metrics}, step=number)
        each.save()


def _weaker(path: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Return a tenth of the last λ, where it is the weakest of several and the best by over 1 %."""
    *before, loss = losses
    at_end = before and len(losses) == len(path) and path[-1] == min(path)
    better = at_end and LOW_LOSS < loss < 0.99 * min(before)
    return [path[-1] / 10] if better and path[-1] > 1.5 * MIN_L2 else []


def _predictions(
    model: BCNN, held_out: Tensor | None, samples: Sequence[tuple[str, int]]
) -> Predictions | None:
    if held_out is None:
        return None
    labels = torch.tensor([label for _, label in samples])
    known = comparable(labels)
    paths = [samples[i][0] for i in known.tolist()]
    return Predictions(model.classes, paths, labels[known], held_out[known].softmax(dim=1).float())
