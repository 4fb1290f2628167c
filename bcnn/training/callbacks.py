"""Which epoch of a stage is kept, and what is said when training goes wrong."""

import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

CLEARLY = 1.1  # times the loss of guessing, which a step or two from a zero classifier leaves as it is


class CollapseGuard(L.Callback):
    """Watches a stage's loss and validation, and ends it where the loss is no number.

    Args:
        classes: their number: guessing has a cross-entropy of ln(classes).
        keep: knows the validation top-1 that the stage starts from, where it starts from something
            trained.
        advice: what to try, to end the sentence with.
    """

    def __init__(self, classes: int, keep: "KeepEpoch", advice: str) -> None:
        self.guessing = math.log(classes)
        self.keep = keep
        self.advice = advice

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        loss = float(metrics["train_loss"])
        top1 = float(metrics.get("val_top1", math.nan))
        if not math.isfinite(loss):
            trouble = "the loss is not finite, so training ends here with the best weights until now"
            trainer.should_stop = True
        elif top1 < (start := self.keep.start.get("val_top1", 0.0)) / 2:
            trouble = f"validation top-1 fell from {start:.1%} to {top1:.1%}"
        elif loss > CLEARLY * self.guessing:
            trouble = f"the training loss, {loss:.2f}, is above that of guessing, {self.guessing:.2f}"
        else:
            return
        trainer.print(f"epoch {trainer.current_epoch + 1}: {trouble}: {self.advice}")


class KeepEpoch(ModelCheckpoint):
    """Keeps the weights of one epoch of a stage, in `folder/best.ckpt`.

    It is the epoch of the least validation loss: of a hundred images, top-1 sees the one that just
    changed sides, the loss sees them all. A finetune keeps its last epoch, whose steps were the
    smallest, unless `no_worse` tells it from the best. Without validation images it is the last, in
    `last.ckpt`.

    A trainer that validates before it trains (`num_sanity_val_steps=-1`) says what a finetune starts
    from; that is logged as of step 0.

    Args:
        folder: to write to.
        images: number of validation images.
    """

    def __init__(self, folder: Path, images: int) -> None:
        super().__init__(
            folder,
            filename="best" if images else "last",
            monitor="val_loss" if images else None,
            save_weights_only=True,
        )
        self.images = images
        self.start: dict[str, float] = {}  # validation figures before the first step
        self.last: dict[str, float] = {}  # of the epoch just validated
        self.metrics: dict[str, float] = {}  # of the epoch that is kept

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = _validation(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(self.start, step=0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before = self.best_model_score
        super().on_train_epoch_end(trainer, pl_module)  # after the epoch's validation
        self.last = _validation(trainer)
        if self.best_model_score is not before:
            self.metrics = self.last

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self.start or not self.last:
            return
        start, last, best = (each["val_top1"] for each in (self.start, self.last, self.metrics))
        if no_worse(last, start, best, self.images):
            trainer.save_checkpoint(self.best_model_path, weights_only=True)
            self.metrics = self.last


def no_worse(last: float, start: float, best: float, images: int) -> bool:
    """Whether a finetune keeps its last epoch rather than its best one.

    The best of several epochs is so by luck as well: on few images it can be one of the first, of
    large steps and a lower test accuracy. The last is kept unless its validation accuracy is under
    that of the start, or under that of the best by more than a standard error (the rule of Breiman et
    al., "Classification and Regression Trees", 1984, §3.4.3); with two right and two wrong added, since
    all right would else have none (Agresti & Coull, The American Statistician 52, 1998).
    """
    share = (best * images + 2) / (images + 4)
    return last >= max(start, best - math.sqrt(share * (1 - share) / (images + 4)))


def _validation(trainer: L.Trainer) -> dict[str, float]:
    metrics: dict[str, Any] = trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items() if name.startswith("val_")}
