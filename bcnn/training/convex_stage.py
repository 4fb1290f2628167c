"""Stage `last` solved to its optimum, for one λ after the other."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from bcnn.data.index import Samples
from bcnn.evaluation.predictions import Predictions
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.head import Head
from bcnn.training.callbacks import table_row, validation_cells
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.logistic_regression import BLOCK, ConvexProblem, Descriptors
from bcnn.training.module import BCNNModule, in_top_k
from bcnn.utils.console import logger, span, track

MIN_L2 = 1e-9  # the weakest λ that a path is extended to: less is lost in the factor's rounding
LOW_LOSS = 0.01  # validation loss below which a weaker λ has nothing left to gain


class HeldOut(NamedTuple):
    """Training images as classified by solutions that have not seen their fold."""

    folds: Tensor  # (n,), of all training images
    images: Tensor  # (m,), the indices of those that are not alone in their class
    labels: Tensor  # (m,)
    logits: Tensor  # (m, classes)

    def predictions(self, classes: list[str], samples: Samples) -> Predictions:
        """Return their predictions; `samples` are all training images."""
        paths = [samples[index][0] for index in self.images.tolist()]
        return Predictions(classes, paths, self.labels, self.logits.softmax(dim=1).float())


class ConvexResult(NamedTuple):
    checkpoint: Path
    metrics: dict[str, float]  # of validation or cross-validation, if any
    held_out: HeldOut | None


def run_convex_stage(
    trainer: L.Trainer,
    model: BCNN,
    features: CachedFeatureDataModule,
    *,
    l2: Sequence[float],
    folder: Path,
    loss: nn.Module | None = None,
    folds: int | None = None,
) -> ConvexResult:
    """Train the head for each λ, and keep the best by validation loss.

    To several λ, tenths of the last are added while it has the lowest validation loss. Without
    validation images, several λ are compared by cross-validation.

    Args:
        trainer: its ranks, device and loggers are used; every rank solves the same problem.
        l2: the λ, from strong to weak: each solution starts the next.
        folder: gets best.ckpt, or last.ckpt where nothing chooses λ.
        loss: (logits, labels) → loss, convex in the logits; None: cross-entropy.
        folds: of the cross-validation; None: there is none.
    """
    module = BCNNModule(model, "last")
    trainer.predict(module, datamodule=features, return_predictions=False)  # starts ranks, calls setup
    device, train, val = trainer.strategy.root_device, features.data.train, features.data.val
    model.to(device).eval()
    descriptors, labels = features.descriptors(train, views=2)
    problem = ConvexProblem(descriptors, labels, len(model.classes), loss, device, track)
    fold = fold_numbers(labels, folds or 1, [features.data.groups[path] for path, _ in train])
    known = comparable(labels, fold)
    held_out = cache(lambda strength: problem.held_out(strength, fold).cpu()[known])
    crossed = folds and not val and len(l2) > 1 and len(known)
    if crossed:
        logger.info(f"no validation images: λ is chosen by {folds}-fold cross-validation")

    def validate(strength: float) -> dict[str, float]:
        if val:
            return _validate(model.head, *features.descriptors(val))
        return _figures("val", held_out(strength), labels[known]) if crossed else {}

    best, metrics = _solve_path(problem, model.head, list(l2), validate, trainer.loggers)
    file = folder / ("best.ckpt" if metrics else "last.ckpt")
    trainer.save_checkpoint(file, weights_only=True)
    if trainer.is_global_zero:  # wandb uploads it where log_model asks for that
        saved = ModelCheckpoint(folder)
        saved.best_model_path = str(file)
        for each in trainer.loggers:
            each.after_save_checkpoint(saved)
    found = HeldOut(fold, known, labels[known], held_out(best)) if folds and len(known) else None
    return ConvexResult(file, metrics, found)


def _solve_path(
    problem: ConvexProblem,
    head: Head,
    path: list[float],
    validate: Callable[[float], dict[str, float]],
    loggers: Sequence[Logger],
) -> tuple[float, dict[str, float]]:
    """Leave the best solution of a path, which grows, in the head; return its λ and figures."""
    logger.info(table_row("λ", "train loss", "val loss", "val top-1", "time"))
    losses: list[float] = []
    for number, strength in enumerate(path):
        start = time.monotonic()
        solution = problem.solve(strength)
        state = {"mean": problem.mean, "weight": solution.weight, "bias": solution.bias}
        head.load_state_dict(state)
        metrics = validate(strength)
        improved = metrics.get("val_loss", 0.0) < min(losses, default=torch.inf)
        if improved or number == 0:
            best = strength, state, metrics
        train, took = _figures("train", solution.logits, problem.labels), span(time.monotonic() - start)
        row = (f"{strength:.3g}", f"{train['train_loss']:.3g}", *validation_cells(metrics), took)
        logger.info(table_row(*row) + "  best so far" * bool(improved and metrics))
        solver = {"l2": strength, "gradient_norm": float(solution.gradient_norm)}
        for each in loggers:
            each.log_metrics({**solver, **train, **metrics}, step=number)
            each.save()
        if metrics:
            losses.append(metrics["val_loss"])
            path += _weaker(path, losses)
    strength, state, metrics = best
    head.load_state_dict(state)
    return strength, metrics


def comparable(labels: Tensor, folds: Tensor) -> Tensor:
    """Return the indices of images whose class is in several folds: each solution still knows it."""
    counts = torch.stack([labels, folds], dim=1).unique(dim=0)[:, 0].bincount()
    return (counts[labels] > 1).nonzero()[:, 0]


def fold_numbers(labels: Tensor, folds: int, groups: Sequence[Hashable]) -> Tensor:
    """Return a fold for each image, one for a group: classes are split evenly.

    Neighbours, often a series, share one. A group counts for the class of most of its images.
    """
    classes: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for label, group in zip(labels.tolist(), groups, strict=True):
        classes[group][label] += 1
    members: dict[int, list[Hashable]] = defaultdict(list)
    for group, counts in classes.items():
        members[counts.most_common(1)[0][0]].append(group)
    numbers = {
        # Classes of fewer groups than folds begin with different folds.
        group: (rank * folds // max(len(names), folds) + label) % folds
        for label, names in members.items()
        for rank, group in enumerate(names)
    }
    return torch.tensor([numbers[group] for group in groups])


@torch.no_grad()
def _validate(head: Head, descriptors: Descriptors, labels: Tensor) -> dict[str, float]:
    starts = range(0, len(labels), BLOCK)
    logits = [head(descriptors[i : i + BLOCK].to(head.bias.device)) for i in starts]
    return _figures("val", torch.cat(logits), labels)


def _figures(split: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
    logits, labels, top5 = logits.cpu(), labels.cpu(), min(5, logits.shape[1])
    return {
        f"{split}_loss": F.cross_entropy(logits, labels).item(),
        f"{split}_top1": in_top_k(logits, labels).mean().item(),
        f"{split}_top5": in_top_k(logits, labels, top5).mean().item(),
    }


def _weaker(path: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Return a tenth of the last λ, where it is the weakest of several and the best by over 1 %."""
    *before, loss = losses
    at_end = before and len(losses) == len(path) and path[-1] == min(path)
    better = at_end and LOW_LOSS < loss < 0.99 * min(before)
    return [path[-1] / 10] if better and path[-1] > 1.5 * MIN_L2 else []
