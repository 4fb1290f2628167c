"""What seeds the epochs of a stage, scales its gradients, and says when training goes wrong."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from bcnn.data.sampler import current_epoch, derive_seed
from bcnn.training.checkpointing import BestOrLastCheckpoint
from bcnn.utils import terminal

say = rank_zero_only(terminal.say)

LOOK = 10  # steps between two looks at the loss on a GPU, for which it has to be waited
SCALE, GROWTH = 2.0**17, 200  # of gradients in float16, at first, and steps after which it is doubled
MANY = 0.05  # of an epoch's steps
CLEARLY = 1.1  # times the loss of guessing, which a step or two from a zero classifier leaves as it is


class SeedEpochs(L.Callback):
    """Makes what a network draws in an epoch, such as dropout, a function of the seed and the epoch."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # `on_train_epoch_start` is not called in the first epoch after resuming
            L.seed_everything(
                derive_seed(self.seed, current_epoch(trainer)), workers=True, verbose=False
            )


class Float16(L.Callback):
    """The scale of the gradients in 16-mixed, and what it costs; nothing in other precisions.

    Of the gradients of conv1 to conv3 a third are too small for float16's full precision at torch's
    scale, 65,536, at which the largest come to 9e3 of 65,504: `SCALE` is twice that. One too large
    costs a step each time it is halved; one too small torch would double after 2,000 steps only.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        plugin = trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler:
            device = trainer.strategy.root_device.type
            plugin.scaler = torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=GROWTH)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._one = torch.ones((), device=pl_module.device)
            self._skipped = torch.zeros((), device=pl_module.device)
            self._steps = trainer.global_step
            self._scale = self._scaled(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        before, self._scale = self._scale, self._scaled(trainer)
        self._skipped += self._scale < before

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        skipped, steps = int(self._skipped), trainer.global_step - self._steps
        if skipped > steps * MANY:
            say(
                f"epoch {trainer.current_epoch + 1}: {skipped} of {steps} steps were left out, their "
                "gradients being too large for float16: try trainer.precision=32-true"
            )

    def _scaled(self, trainer: L.Trainer) -> Tensor:
        """The scale, which goes down when a step is left out; the device is not waited for."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return scaler.scale(self._one) if scaler else self._one


class TrainingDiverged(Exception):
    """Training led to a loss or weights that are no finite numbers."""


class DivergenceMonitor(L.Callback):
    """Watches a stage's loss, weights and validation.

    Args:
        classes: their number: guessing has a cross-entropy of ln(classes).
        keep: knows the validation top-1 that the stage starts from, where it starts from something
            trained.
        advice: what to try, to end the sentence with.

    Raises:
        TrainingDiverged: a loss is not finite, or weights are not at the end of an epoch, before these are
            validated or kept.
    """

    def __init__(self, classes: int, keep: BestOrLastCheckpoint, advice: str) -> None:
        self.guessing = math.log(classes)
        self.keep = keep
        self.advice = advice

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._first = torch.tensor(math.inf, device=pl_module.device)  # batch of no finite loss
            self._rates: list[float] = []
        self._rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = outputs["loss"]
        self._first = torch.where(loss.isfinite(), self._first, self._first.clamp(max=batch_idx))
        if loss.device.type == "cpu" or (batch_idx + 1) % LOOK == 0:
            self._refuse_loss(trainer)  # the one place in a step where the device is waited for

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._refuse_weights(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        loss = float(metrics["train_loss"])
        self._refuse_weights(trainer, pl_module)  # where there is nothing to validate on
        top1 = float(metrics.get("val_top1", math.nan))
        if top1 < (start := self.keep.start.get("val_top1", 0.0)) / 2:
            trouble = f"validation top-1 fell from {start:.1%} to {top1:.1%}"
        elif loss > CLEARLY * self.guessing:
            trouble = f"the training loss, {loss:.2f}, is above that of guessing, {self.guessing:.2f}"
        else:
            return
        say(f"epoch {trainer.current_epoch + 1}: {trouble}: {self.advice}")

    def _refuse_loss(self, trainer: L.Trainer) -> None:
        first = trainer.strategy.reduce(self._first, reduce_op="min")
        if first.isfinite():
            self._refuse(trainer, "loss is", int(first))

    def _refuse_weights(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._refuse_loss(trainer)
        if not all(parameter.isfinite().all() for parameter in pl_module.parameters()):
            self._refuse(trainer, "weights are", len(self._rates) - 1)

    def _refuse(self, trainer: L.Trainer, what: str, batch: int) -> None:
        raise TrainingDiverged(
            f"the {what} not finite after batch {batch + 1} of epoch {trainer.current_epoch + 1}, at a "
            f"rate of {self._rates[batch]:g}: {self.advice}"
        )
