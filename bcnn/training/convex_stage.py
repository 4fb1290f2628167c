"""Stage `last` solved to its optimum, for one λ after the other."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from bcnn.evaluation.predictions import Predictions
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.logistic_regression import ConvexProblem, Rows
from bcnn.training.module import BCNNModule
from bcnn.utils import terminal

say = rank_zero_only(terminal.say)

LEAST = 1e-9  # the smallest λ that a path is extended to: less is lost in the factor's rounding
ENOUGH = 0.01  # validation loss under which there is nothing left to gain by it


class ConvexModule(BCNNModule):
    """A `BCNNModule` of stage "last" whose epoch k holds the optimum for the k-th λ.

    Training reads `rows`, not the trainer's batches (give the trainer `limit_train_batches=1`);
    validation, test and checkpoints are `BCNNModule`'s.

    Args:
        model: the network.
        rows: descriptors (images, width) to train on, read first in `setup`.
        labels: (images,).
        l2: the λ, from strong to weak: each solution starts the next. To several, tenths of the last
            are added while it has the lowest validation loss.
        loss: (logits, labels) → loss, convex in the logits; by default cross-entropy.
        tolerance: largest entry of the gradient at which a solution counts as converged.
        folds: parts of a cross-validation at the best λ, after all are solved; None: there is none.
        choose: of several λ the best by such a cross-validation at each, there being no validation
            images; what it says of the training images is logged as validation.

    Attributes:
        cross_validates: whether training images choose λ.
        held_out: logits (rows, classes) of each row by solutions that have not seen its fold.
    """

    held_out: Tensor | None = None

    def __init__(
        self,
        model: BCNN,
        rows: Rows,
        labels: Tensor,
        l2: Sequence[float],
        loss: nn.Module | None = None,
        tolerance: float = 1e-7,
        folds: int | None = None,
        choose: bool = False,
    ) -> None:
        super().__init__(model, "last", loss=loss)
        self.automatic_optimization = False
        self.rows = rows
        self.labels = labels
        self.l2 = list(l2)
        self.tolerance = tolerance
        self.folds = folds
        several = choose and folds is not None and len(self.l2) > 1
        self.cross_validates = several and len(learnt_elsewhere(labels)) > 0
        self._val_losses: list[float] = []  # a λ

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        device = self.trainer.strategy.root_device
        classes = len(self.model.classes)
        self.problem = ConvexProblem(self.rows, self.labels, classes, self.loss, self.tolerance, device)
        self.model.to(device).head.center_on(self.problem.mean.to(device))

    def configure_optimizers(self) -> Any:
        return self.problem.optimizer

    def training_step(self, batch: Any, batch_idx: int) -> None:
        l2 = self.l2[self.current_epoch]
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        # By the trainer's own step: it saves no checkpoint where it has counted none.
        solution = self.problem.solve(l2, optimizer.step)
        with torch.no_grad():
            self.model.head.weight.copy_(solution.weight)
            self.model.head.bias.copy_(solution.bias)
        logits = solution.logits.float().to(self.device)
        self.train_metrics.update(logits, self.labels.to(self.device))
        loss = nn.functional.cross_entropy(solution.logits, self.labels.to(solution.logits.device))
        values = {"l2": l2, "gradient_norm": solution.gradient_norm, "train_loss": loss}
        logged = {key: torch.as_tensor(value).float() for key, value in values.items()}
        self.log_dict(logged, on_step=False, on_epoch=True)
        if self.cross_validates:
            self._cross_validate(l2)

    def _cross_validate(self, l2: float) -> None:
        held_out = self._hold_out(l2)
        known = learnt_elsewhere(self.labels)
        logits, labels = held_out[known], self.labels[known]
        self.val_metrics.update(logits.float().to(self.device), labels.to(self.device))
        self.log_dict(self.val_metrics, on_step=False, on_epoch=True)
        loss = nn.functional.cross_entropy(logits, labels)
        if not self._val_losses or loss < min(self._val_losses):
            self.held_out = held_out

    def _hold_out(self, l2: float) -> Tensor:
        assert self.folds is not None
        return self.problem.held_out(l2, fold_numbers(self.labels, self.folds)).cpu()

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if "val_loss" in self.trainer.callback_metrics:
            self._val_losses.append(float(self.trainer.callback_metrics["val_loss"]))
            self._extend_path()

    def _extend_path(self) -> None:
        """Try a weaker λ where the last of several is the weakest, and the best by over a hundredth."""
        *before, loss = self._val_losses
        last = self.l2[-1]
        at_end = before and len(before) + 1 == len(self.l2) and last == min(self.l2)
        if at_end and ENOUGH < loss < 0.99 * min(before) and last > 1.5 * LEAST:
            self.l2.append(last / 10)
            say(f"the smallest λ is the best until now: {last / 10:g} too")
            self.trainer.fit_loop.max_epochs = len(self.l2)

    def on_fit_end(self) -> None:
        if self.folds is not None and self.held_out is None:
            losses = self._val_losses
            self.held_out = self._hold_out(self.l2[losses.index(min(losses)) if losses else -1])
        # Gigabytes, and of no use to the stage after; the trainer holds a part, in the optimizer.
        del self.problem
        self.trainer.strategy.optimizers = []

    def held_out_predictions(self, samples: Sequence[tuple[str, int]]) -> Predictions | None:
        """What the cross-validation said of the training images.

        Args:
            samples: (path, label), in the order of the rows; some are left out (`learnt_elsewhere`).
        """
        if self.held_out is None:
            return None
        paths, labels = zip(*samples, strict=True)
        truth = torch.tensor(labels)
        known = learnt_elsewhere(truth)
        shares = self.held_out.softmax(dim=1).float()
        kept = [paths[i] for i in known.tolist()]
        return Predictions(self.model.classes, kept, truth[known], shares[known])


def learnt_elsewhere(labels: Tensor) -> Tensor:
    """Which images are not alone in their class, which nobody learns where these are held out."""
    return (labels.bincount()[labels] > 1).nonzero()[:, 0]


def fold_numbers(labels: Tensor, folds: int) -> Tensor:
    """A fold for each image: of every class as many; neighbours, maybe of one series, in the same."""
    numbers = torch.empty_like(labels)
    for label in labels.unique():
        members = labels == label
        count = int(members.sum())
        # Classes of fewer images than folds begin with different folds.
        numbers[members] = (torch.arange(count) * folds // max(count, folds) + label) % folds
    return numbers
