"""Stage `last` solved to its optimum, for one λ after the other."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from bcnn.model.network import BCNN
from bcnn.training.module import BCNNModule
from bcnn.training.solver import ConvexProblem, Rows


class ConvexModule(BCNNModule):
    """A `BCNNModule` of stage "last" whose epoch k holds the optimum for the k-th λ.

    Training reads `rows`, not the trainer's batches (give the trainer `limit_train_batches=1`);
    validation, test and checkpoints are `BCNNModule`'s.

    Args:
        model: the network.
        rows: descriptors (rows, 131328) to train on, read first in `setup`.
        labels: (rows,).
        l2: the λ, from strong to weak: each solution starts the next.
        loss: (logits, labels) → loss, convex in the logits; by default cross-entropy.
        tolerance: largest entry of the gradient at which a solution counts as converged.
    """

    def __init__(
        self,
        model: BCNN,
        rows: Rows,
        labels: Tensor,
        l2: Sequence[float],
        loss: nn.Module | None = None,
        tolerance: float = 1e-7,
    ) -> None:
        super().__init__(model, "last", loss=loss)
        self.automatic_optimization = False
        self.rows = rows
        self.labels = labels
        self.l2 = list(l2)
        self.tolerance = tolerance

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
        logits = solution.logits.to(self.device, torch.float32)
        self.train_metrics.update(logits, self.labels.to(self.device))
        loss, gradient_norm = solution.loss, solution.gradient_norm
        values = {"l2": l2, "gradient_norm": gradient_norm, "train_loss": loss}
        logged = {key: torch.as_tensor(value).float() for key, value in values.items()}
        self.log_dict(logged, on_step=False, on_epoch=True)

    def on_fit_end(self) -> None:
        # Gigabytes, and of no use to the stage after; the trainer holds a part, in the optimizer.
        del self.problem
        self.trainer.strategy.optimizers = []
