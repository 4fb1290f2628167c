"""Stage `last` solved to its optimum, for one λ after the other."""

import logging
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
from torch import Tensor, nn

from bcnn.data.index import Samples
from bcnn.evaluation.predictions import Predictions
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


class Solved(NamedTuple):
    """The best solution for a network, which is in its head."""

    features: CachedFeatureDataModule  # of the network
    l2: float
    metrics: dict[str, float]  # of validation or cross-validation, if any
    held_out: HeldOut | None
    path: list[dict[str, float]]  # figures of each λ
    seconds: float


def solve_each(
    trainer: L.Trainer,
    candidates: Sequence[CachedFeatureDataModule],
    l2: Sequence[float],
    loss: nn.Module | None = None,
    folds: int | None = None,
) -> list[Solved]:
    """Train the head of each of several networks; every rank of the trainer solves the same problems.

    Args:
        candidates: descriptors by networks that differ in projection and pooling.
        l2, loss, folds: see `solve`.
    """
    first, *others = candidates
    first.beside = others
    _start(trainer, first)
    options = l2, loss, folds, trainer.strategy.root_device
    level = logging.DEBUG if others else logging.INFO
    return [solve(features, *options, level) for features in candidates]


def save_solution(trainer: L.Trainer, solved: Solved, folder: Path) -> Path:
    """Write best.ckpt, or last.ckpt where nothing chose λ, and log the figures of each λ."""
    _start(trainer, solved.features)
    file = folder / ("best.ckpt" if solved.metrics else "last.ckpt")
    trainer.save_checkpoint(file, weights_only=True)
    if trainer.is_global_zero:  # wandb uploads it where log_model asks for that
        saved = ModelCheckpoint(folder)
        saved.best_model_path = str(file)
        for each in trainer.loggers:
            for step, figures in enumerate(solved.path):
                each.log_metrics(figures, step)
            each.save()
            each.after_save_checkpoint(saved)
    return file


def solve(
    features: CachedFeatureDataModule,
    l2: Sequence[float],
    loss: nn.Module | None,
    folds: int | None,
    device: torch.device,
    level: int,
) -> Solved:
    """Train the head for each λ, and leave the best by validation loss in it.

    Several λ are compared until this loss no longer falls by a standard error; tenths of the last are
    added until then. Without validation images they are compared by cross-validation.

    Args:
        features: set up already.
        l2: the λ, solved from strong to weak: each solution starts the next.
        loss: (logits, labels) → loss, convex in the logits; None: cross-entropy.
        folds: of the cross-validation; None: there is none.
        level: of the table that is logged.
    """
    begin, model, data = time.monotonic(), features.model.to(device).eval(), features.data
    descriptors, labels = features.descriptors(data.train, views=2)
    problem = ConvexProblem(descriptors, labels, len(model.classes), loss, device, track)
    logger.log(level, f"solver: {problem.way}")
    fold = fold_numbers(labels, folds or 1, [data.groups[path] for path, _ in data.train])
    known = comparable(labels, fold)
    held_out = cache(lambda strength: problem.held_out(strength, fold).cpu()[known])
    strengths = sorted({*l2}, reverse=True)
    crossed = folds and not data.val and len(strengths) > 1 and len(known)
    if crossed:
        logger.log(level, f"no validation images: λ is chosen by {folds}-fold cross-validation")

    def judge(strength: float) -> tuple[Tensor, Tensor] | None:
        """Return logits and labels of images that the solution in the head has not seen."""
        if data.val:
            return _validate(model.head, *features.descriptors(data.val))
        return (held_out(strength), labels[known]) if crossed else None

    if len(strengths) > 1 and not data.val and not crossed:
        weakest = f"the weakest of last.l2, {strengths[-1]:.3g}, is kept"
        logger.warning(f"no validation images and no cross-validation choose λ: {weakest}")
    best, metrics, path = _solve_path(problem, model.head, strengths, judge, level)
    found = HeldOut(fold, known, labels[known], held_out(best)) if folds and len(known) else None
    return Solved(features, best, metrics, found, path, time.monotonic() - begin)


def _start(trainer: L.Trainer, features: CachedFeatureDataModule) -> None:
    """Have a trainer start its ranks, set up a data module and hold its network."""
    module = BCNNModule(features.model, "last")
    trainer.predict(module, datamodule=features, return_predictions=False)


def _solve_path(
    problem: ConvexProblem,
    head: Head,
    path: list[float],
    judge: Callable[[float], tuple[Tensor, Tensor] | None],
    level: int,
) -> tuple[float, dict[str, float], list[dict[str, float]]]:
    """Leave the best solution of a path, which grows, in the head; return its λ, its figures, all."""
    logger.log(level, table_row("λ", "train loss", "val loss", "val top-1", "time"))
    rows: list[dict[str, float]] = []
    losses: list[Tensor] = []  # of the images that judge, at each λ
    for number, strength in enumerate(path):
        start = time.monotonic()
        solution = problem.solve(strength)
        state = {"mean": problem.mean, "weight": solution.weight, "bias": solution.bias}
        head.load_state_dict(state)
        judged = judge(strength)
        metrics = _figures("val", *judged) if judged else {}
        improved = all(metrics.get("val_loss", 0.0) < row.get("val_loss", 1.0) for row in rows)
        if improved:
            best = strength, metrics, state
        train, took = _figures("train", solution.logits, problem.labels), span(time.monotonic() - start)
        cells = (f"{train['train_loss']:.3g}", *validation_cells(metrics), took)
        logger.log(
            level, table_row(f"{strength:.3g}", *cells) + "  best so far" * bool(improved and metrics)
        )
        solver = {"l2": strength, "gradient_norm": float(solution.gradient_norm)}
        rows.append({**solver, **train, **metrics})
        if judged:
            losses.append(F.cross_entropy(*judged, reduction="none"))
            if not _falls(losses) or metrics["val_loss"] < LOW_LOSS:
                break
            if number == len(path) - 1 > 0 and strength > 1.5 * MIN_L2:
                path.append(strength / 10)
    strength, metrics, state = best
    head.load_state_dict(state)
    return strength, metrics, rows


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
def _validate(head: Head, descriptors: Descriptors, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and labels of validation images."""
    starts = range(0, len(labels), BLOCK)
    logits = [head(descriptors[i : i + BLOCK].to(head.bias.device)).cpu() for i in starts]
    return torch.cat(logits), labels


def _figures(split: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
    logits, labels, top5 = logits.cpu(), labels.cpu(), min(5, logits.shape[1])
    return {
        f"{split}_loss": F.cross_entropy(logits, labels).item(),
        f"{split}_top1": in_top_k(logits, labels).mean().item(),
        f"{split}_top5": in_top_k(logits, labels, top5).mean().item(),
    }


def _falls(losses: Sequence[Tensor]) -> bool:
    """Return whether the last two losses of the same images fall by more than a standard error."""
    if len(losses) < 2:
        return True
    fall = losses[-2] - losses[-1]
    return bool(fall.mean() > fall.std(correction=0) / max(len(fall) - 1, 1) ** 0.5)
