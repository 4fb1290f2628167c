"""The LightningModule: a stage flag that freezes the features or opens them, the step, the metrics."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection

from bcnn.data.sampler import PADDING, current_epoch
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.device import training_layout
from bcnn.utils.distributed import mean_over_ranks

Stage = Literal["last", "finetune"]


class Mean(MeanMetric):
    """Of what `value` makes of each image, of any number of them at a time, on any number of ranks.

    Args:
        value: (logits (batch, classes), labels (batch,)) → (batch,).
    """

    def __init__(self, value: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(nan_strategy="disable")  # to look for them would wait for the device
        self.value_of = value

    def update(self, logits: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        super().update(self.value_of(logits, labels))


def right(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """(batch,): 1 where the label is among the `k` likeliest, else 0."""
    return (logits.topk(k).indices == labels[:, None]).any(dim=1).float()


class BCNNModule(L.LightningModule):
    """Trains a `BCNN` in one of its two stages.

    Args:
        model: the network.
        stage: "last" trains the classifier over frozen features, "finetune" trains every layer.
        optimizer: parameter groups "features" and "classifier" → optimizer; None for a module that
            is only validated or tested.
        scheduler: (optimizer, total_steps=…) → schedule, stepped after every optimizer step, or a
            `ReduceLROnPlateau`, stepped after every epoch; None keeps the rate constant.
        loss: (logits, labels) → loss in training, by default cross-entropy, which is what validation
            and test report.
        centering: in training, take the batch's mean off the descriptors (see `Head`).
        polyak: c of the stochastic Polyak step size: a step is at most loss / (c·‖gradient‖²) long, in
            units of the gradient; None sets no limit. With momentum m, c = 0.5 / (1 - m) is the
            paper's 0.5, since a gradient then counts 1 / (1 - m) times (Loizou et al., "Stochastic
            Polyak Step-size for SGD", AISTATS 2021, §3).
        unfreeze_from: the first layer that "finetune" trains (see `Backbone.unfreeze_from`).

    Batches hold (inputs, labels); inputs are images (batch, 3, height, width), or descriptors
    (batch, width) that skip the features.
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
    ) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.loss = loss or nn.CrossEntropyLoss()
        if stage == "finetune":
            model.backbone.unfreeze_from(unfreeze_from)
            model.backbone.projection.requires_grad_(True)
        else:
            model.backbone.requires_grad_(False)
        model.head.batch_mean = centering
        self.polyak = polyak
        self._losses: list[Tensor] = []  # of the batches since the last step
        # Written into every checkpoint, so that nothing else is needed to use one.
        self.save_hyperparameters(
            {
                **model.description(),
                "stage": stage,
            },
            logger=False,  # loggers are told the whole configuration, under the same names
        )
        top5 = partial(right, k=min(5, len(model.classes)))
        # In groups, those that agree on the first batch would be one.
        metrics = MetricCollection({"top1": Mean(right), "top5": Mean(top5)}, compute_groups=False)
        self.train_metrics = metrics.clone(prefix="train_")
        metrics.add_metrics({"loss": Mean(partial(F.cross_entropy, reduction="none"))})
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")

    def setup(self, stage: str) -> None:
        if self.stage == "finetune":
            layout = training_layout(self.trainer.strategy.root_device, self.trainer.precision)
            self.model.backbone.to(memory_format=layout)

    def forward(self, inputs: Tensor) -> Tensor:
        """Images or descriptors → logits (batch, classes)."""
        if inputs.ndim == 2:
            return self.model.head(inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == "finetune"):
            descriptors = self.model.descriptor(inputs)
        return self.model.head(descriptors)

    def on_train_start(self) -> None:
        """Center the head on the training images, at the same logits; what is resumed is centered."""
        if self.model.head.batch_mean and current_epoch(self.trainer) == 0:
            self.model.head.center_on(self._mean_descriptor())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        inputs, labels = batch
        logits = self(inputs)
        cross_entropy = F.cross_entropy(logits, labels).detach()
        self.train_metrics.update(logits, labels)
        self.log("train_loss", cross_entropy, on_step=False, on_epoch=True, sync_dist=True)
        self._losses.append(cross_entropy)
        loss: Tensor = self.loss(logits, labels)
        weight = getattr(self.loss, "weight", None)
        if weight is not None:  # of each class: ranks count as their images weigh
            mine = weight[labels].sum()
            loss = loss * (mine / mean_over_ranks(mine))
        return loss

    def on_train_epoch_end(self) -> None:
        # In every step it would take a tenth as long as a step from the store.
        self.log_dict(self.train_metrics)
        if not sum(self.trainer.num_val_batches):  # nothing that would ask for it
            self.on_validation_epoch_start()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Limit the step by Polyak's step size: the one hook between the backward pass and the step."""
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        if self.polyak is not None:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler and getattr(optimizer, "_step_supports_amp_scaling", False):
                scaler.unscale_(optimizer)  # a fused one would do so in its step, after the limit
            loss = mean_over_ranks(loss)
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            # The schedule's factor is on the rate already: the limit is that of the rate at its start.
            # Without a loss there is no gradient either: no step, not one of 0 / 0.
            floor = torch.finfo(norm.dtype).tiny
            longest = loss / (self.polyak * optimizer.defaults["lr"] * norm).clamp(min=floor)
            # What `nn.utils.clip_grads_with_norm_` does, which waits for the device to say `longest`.
            torch._foreach_mul_(gradients, (longest / (norm + 1e-6)).clamp(max=1))
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_validation_epoch_start(self) -> None:
        """The mean of the training images under the weights of now is what an evaluation takes off."""
        training = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if self.model.head.batch_mean and training:
            self.model.head.mean.copy_(self._mean_descriptor())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._measure(self.val_metrics, batch)
        self.log_dict(self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._measure(self.test_metrics, batch)
        self.log_dict(self.test_metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Have callbacks write what was validated, as an average, into files of weights alone too:
        Lightning asks them where the whole state is saved, and adds what they go on from."""
        if "callbacks" not in checkpoint:
            names = [*checkpoint]
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_save_checkpoint(self.trainer, self, checkpoint)
            for name in checkpoint.keys() - names:
                del checkpoint[name]

    def configure_optimizers(self) -> Any:
        assert self.optimizer is not None
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.scheduler is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self.scheduler(optimizer, total_steps=steps)
        if isinstance(scheduler, ReduceLROnPlateau):
            return [optimizer], [{"scheduler": scheduler, "monitor": "val_loss"}]
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    @torch.no_grad()
    def _mean_descriptor(self) -> Tensor:
        """Mean descriptor (width,) of a sample of the training images under the weights of now.

        A running mean would lag behind the weights, whose every step moves it: Wu & Johnson,
        "Rethinking 'Batch' in BatchNorm", 2021, §3 ("precise BN").
        """
        total = torch.zeros_like(self.model.head.mean)
        count = total.new_zeros(())
        for images, labels in self.trainer.datamodule.sample_dataloader():  # type: ignore[attr-defined]
            with self.trainer.precision_plugin.forward_context():
                rows = self.model.descriptor(images.to(self.device))
            total += rows[labels != PADDING].sum(dim=0)
            count += (labels != PADDING).sum()
        return mean_over_ranks(total) / mean_over_ranks(count)

    def _measure(self, metrics: MetricCollection, batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        counted = labels != PADDING
        metrics.update(self(inputs)[counted], labels[counted])


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Linear warm-up over a share `warmup` of the steps, then half a cosine down to zero.

    Source: Loshchilov & Hutter, "SGDR", ICLR 2017, without restarts; Goyal et al. 2017 for the
    warm-up.
    In torch this is three schedulers, a `SequentialLR` of two others; here one formula of the step.
    """
    ramp = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < ramp:
            return (step + 1) / (ramp + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total_steps - ramp)))

    return LambdaLR(optimizer, factor)


def multistep(
    optimizer: Optimizer, total_steps: int, milestones: Sequence[float] = (0.5,), factor: float = 0.1
) -> MultiStepLR:
    """torch's `MultiStepLR`, of milestones that are shares of the steps."""
    steps = [round(share * total_steps) for share in milestones]
    return MultiStepLR(optimizer, steps, factor)


def reduce_on_plateau(
    optimizer: Optimizer, total_steps: int, factor: float = 0.1, patience: int = 1
) -> ReduceLROnPlateau:
    """torch's `ReduceLROnPlateau`, which has no use for the number of steps."""
    return ReduceLROnPlateau(optimizer, factor=factor, patience=patience)
