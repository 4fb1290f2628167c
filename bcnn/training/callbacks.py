"""Callbacks of a stage: seeds, the scale of float16 gradients, divergence, the table of epochs."""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision

from bcnn.data.sampler import current_epoch, derive_seed
from bcnn.training.checkpointing import BestOrLastCheckpoint
from bcnn.utils.console import logger, progress, span

LOSS_CHECK = 10  # steps from one check of the loss to the next on a GPU, which each check waits for
SCALE, GROWTH = 2.0**17, 200  # of float16 gradients: first scale, and steps after which it doubles
WORSE = 1.1  # times the loss of guessing, which the first steps from a zero head do not change


class SeededEpochs(L.Callback):
    """Makes a network's random draws in an epoch, such as dropout, a function of seed and epoch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # `on_train_epoch_start` is not called in the first epoch after resuming
            seed = derive_seed(self.seed, current_epoch(trainer))
            L.seed_everything(seed, workers=True, verbose=False)


class Float16(L.Callback):
    """Sets the scale of gradients in 16-mixed; idle in other precisions.

    A third of the gradients of conv1 to conv3 are too small for float16's full precision at torch's
    scale, 65,536, at which the largest are 9e3 of 65,504. A scale below 1 has skipped most steps.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        plugin = trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler:
            device = trainer.strategy.root_device.type
            plugin.scaler = torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=GROWTH)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler and scaler.get_scale() < 1:
            logger.warning(
                f"epoch {trainer.current_epoch + 1}: many steps were skipped because gradients are too "
                "large for float16: try trainer.precision=32-true"
            )


class TrainingDiverged(Exception):
    """A loss or a weight is not finite."""


class DivergenceMonitor(L.Callback):
    """Watches a stage's loss, weights and validation; raises TrainingDiverged where one is not finite.

    Messages end with `advice`, what to try.
    """

    def __init__(self, classes: int, checkpoint: BestOrLastCheckpoint, advice: str) -> None:
        self.guessing = math.log(classes)  # the cross-entropy of it
        self.checkpoint, self.advice = checkpoint, advice

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch, loss = batch_idx + 1, outputs["loss"]
        # The one place in a step that waits for the device. What is not finite stays so.
        if loss.device.type == "cpu" or self._batch % LOSS_CHECK == 0:
            self._check(trainer, "loss is", loss.isfinite())

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._check_weights(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        loss, top1 = float(metrics["train_loss"]), float(metrics.get("val_top1", math.nan))
        self._check_weights(trainer, pl_module)  # without validation images, nothing did before
        self._check(trainer, "loss is", math.isfinite(loss))
        if top1 < (start := self.checkpoint.start.get("val_top1", 0.0)) / 2:
            trouble = f"validation top-1 fell from {start:.1%} to {top1:.1%}"
        elif loss > WORSE * self.guessing:
            trouble = f"the training loss, {loss:.2f}, is above that of guessing, {self.guessing:.2f}"
        else:
            return
        logger.warning(f"epoch {trainer.current_epoch + 1}: {trouble}: {self.advice}")

    def _check_weights(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._check(trainer, "weights are", all(each.isfinite().all() for each in module.parameters()))

    def _check(self, trainer: L.Trainer, what: str, finite: Any) -> None:
        if not trainer.strategy.reduce_boolean_decision(bool(finite)):
            raise TrainingDiverged(
                f"the {what} not finite after batch {self._batch} of epoch "
                f"{trainer.current_epoch + 1}: {self.advice}"
            )


class EpochTable(L.Callback):
    """Logs a row an epoch: losses, validation top-1, rate, time; a bar may show the running epoch."""

    def __init__(self, checkpoint: BestOrLastCheckpoint, show: bool = True) -> None:
        self.checkpoint, self.show = checkpoint, show
        self._bar = ExitStack()

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("validating the start", sum(trainer.num_sanity_val_batches))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar.close()
        logger.info(table_row("epoch", "train loss", "val loss", "val top-1", "rate", "time"))
        if self.checkpoint.start and not self.checkpoint.resumed:
            logger.info(table_row("start", "–", *validation_cells(self.checkpoint.start), "–", "–"))
        self._begin("preparing the first epoch")  # a pass over images where the head is centered

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._start = time.monotonic()
            self._epoch = f"{trainer.current_epoch + 1}/{trainer.max_epochs}"
            batches = trainer.num_training_batches + sum(trainer.num_val_batches)
            self._begin(f"epoch {self._epoch}", batches)
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, *_: Any) -> None:
        self._task.advance()

    on_validation_batch_end = on_train_batch_end  # type: ignore[assignment]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics  # reduced over the ranks
        best = self.checkpoint.check_monitor_top_k(trainer, metrics.get("val_loss"))
        self._bar.close()
        cells = (f"{metrics['train_loss']:.3g}", *validation_cells(metrics), f"{self._rate:.3g}")
        row = table_row(self._epoch, *cells, span(time.monotonic() - self._start))
        logger.info(row + "  best so far" * bool(best))

    def teardown(self, *_: Any, **__: Any) -> None:
        self._bar.close()

    on_exception = teardown

    def _begin(self, what: str, batches: float = 0) -> None:
        self._bar.close()
        bar = progress(what, int(batches) or None, "batches", show=self.show)
        self._task = self._bar.enter_context(bar)


def table_row(first: str, *cells: str) -> str:
    """Return a row of the table of epochs or λ."""
    return f"{first:>7}" + "".join(f"{cell:>12}" for cell in cells)


def validation_cells(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """Return validation loss and top-1 as the table shows them; dashes without validation images."""
    if "val_loss" not in metrics:
        return "–", "–"
    return f"{metrics['val_loss']:.3g}", f"{metrics['val_top1']:.1%}"
