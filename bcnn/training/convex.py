"""Stage `last` solved to its optimum: multinomial logistic regression in the span of the rows.

With the features frozen, mean cross-entropy + λ/2·‖W‖² is convex in the classifier W, and by the
representer theorem its solution is a combination of the training rows X: W = αᵀX. With K = XXᵀ = LLᵀ
(Cholesky) and θ = Lᵀα the logits of the training rows are Lθ and ‖W‖² = ‖θ‖², so all that is left of
the 131,328 columns is L (rows × rows), and L-BFGS on θ takes the same steps as on W itself.

The rows' mean is taken off them first (`Centering`), the bias being free to make up for it:
descriptors are much alike, and what they share would drown the differences in rounding and make the
problem badly conditioned.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from rich.progress import track
from torch import Tensor, nn

from bcnn.errors import UserError
from bcnn.model.network import BCNN
from bcnn.store import VIEWS
from bcnn.training.descriptors import DescriptorData
from bcnn.training.module import BCNNModule

# rows × rows in float64, twice, is 2.3 GB at this many: 6,000 images in two views
MAX_ROWS = 12_000

BLOCK = 512  # rows in memory at a time: 0.27 GB in float32


class ConvexModule(BCNNModule):
    """A `BCNNModule` of stage "last" whose epoch k holds the optimum for the k-th λ.

    Training reads both views of every training image from the store, not the trainer's batches (give
    the trainer `limit_train_batches=1`); validation, test and checkpoints are `BCNNModule`'s.

    Args:
        model: the network.
        data: where the rows come from.
        l2: the λ, from strong to weak: each solution starts the next.
        loss: (logits, labels) → loss, convex in the logits; by default cross-entropy.
        tolerance: largest entry of the gradient at which a solution counts as converged.
    """

    def __init__(
        self,
        model: BCNN,
        data: DescriptorData,
        l2: Sequence[float],
        loss: nn.Module | None = None,
        tolerance: float = 1e-7,
    ) -> None:
        super().__init__(model, "last", loss=loss)
        self.automatic_optimization = False
        self.data = data
        self.l2 = list(l2)
        self.tolerance = tolerance

    def setup(self, stage: str) -> None:
        """Compute the Gram matrix of the training rows and its Cholesky factor."""
        if stage != "fit":
            return
        device = self.trainer.strategy.root_device
        samples = self.data.images.train
        self.rows = [first + view for view in range(VIEWS) for first in self.data.rows(samples)]
        labels = [label for _, label in samples] * VIEWS
        self.targets = torch.tensor(labels, device=device)
        sums = [block.sum(dim=0) for block in self._blocks(device)]
        mean = torch.stack(sums).sum(dim=0) / len(self.rows)
        self.model.to(device).head.center_on(mean)
        self.loss.to(device).double()
        gram = gram_matrix(self.data, self.rows, mean).double()
        self.factor = cholesky(gram)
        # Plain tensors, not parameters: they are no part of the model or its checkpoints.
        classes = len(self.model.classes)
        self.theta = gram.new_zeros(len(labels), classes).requires_grad_()
        self.bias = gram.new_zeros(classes).requires_grad_()

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(
            [self.theta, self.bias],
            max_iter=1000,
            history_size=30,
            tolerance_grad=self.tolerance,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        l2 = self.l2[self.current_epoch]
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)

        def objective() -> tuple[Tensor, Tensor]:
            logits = self.factor @ self.theta + self.bias
            return self.loss(logits, self.targets), logits

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = objective()[0] + l2 / 2 * self.theta.square().sum()
            self.manual_backward(value)
            return value

        optimizer.state.clear()  # the curvature seen on the last λ's problem misleads on this one
        optimizer.step(closure)
        closure()  # for the gradient at the solution
        gradients = [p.grad for p in (self.theta, self.bias) if p.grad is not None]
        gradient_norm = nn.utils.get_total_norm(gradients)
        with torch.no_grad():
            loss, logits = objective()
            self._write_classifier()
        self.train_metrics.update(logits, self.targets)
        values = {"l2": l2, "gradient_norm": gradient_norm, "train_loss": loss}
        logged = {key: torch.as_tensor(value).float() for key, value in values.items()}
        self.log_dict(logged, on_step=False, on_epoch=True)
        self.print(f"λ = {l2:g}: cross-entropy {loss:.4f}, gradient norm {gradient_norm:.1e}")

    def _write_classifier(self) -> None:
        """W = αᵀX, a block of rows at a time."""
        alpha = torch.linalg.solve_triangular(self.factor.mT, self.theta, upper=True).float()
        weight = torch.zeros_like(self.model.head.weight)
        for part, block in zip(alpha.split(BLOCK), self._blocks(weight.device), strict=True):
            weight.addmm_(part.mT, block.sub_(self.model.head.mean))
        self.model.head.weight.copy_(weight)
        self.model.head.bias.copy_(self.bias)

    def _blocks(self, device: torch.device) -> Iterator[Tensor]:
        for start in range(0, len(self.rows), BLOCK):
            yield self.data.read(self.rows[start : start + BLOCK]).to(device, torch.float32)


def cholesky(gram: Tensor) -> Tensor:
    """Lower factor of a positive semi-definite matrix (n, n) in float64.

    Rows that repeat, and float32's rounding of the products, leave eigenvalues about or under zero;
    as little as lifts them above it is added to the diagonal, from a millionth of its mean.
    """
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for share in (1e-6, 1e-5, 1e-4, 1e-3):
        lift = share * gram.diagonal().mean() + 1e-12
        factor, failed = torch.linalg.cholesky_ex(gram + lift * identity)
        if not failed:
            return factor
    raise UserError("the descriptors hold values that are not finite: is the weights' file damaged?")


def gram_matrix(data: DescriptorData, rows: Sequence[int], mean: Tensor) -> Tensor:
    """Inner products of the store's rows less `mean`: (len(rows), len(rows)), in float32.

    Two blocks of rows are in memory at a time, so only the result grows with their number.
    """

    def block(start: int) -> Tensor:
        return data.read(rows[start : start + BLOCK]).to(mean).sub_(mean)

    gram = mean.new_empty(len(rows), len(rows))
    for i in track(range(0, len(rows), BLOCK), "Gram matrix", transient=True):
        left = block(i)
        for j in range(0, i + 1, BLOCK):
            right = left if i == j else block(j)
            product = left @ right.mT
            gram[i : i + BLOCK, j : j + BLOCK] = product
            gram[j : j + BLOCK, i : i + BLOCK] = product.mT
    return gram
