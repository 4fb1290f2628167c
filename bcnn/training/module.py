"""The LightningModule: it trains a network in one of two stages and measures it."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection

from bcnn.data.batches import Images
from bcnn.data.sampler import NO_LABEL, current_epoch
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training.distillation import divergence
from bcnn.utils.device import training_layout
from bcnn.utils.distributed import mean_over_ranks

Stage = Literal["last", "finetune"]

DEFAULT_LR = {"last": 10.0, "finetune": 3e-2}  # of SGD, as in conf/


class Mean(MeanMetric):
    """Mean of `value(logits, labels)` (batch,) over batches of any size and over all ranks."""

    def __init__(self, value: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(nan_strategy="disable")  # looking for nan would wait for the device
        self.value_of = value

    def update(self, logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        super().update(self.value_of(logits, labels))


def in_top_k(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Return (batch,): 1 where the label is among the `k` largest logits, else 0."""
    return (logits.topk(k).indices == labels[:, None]).any(dim=1).float()


class BCNNModule(L.LightningModule):
    """Trains a `BCNN` in one of its two stages, on batches of (inputs, labels).

    Inputs are images (batch, 3, height, width), or descriptors (batch, width), which skip the backbone.

    Args:
        stage: "last" trains the head on a frozen backbone, "finetune" trains every layer.
        optimizer: parameters → optimizer; None: SGD at the rate `DEFAULT_LR[stage]`.
        scheduler: (optimizer, total_steps=…) → schedule, stepped after every optimizer step, or a
            `ReduceLROnPlateau`, stepped after every epoch; None keeps the rate constant.
        loss: (logits, labels) → training loss; None: cross-entropy, which is always reported.
        centering: in training, take the batch's mean off the descriptors (see `Head`). The data
            module needs a `sample_dataloader` for it.
        polyak: c of the stochastic Polyak step size: a step is at most cross-entropy /
            (c·‖gradient‖²) long, in units of the gradient; None sets no limit. With momentum m,
            c = 0.5 / (1 - m) is the paper's 0.5, since a gradient then counts 1 / (1 - m) times
            (Loizou et al., "Stochastic Polyak Step-size for SGD", AISTATS 2021, §3).
        unfreeze_from: the first layer that "finetune" trains (see `Backbone.unfreeze_from`).
        teacher: images → probabilities (batch, classes) to learn from, in place of the labels; images
            may then have the label `NO_LABEL`.
    """

    def __init__(
        self,
        model: BCNN,
        stage: Stage,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
        loss: nn.Module | None = None,
        centering: bool = False,
        polyak: float | None = None,
        unfreeze_from: str | None = None,
        teacher: Callable[[Images], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.stage, self.scheduler, self.polyak = model, stage, scheduler, polyak
        self.teacher = teacher
        default = partial(torch.optim.SGD, lr=DEFAULT_LR[stage], momentum=0.9, weight_decay=1e-5)
        self.optimizer = optimizer or default
        self.loss = loss or nn.CrossEntropyLoss()
        if stage == "finetune":
            model.backbone.unfreeze_from(unfreeze_from)
            model.backbone.projection.requires_grad_(True)
        else:
            model.backbone.requires_grad_(False)
        model.head.batch_mean = centering
        self.train()  # a loaded model is in evaluation mode, and Lightning keeps the mode it finds
        self._losses: list[Tensor] = []  # of the batches since the last step
        # Loggers get the whole configuration instead, under the same names.
        self.save_hyperparameters({**model.description(), "stage": stage}, logger=False)
        top5 = partial(in_top_k, k=min(5, len(model.classes)))
        # In groups, metrics that agree on the first batch would be merged.
        metrics = MetricCollection({"top1": Mean(in_top_k), "top5": Mean(top5)}, compute_groups=False)
        self.train_metrics = metrics.clone(prefix="train_")
        metrics.add_metrics({"loss": Mean(partial(F.cross_entropy, reduction="none"))})
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **options: Any) -> Self:  # type: ignore[override]
        """Return the module of a file that `load_model` opens, with its stage or that of `options`."""
        if "stage" not in options:
            content = torch.load(checkpoint_path, "cpu", weights_only=True, mmap=True)
            options["stage"] = content["hyper_parameters"]["stage"]
        return cls(load_model(checkpoint_path), **options)

    def setup(self, stage: str) -> None:
        if self.stage == "finetune":
            layout = training_layout(self.trainer.strategy.root_device)
            self.model.backbone.to(memory_format=layout)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (batch, classes) of images or descriptors."""
        if inputs.ndim == 4:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == "finetune"):
                inputs = self.model.descriptor(inputs)
        return self.model.head(inputs)

    def on_fit_start(self) -> None:
        """Drop the calibration of the weights to start from."""
        self.model.calibration = self.hparams["calibration"] = None

    def on_train_start(self) -> None:
        """Center the head on the training images at the same logits; a resumed one is centered."""
        if self.model.head.batch_mean and current_epoch(self.trainer) == 0:
            self.model.head.center_on(self._mean_descriptor())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        inputs, labels = batch
        logits = self(inputs)
        if self.teacher is not None:
            return self._distil(logits, labels, self.teacher(inputs))
        cross_entropy = self._measure(logits, labels)
        self._losses.append(cross_entropy)
        loss: Tensor = self.loss(logits, labels)
        weight = getattr(self.loss, "weight", None)
        if weight is not None:  # class weights: a rank counts as much as its images weigh
            weight_here = weight[labels].sum()
            loss = loss * (weight_here / mean_over_ranks(weight_here))
        return loss

    def _distil(self, logits: Tensor, labels: Tensor, probabilities: Tensor) -> Tensor:
        """Return the loss of learning from a teacher's probabilities (batch, classes)."""
        known = labels != NO_LABEL
        if known.any():
            self._measure(logits[known], labels[known])
        loss = divergence(logits, probabilities)
        self._losses.append(loss.detach())
        return loss

    def _measure(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Update the training metrics, and return the cross-entropy."""
        cross_entropy = F.cross_entropy(logits, labels).detach()
        self.train_metrics.update(logits, labels)
        self.log(
            "train_loss",
            cross_entropy,
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(labels),
        )
        return cross_entropy

    def on_train_epoch_end(self) -> None:
        # Logging in every step would take a tenth of a step on cached descriptors.
        self.log_dict(self.train_metrics)
        if not sum(self.trainer.num_val_batches):  # no validation that would update the mean
            self.on_validation_epoch_start()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Limit the step to Polyak's step size, in the one hook between backward pass and step."""
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        plugin = self.trainer.precision_plugin
        scaler = getattr(plugin, "scaler", None)
        if scaler and optimizer.defaults.get("fused"):
            scaler.unscale_(optimizer)  # a fused step would unscale after the limits
        if self.polyak is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            # The schedule's factor is in the rate already: the limit is for the rate at its start.
            # A loss of zero has no gradient: 0 / tiny, not 0 / 0.
            loss = mean_over_ranks(loss).clamp(min=torch.finfo(norm.dtype).tiny)
            excess = self.polyak * optimizer.defaults["lr"] * norm.square() / loss
            nn.utils.clip_grads_with_norm_(parameters, max_norm=1.0, total_norm=excess)
        # Not `MixedPrecision`'s method, which takes gradients of a fused optimizer for scaled ones.
        algorithm = gradient_clip_algorithm or GradClipAlgorithmType.NORM
        Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def on_validation_epoch_start(self) -> None:
        """Set the head's mean, which evaluation takes off, to that under the current weights."""
        training = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if self.model.head.batch_mean and training:
            self.model.head.mean.copy_(self._mean_descriptor())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        counted = labels != NO_LABEL
        metrics = self.test_metrics if self.trainer.testing else self.val_metrics
        metrics.update(self(inputs)[counted], labels[counted])
        self.log_dict(metrics)

    test_step = validation_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out a calibration that this model lacks: a resumed stage has none yet."""
        state, own = checkpoint["state_dict"], self.state_dict()
        known = {name: state[name] for name in state if name in own or "calibration." not in name}
        checkpoint["state_dict"] = known

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Have callbacks put what was validated, such as an average, into weights-only files too."""
        if "callbacks" not in checkpoint:
            whole = {**checkpoint}  # callbacks add what only a full state needs
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_save_checkpoint(self.trainer, self, whole)
            checkpoint.update({name: whole[name] for name in checkpoint})

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.scheduler is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self.scheduler(optimizer, total_steps=steps)
        plateau = isinstance(scheduler, ReduceLROnPlateau)
        when = {"monitor": "val_loss"} if plateau else {"interval": "step"}
        return [optimizer], [{"scheduler": scheduler, **when}]

    @torch.no_grad()
    def _mean_descriptor(self) -> Tensor:
        """Return the mean descriptor (width,) of a sample of the training images."""
        # A running mean lags behind the weights: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021.
        total, count = torch.zeros_like(self.model.head.mean), torch.zeros((), device=self.device)
        for images, labels in self.trainer.datamodule.sample_dataloader():  # type: ignore[attr-defined]
            with self.trainer.precision_plugin.forward_context():
                descriptors = self.model.descriptor(images.to(self.device))
            total += descriptors[labels != NO_LABEL].sum(dim=0)
            count += (labels != NO_LABEL).sum()
        return mean_over_ranks(total) / mean_over_ranks(count)
