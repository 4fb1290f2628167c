"""Multinomial logistic regression solved to its optimum in the span of its rows.

Mean cross-entropy + λ/2·‖W‖² is convex in the classifier W, and by the representer theorem its
solution is a combination of the training rows X: W = αᵀX. With K = XXᵀ = LLᵀ (Cholesky) and θ = Lᵀα
the logits of the rows are Lθ and ‖W‖² = ‖θ‖², so all that is left of a row's many columns is L (rows ×
rows), and L-BFGS on θ takes the same steps as on W itself. Where there are more rows than columns, X
is smaller than L and takes its place, and θ is Wᵀ.

The rows' mean is taken off them first, the bias being free to make up for it: descriptors are much
alike, and what they share would drown the differences in rounding and make the problem badly
conditioned.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bcnn.utils.device import double_device, without_tf32
from bcnn.utils.errors import UserError
from bcnn.utils.progress import track

# of the factor: in float32 and in float64 they are 1.7 GB
MAX_ENTRIES = 12_000**2

STEPS = 1000  # of L-BFGS at most, for one λ
FOLD_STEPS = 100  # for one fold, of which no weights are kept
HISTORY = 30  # steps that L-BFGS remembers, in two vectors as long as θ each
HISTORY_BYTES = 2**31  # that these may take; fewer are remembered then, and more steps taken

BLOCK = 512  # rows in memory at a time: 0.27 GB in float32


class Rows(Protocol):
    """A matrix (rows, width) of which slices of rows are asked for: a tensor, or one on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Tensor: ...


class Solution(NamedTuple):
    """The optimum for one λ: logits = (rows - mean) @ weight.mT + bias."""

    weight: Tensor  # (classes, width) in float32
    bias: Tensor  # (classes,) in float32
    loss: Tensor  # without λ/2·‖weight‖²; float64, as are the rest
    gradient_norm: Tensor
    logits: Tensor  # (rows, classes)


