"""The LightningModule: a stage flag that freezes the features or opens them, the step, the metrics."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from bcnn.model import BCNN

Stage = Literal["last", "finetune"]


class BCNNModule(L.LightningModule):
    """Trains a `BCNN` in one of its two stages.

    Args:
        model: the network.
        stage: "last" trains the classifier over frozen features, "finetune" trains every layer.
        optimizer: parameters → optimizer; None for a module that is only validated or tested.
        scheduler: (optimizer, total_steps=…) → schedule, stepped after every optimizer step; None
            keeps the rate constant.
        centering: momentum of the descriptors' running mean in stage "finetune" (see `Centering`);
            0 leaves the mean as it is.

    Batches hold (inputs, labels); inputs are images (batch, 3, height, width), or descriptors
    (batch, 131328) that skip the features.
    """

    def __init__(
        self,
        model: BCNN,
        stage: Stage,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
        centering: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.optimizer = optimizer
        self.scheduler = scheduler
        model.features.requires_grad_(stage == "finetune")
        model.centering.momentum = centering
        # Written into every checkpoint, so that nothing else is needed to use one.
        self.save_hyperparameters(
            {
                "classes": model.classes,
                "size": model.size,
                "resize": model.resize,
                "stage": stage,
            }
        )
        count = len(model.classes)
        metrics = MetricCollection(
            {
                "top1": MulticlassAccuracy(count, average="micro"),
                "top5": MulticlassAccuracy(count, top_k=min(5, count), average="micro"),
            }
        )
        self.train_metrics = metrics.clone(prefix="train_")
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")

    def forward(self, inputs: Tensor) -> Tensor:
        """Images or descriptors → logits (batch, classes)."""
        if inputs.ndim == 2:
            return self.model.logits(inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == "finetune"):
            descriptors = self.model.descriptor(inputs)
        if self.training and self.model.centering.momentum and not self.model.centering.mean.any():
            self.model.center_on(descriptors.detach().mean(dim=0))  # a head that knew no centering
        return self.model.logits(descriptors)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        loss, _ = self._log_step("train", self.train_metrics, batch)
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss, logits = self._log_step("val", self.val_metrics, batch)
        # What the best epoch is chosen by: top-1, and among equals the lower cross-entropy.
        correct = (logits.argmax(1) == batch[1]).float().mean()
        self.log("val_score", correct - 1e-3 * loss, on_epoch=True, sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._log_step("test", self.test_metrics, batch)

    def configure_optimizers(self) -> Any:
        assert self.optimizer is not None
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.scheduler is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self.scheduler(optimizer, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _log_step(
        self, split: str, metrics: MetricCollection, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        inputs, labels = batch
        logits = self(inputs)
        loss = F.cross_entropy(logits, labels)
        metrics.update(logits, labels)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=split == "val")
        self.log(f"{split}_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss, logits


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Linear warm-up over a share `warmup` of the steps, then half a cosine down to zero.

    Source: Loshchilov & Hutter, "SGDR", ICLR 2017, without restarts; Goyal et al. 2017 for the
    warm-up.
    """
    ramp = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < ramp:
            return (step + 1) / (ramp + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total_steps - ramp)))

    return LambdaLR(optimizer, factor)
