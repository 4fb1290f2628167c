"""Says so when training goes wrong, in the epoch in which it does."""

import math

import lightning as L

CLEARLY = 1.1  # times the loss of guessing, which a step or two from a zero classifier leaves as it is


class CollapseGuard(L.Callback):
    """Watches a stage's loss and validation, and ends it where the loss is no number.

    Args:
        classes: their number: guessing has a cross-entropy of ln(classes).
        start: validation top-1 that the stage starts from, where it starts from something trained.
        advice: what to try, to end the sentence with.
    """

    def __init__(self, classes: int, start: float | None, advice: str) -> None:
        self.guessing = math.log(classes)
        self.start = start
        self.advice = advice

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        loss = float(metrics["train_loss"])
        top1 = float(metrics.get("val_top1", math.nan))
        if not math.isfinite(loss):
            trouble = "the loss is not finite, so training ends here with the best weights until now"
            trainer.should_stop = True
        elif self.start is not None and top1 < self.start / 2:
            trouble = f"validation top-1 fell from {self.start:.1%} to {top1:.1%}"
        elif loss > CLEARLY * self.guessing:
            trouble = f"the training loss, {loss:.2f}, is above that of guessing, {self.guessing:.2f}"
        else:
            return
        trainer.print(f"epoch {trainer.current_epoch + 1}: {trouble}: {self.advice}")