class ConvexProblem:
    """Rows and their labels, made ready to be solved for one λ after the other.

    Args:
        rows: (rows, width), of any floating type; read in blocks of `BLOCK`, time and again, but to a
            GPU with room for them only once.
        labels: (rows,), in 0..classes - 1.
        classes: how many.
        loss: (logits, labels) → loss, convex in the logits; by default cross-entropy.
        tolerance: largest entry of the gradient at which a solution counts as converged; λ where that
            is less.
        device: to multiply rows on; what is in float64 is computed where that is fast.

    Attributes:
        mean: of the rows, (width,) in float32.
        optimizer: L-BFGS on θ and the bias.

    Raises:
        UserError: the rows hold values that are not finite, or cannot be told apart in float32.
    """

    def __init__(
        self,
        rows: Rows,
        labels: Tensor,
        classes: int,
        loss: nn.Module | None = None,
        tolerance: float = 1e-7,
        device: torch.device | str = "cpu",
    ) -> None:
        device = torch.device(device)
        double = double_device(device)
        self.rows = rows = resident(rows, device, _room(device))
        self.labels = labels.to(double)
        self.tolerance = tolerance
        self.loss = copy.deepcopy(loss or nn.CrossEntropyLoss()).to(double, torch.float64)
        starts = range(0, len(rows), BLOCK)
        sums = [rows[i : i + BLOCK].to(device, torch.float32).sum(dim=0) for i in starts]
        self.mean = torch.stack(sums).sum(dim=0) / len(rows)
        if not self.mean.isfinite().all():
            raise UserError(
                "the descriptors hold values that are not finite: is the weights' file damaged?"
            )
        self.primal = len(rows) > len(self.mean)
        if self.primal:
            blocks = [_centred(rows, i, self.mean).to(double).double() for i in starts]
            self.factor = torch.cat(blocks)
        else:
            self.factor = cholesky(gram_matrix(rows, self.mean).to(double))
        self.theta = self.factor.new_zeros(self.factor.shape[1], classes).requires_grad_()
        remembered = min(HISTORY, max(1, HISTORY_BYTES // (2 * self.theta.nbytes)))
        self.bias = self.factor.new_zeros(classes).requires_grad_()
        self.optimizer = torch.optim.LBFGS(
            [self.theta, self.bias],
            max_iter=STEPS,
            history_size=remembered,
            tolerance_grad=tolerance,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

    def solve(
        self, l2: float, step: Callable[[Callable[[], Tensor]], object] | None = None
    ) -> Solution:
        """The optimum for λ = `l2`, from the last one solved for: go from strong to weak.

        Args:
            l2: λ.
            step: in the place of `optimizer.step`, for a trainer that counts steps.
        """

        self._descend(l2, slice(None), step or self.optimizer.step)
        gradients = [p.grad for p in (self.theta, self.bias) if p.grad is not None]
        with torch.no_grad():
            logits = self.factor @ self.theta + self.bias
            return Solution(
                self._weight(),
                self.bias.float(),
                self.loss(logits, self.labels),
                nn.utils.get_total_norm(gradients),
                logits,
            )

    def held_out(self, l2: float, folds: Tensor) -> Tensor:
        """What solutions, or nearly, say of rows that they have not seen, in cross-validation.

        Rows of the factor stand for the rows themselves, so a fold is the same problem with some left
        out of the loss, begun from the last solution. That one is left as it is.

        Args:
            l2: λ.
            folds: (rows,) numbers of the parts, of which one at a time is held out.

        Returns:
            Logits (rows, classes), in float64.
        """
        folds = folds.to(self.factor.device)
        logits = self.factor.new_empty(len(folds), len(self.bias))
        solved = [part.detach().clone() for part in (self.theta, self.bias)]
        (group,) = self.optimizer.param_groups
        group["max_iter"] = FOLD_STEPS
        for fold in track(folds.unique(), "cross-validation", unit="folds"):
            held = folds == fold
            with torch.no_grad():
                self.theta.zero_()
                self.bias.zero_()
            self._descend(l2, ~held, self.optimizer.step)
            with torch.no_grad():
                logits[held] = (self.factor @ self.theta + self.bias)[held]
        group["max_iter"] = STEPS
        with torch.no_grad():
            for part, value in zip((self.theta, self.bias), solved, strict=True):
                part.copy_(value)
        return logits

    def _descend(
        self, l2: float, seen: Tensor | slice, step: Callable[[Callable[[], Tensor]], object]
    ) -> None:
        """To the optimum on the rows that are seen, where it leaves the gradients."""
        # A gradient as large as λ tells nothing of the solution's length.
        self.optimizer.param_groups[0]["tolerance_grad"] = min(self.tolerance, l2)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            logits = self.factor @ self.theta + self.bias
            loss: Tensor = self.loss(logits[seen], self.labels[seen])
            value = loss + l2 / 2 * self.theta.square().sum()
            value.backward()
            return value

        step(closure)
        self.optimizer.state.clear()  # the curvature seen on this problem misleads on the next
        closure()

    @without_tf32()
    def _weight(self) -> Tensor:
        """W = αᵀX, a block of rows at a time."""
        if self.primal:
            return self.theta.mT.float()
        alpha = torch.linalg.solve_triangular(self.factor.mT, self.theta, upper=True)
        alpha = alpha.float().to(self.mean.device)
        weight = self.mean.new_zeros(alpha.shape[1], len(self.mean))
        for i in range(0, len(alpha), BLOCK):
            weight.addmm_(alpha[i : i + BLOCK].mT, _centred(self.rows, i, self.mean))
        return weight


def resident(rows: Rows, device: torch.device, room: int) -> Rows:
    """The rows on a device, read once, where they take no more than `room` bytes; else as they are."""
    if len(rows) * rows[:1].nbytes > room:
        return rows
    starts = range(0, len(rows), BLOCK)
    blocks = track(starts, "reading descriptors", unit="blocks")
    return torch.cat([rows[i : i + BLOCK].to(device) for i in blocks])


def _room(device: torch.device) -> int:
    """Bytes that rows may take on a device: a third of what is free, since `torch.cat` takes as much
    again. None on the CPU, where a block is read faster than it is multiplied."""
    return torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else 0


def cholesky(gram: Tensor) -> Tensor:
    """Lower factor, in float64, of a positive semi-definite matrix (n, n) in float32.

    Rows that repeat, and float32's rounding of the products, leave eigenvalues about or under zero;
    as little as lifts them above it is added to the diagonal, from a millionth of its mean.

    Raises:
        UserError: the matrix is not positive semi-definite, nor nearly.
    """
    mean = gram.diagonal().double().mean()
    factor = torch.empty_like(gram, dtype=torch.float64).mT  # by columns it is factored in place
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    for share in (1e-6, 1e-5, 1e-4, 1e-3):
        factor.copy_(gram).diagonal().add_(share * mean + 1e-12)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            return factor
    raise UserError(
        "rounding leaves the matrix of the descriptors' inner products not positive semi-definite: "
        "choose last=sgd, or trainer=cpu"
    )


@without_tf32()
def gram_matrix(rows: Rows, mean: Tensor) -> Tensor:
    """Inner products of the rows less `mean` (width,): (len(rows), len(rows)), in float32.

    Two blocks of rows are in memory at a time, so only the result grows with their number. A GPU that
    is fast in float64 multiplies in it: in float32 an H200 made a matrix of 2,640 rows of 131,328
    numbers that was not positive semi-definite.
    """
    fast = mean.device.type == "cuda" and double_device(mean.device) == mean.device
    dtype = torch.float64 if fast else torch.float32
    gram = mean.new_empty(len(rows), len(rows))
    for i in track(range(0, len(rows), BLOCK), "Gram matrix", unit="blocks"):
        left = _centred(rows, i, mean).to(dtype)
        for j in range(0, i + 1, BLOCK):
            right = left if i == j else _centred(rows, j, mean).to(dtype)
            product = left @ right.mT
            gram[i : i + BLOCK, j : j + BLOCK] = product
            gram[j : j + BLOCK, i : i + BLOCK] = product.mT
    return gram


def _centred(rows: Rows, start: int, mean: Tensor) -> Tensor:
    """The block of rows that begins at `start`, less `mean`."""
    return rows[start : start + BLOCK].to(mean, copy=True).sub_(mean)
