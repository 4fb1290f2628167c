"""A row an epoch, that stays on the screen and in the log, and how far the one in progress has come."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_only

from bcnn.training.checkpointing import BestOrLastCheckpoint
from bcnn.utils import terminal
from bcnn.utils.progress import progress, span

say = rank_zero_only(terminal.say)


class EpochRows(L.Callback):
    """Says of every epoch its losses, validation accuracy, rate and time.

    Args:
        keep: knows what the stage starts from, and the best epoch yet.
        l2: the λ of a convex solver, one an epoch, in the place of a rate.
        show: how far an epoch has come, too.
    """

    def __init__(self, keep: BestOrLastCheckpoint, l2: Sequence[float] = (), show: bool = True) -> None:
        self.keep = keep
        self.l2 = l2
        self.show = show
        self.improved = True  # the latest epoch is the best yet
        self._rate = math.nan
        self._spans: list[float] = []  # seconds that epochs took
        self._shown = ExitStack()

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("validating the start", sum(trainer.num_sanity_val_batches))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shown.close()
        say(_row("epoch", "train loss", "val loss", "val top-1", "λ" if self.l2 else "rate", "time"))
        if self.keep.start and not self.keep.resumed:
            say(_row("start", "–", *_validation(self.keep.start), "–", "–"))
        self._begin("preparing the first epoch")  # a pass over images where the head is centered

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # `on_train_epoch_start` is not called in the first epoch after resuming
            self._start = time.monotonic()
            batches = trainer.num_training_batches + sum(trainer.num_val_batches)
            self._begin(f"epoch {_number(trainer)}", batches, lambda: self._left(trainer))
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, *_: Any) -> None:
        self._task.advance()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._task.advance()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics  # what ranks have to reduce together
        self.improved = self.keep.check_monitor_top_k(trainer, metrics.get("val_loss"))
        self._spans.append(time.monotonic() - self._start)
        self._shown.close()
        rate = self.l2[trainer.current_epoch] if self.l2 else self._rate
        figures = (f"{metrics['train_loss']:.3g}", *_validation(metrics), f"{rate:.3g}")
        best = "  best so far" if self.improved else ""
        say(_row(_number(trainer), *figures, span(self._spans[-1])) + best)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._shown.close()

    def on_exception(self, *_: Any) -> None:
        self._shown.close()

    def _begin(self, what: str, batches: float = 0, left: Callable[[], str] | None = None) -> None:
        self._shown.close()
        shown = progress(what, int(batches) or None, "batches", left, self.show)
        self._task = self._shown.enter_context(shown)

    def _left(self, trainer: L.Trainer) -> str:
        """Time left: of the stage, by the epochs that were timed; before, of the first one's steps."""
        if self.l2:  # each takes longer than the one before
            return ""
        if not self._spans:
            left = self._task.left_until(int(trainer.num_training_batches))
            return left and f"{left} of its steps"
        epochs = int(trainer.max_epochs or 0) - trainer.current_epoch
        seconds = epochs * sum(self._spans) / len(self._spans) - (time.monotonic() - self._start)
        stops = any(isinstance(each, EarlyStopping) for each in trainer.callbacks)  # type: ignore[attr-defined]
        return f"{'at most about' if stops else 'about'} {span(max(0.0, seconds))} left of the stage"


def _number(trainer: L.Trainer) -> str:
    return f"{trainer.current_epoch + 1}/{trainer.max_epochs}"


def _validation(metrics: Any) -> tuple[str, str]:
    if "val_loss" not in metrics:
        return "–", "–"
    return f"{metrics['val_loss']:.3g}", f"{metrics['val_top1']:.1%}"


def _row(epoch: str, *cells: str) -> str:
    return f"{epoch:>7}" + "".join(f"{cell:>12}" for cell in cells)
