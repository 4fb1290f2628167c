"""Multinomial logistic regression solved to its optimum in the span of its descriptors.

Mean cross-entropy + λ/2·‖W‖² is convex in the classifier W, and by the representer theorem its
solution is a combination of the training descriptors X: W = αᵀX. With K = XXᵀ = LLᵀ (Cholesky) and
θ = Lᵀα the logits of the descriptors are Lθ and ‖W‖² = ‖θ‖², so all that is left of the wide
descriptors is L (n × n for n descriptors), and L-BFGS on θ takes the same steps as on W itself. Where
there are more descriptors than columns, X is smaller than L and takes its place, and θ is Wᵀ.

The mean descriptor is subtracted first, and the bias makes up for it: what descriptors share would
drown their differences in rounding and make the problem badly conditioned. The objective is divided by
λ: at a weak λ the first step along its gradient would be smaller than what float32 can add to θ.

What memory has no room for is read from disk: θ is Wᵀ then, and the centred descriptors are multiplied
block by block, twice for every step.
"""

import copy
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bcnn.utils.device import double_device, free_memory, without_tf32
from bcnn.utils.errors import UserError

GAIN = 1e-6  # of the objective: a round of steps that gains less is the last
FOLD_GAIN = 1e-4  # the same for a fold, of which only the held-out loss counts
ROUND = 10  # steps of L-BFGS
STEPS = 1000  # at most, for one λ
HISTORY = 30  # steps that L-BFGS remembers, in two vectors as long as θ each
HISTORY_BYTES = 2**31  # that these may take; a shorter history takes more steps

MEMORY_SHARE = 0.8  # of the free memory, that the matrix may take
BLOCK = 512  # descriptors in memory at a time: 0.27 GB in float32

Progress = Callable[..., Iterable[Any]]  # (parts, what, unit=…) → parts, as `bcnn.utils.console.track`


def no_progress(parts: Iterable[Any], what: str, *, unit: str) -> Iterable[Any]:
    return parts


class Descriptors(Protocol):
    """A matrix (n, width) that is read in slices: a tensor, or one on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Tensor: ...


class Solution(NamedTuple):
    """The optimum for one λ; logits = (descriptors - mean) @ weight.mT + bias."""

    weight: Tensor  # (classes, width) in float32
    bias: Tensor  # (classes,) in float32
    loss: Tensor  # of the logits, without λ/2·‖weight‖²; float64
    gradient_norm: Tensor  # of the objective, for θ
    logits: Tensor  # (n, classes) of the training descriptors, by this weight and bias; float32


class ConvexProblem:
    """Descriptors and labels, prepared to be solved for one λ after the other.

    Args:
        descriptors: (n, width), of any floating type; read in blocks, several times, or once where a
            GPU has room for them.
        loss: (logits, labels) → loss, convex in the logits; None: cross-entropy.
        device: that multiplies descriptors; the matrix is factored there or on the CPU.
    """

    def __init__(
        self,
        descriptors: Descriptors,
        labels: Tensor,
        classes: int,
        loss: nn.Module | None = None,
        device: torch.device | str = "cpu",
        progress: Progress = no_progress,
    ) -> None:
        device = torch.device(device)
        home = torch.device("cpu") if device.type == "mps" else device  # the loss is in float64
        self.descriptors = descriptors = _resident(descriptors, device, progress)
        self.labels, self.progress = labels.to(home), progress
        self.loss = copy.deepcopy(loss or nn.CrossEntropyLoss()).to(home, torch.float64)
        rows, starts = len(descriptors), range(0, len(descriptors), BLOCK)
        sums = [descriptors[i : i + BLOCK].to(device, torch.float32).sum(dim=0) for i in starts]
        self.mean = torch.stack(sums).sum(dim=0) / rows
        if not self.mean.isfinite().all():
            raise UserError("the descriptors are not finite: the file of weights may be damaged")
        self.bias = torch.zeros(classes, device=home)
        width, self.lower = len(self.mean), None
        self.factor: Dense | Triangular | Streamed
        # A Gram matrix is factored in float64 and then takes a third of that.
        size, double = (4 * width, home) if rows > width else (12 * rows, double_device(device))
        if rows * size > MEMORY_SHARE * free_memory(double):
            self.way = f"{rows:,} descriptors, more than memory holds, read for every step"
            self.factor = Streamed(descriptors, self.mean)
        elif rows > width:
            self.way = f"{rows:,} descriptors in memory"
            x = torch.empty(rows, width, device=home)
            for i in starts:
                x[i : i + BLOCK] = _centred(descriptors, i, self.mean)
            self.factor = Dense(x)
        else:
            self.way = f"Gram matrix of {rows:,} descriptors"
            lower = cholesky(gram_matrix(descriptors, self.mean, progress).to(double))
            self.lower = lower.to(self.bias)
            self.factor = Triangular(self.lower)
        self.theta = torch.zeros(width if self.lower is None else rows, classes, device=home)
        self.history = min(HISTORY, max(1, HISTORY_BYTES // (2 * self.theta.nbytes)))

    @without_tf32()
    def solve(self, l2: float) -> Solution:
        """Return the optimum for λ = `l2`, found from the previous one: go from strong to weak."""
        norm = self._minimise(self.theta, self.bias, l2, slice(None))
        with torch.no_grad():
            weight, bias, x = self._weight(), self.bias.clone(), self.descriptors
            # Not factor @ θ: what `cholesky` adds to the diagonal would tell equal descriptors apart.
            blocks = [_centred(x, i, self.mean) @ weight.mT for i in range(0, len(x), BLOCK)]
            logits = torch.cat(blocks) + bias.to(weight.device)
            loss = self.loss(logits.to(self.labels.device).double(), self.labels)
        return Solution(weight, bias, loss, norm, logits)

    @without_tf32()
    def held_out(self, l2: float, folds: Tensor) -> Tensor:
        """Return logits (n, classes) of descriptors by solutions that have not seen their fold (n,).

        Rows of the factor stand for descriptors: a fold is the same problem with some left out of the
        loss, solved from zero, so that a solution that is not quite at its optimum has not seen them. A
        stronger λ comes first: from zero, the first steps at a weak one are of little use.
        """
        folds = folds.to(self.bias.device)
        logits = self.bias.new_empty(len(folds), len(self.bias))
        for fold in self.progress(folds.unique(), "cross-validation", unit="folds"):
            held = folds == fold
            theta, bias = torch.zeros_like(self.theta), torch.zeros_like(self.bias)
            self._minimise(theta, bias, 10 * l2, ~held, gain=100 * FOLD_GAIN)
            self._minimise(theta, bias, l2, ~held, gain=FOLD_GAIN)
            logits[held] = (self.factor.times(theta) + bias)[held]
        return logits

    def _minimise(
        self, theta: Tensor, bias: Tensor, l2: float, seen: Tensor | slice, gain: float = GAIN
    ) -> Tensor:
        """Minimise over the descriptors that are seen; return the norm of the gradient there."""
        all_seen = isinstance(seen, slice)
        shown = iter(self.progress(count(), f"λ = {l2:.3g}", unit="steps") if all_seen else count())
        optimizer = torch.optim.LBFGS(
            [theta, bias],
            max_iter=ROUND,
            history_size=self.history,
            tolerance_grad=0,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            next(shown)
            logits = (self.factor.times(theta) + bias).double().requires_grad_()
            loss: Tensor = self.loss(logits[seen], self.labels[seen]) / l2
            gradient = torch.autograd.grad(loss, logits)[0].to(theta)
            theta.grad = self.factor.transposed_times(gradient) + theta
            bias.grad = gradient.sum(dim=0)
            return loss.detach() + theta.double().square().sum() / 2

        before = torch.inf
        for _ in range(STEPS // ROUND):
            objective = optimizer.step(closure).item()
            if before - objective <= gain * objective:
                break
            before = objective
        closure()
        return l2 * nn.utils.get_total_norm([p.grad for p in (theta, bias) if p.grad is not None])

    def _weight(self) -> Tensor:
        """Return W = αᵀX."""
        if self.lower is None:
            return self.theta.mT.to(self.mean.device, copy=True)
        alpha = torch.linalg.solve_triangular(self.lower.mT, self.theta, upper=True).to(self.mean)
        weight = self.mean.new_zeros(alpha.shape[1], len(self.mean))
        for i in range(0, len(alpha), BLOCK):
            weight.addmm_(alpha[i : i + BLOCK].mT, _centred(self.descriptors, i, self.mean))
        return weight


class Dense(NamedTuple):
    """The matrix (n, m) by which θ (m, classes) gives the logits of the descriptors, in memory."""

    matrix: Tensor

    def times(self, theta: Tensor) -> Tensor:
        return self.matrix @ theta

    def transposed_times(self, logits: Tensor) -> Tensor:
        return self.matrix.mT @ logits


class Triangular(NamedTuple):
    """The same for a lower triangular matrix: products leave out what is zero above its diagonal."""

    matrix: Tensor

    def times(self, theta: Tensor) -> Tensor:
        return torch.cat([block @ theta[: block.shape[1]] for block in self._blocks()])

    def transposed_times(self, logits: Tensor) -> Tensor:
        total = torch.zeros_like(logits)
        for block, part in zip(self._blocks(), logits.split(BLOCK), strict=True):
            total[: block.shape[1]].addmm_(block.mT, part)
        return total

    def _blocks(self) -> list[Tensor]:
        starts = range(0, len(self.matrix), BLOCK)
        return [self.matrix[i : i + BLOCK, : i + BLOCK] for i in starts]


class Streamed(NamedTuple):
    """The same for centred descriptors, read block by block, and multiplied where `mean` is."""

    descriptors: Descriptors
    mean: Tensor

    def times(self, theta: Tensor) -> Tensor:
        starts, right = range(0, len(self.descriptors), BLOCK), theta.to(self.mean)
        return torch.cat([_centred(self.descriptors, i, self.mean) @ right for i in starts]).to(theta)

    def transposed_times(self, logits: Tensor) -> Tensor:
        right, total = logits.to(self.mean), self.mean.new_zeros(len(self.mean), logits.shape[1])
        for i in range(0, len(self.descriptors), BLOCK):
            total.addmm_(_centred(self.descriptors, i, self.mean).mT, right[i : i + BLOCK])
        return total.to(logits)


def _resident(descriptors: Descriptors, device: torch.device, progress: Progress) -> Descriptors:
    """Return descriptors on the device, read once, if it has room for them; else as given."""
    if len(descriptors) * descriptors[:1].nbytes > _room(device):
        return descriptors
    starts = progress(range(0, len(descriptors), BLOCK), "reading descriptors", unit="blocks")
    return torch.cat([descriptors[i : i + BLOCK].to(device) for i in starts])


def _room(device: torch.device) -> int:
    """Return the bytes for descriptors: none on the CPU, where reading is faster than multiplying."""
    # On a GPU a third of the free memory, as `torch.cat` needs as much again.
    return torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else 0


def cholesky(gram: Tensor) -> Tensor:
    """Return the lower factor, in float64, of a positive semi-definite matrix (n, n) in float32.

    Repeated descriptors and float32's rounding of the products, leave eigenvalues about or below zero:
    a millionth of the diagonal's mean is added to it, or as little more as lifts them above zero.
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
        "the matrix of the descriptors' inner products is not positive semi-definite after rounding: "
        "choose last=sgd, or trainer=cpu"
    )


@without_tf32()
def gram_matrix(descriptors: Descriptors, mean: Tensor, progress: Progress = no_progress) -> Tensor:
    """Return inner products of the descriptors less `mean` (width,): (n, n), in float32.

    A GPU that is fast in float64 multiplies in it: in float32 an H200 made a matrix of 2,640
    descriptors of 131,328 numbers that was not positive semi-definite.
    """
    fast = mean.device.type == "cuda" and double_device(mean.device) == mean.device
    dtype = torch.float64 if fast else torch.float32
    gram = mean.new_empty(len(descriptors), len(descriptors))
    for i in progress(range(0, len(descriptors), BLOCK), "Gram matrix", unit="blocks"):
        left = _centred(descriptors, i, mean).to(dtype)
        for j in range(0, i + 1, BLOCK):
            right = left if i == j else _centred(descriptors, j, mean).to(dtype)
            product = left @ right.mT
            gram[i : i + BLOCK, j : j + BLOCK] = product
            gram[j : j + BLOCK, i : i + BLOCK] = product.mT
    return gram


def _centred(descriptors: Descriptors, start: int, mean: Tensor) -> Tensor:
    """Return the block of descriptors that begins at `start`, less `mean`."""
    return descriptors[start : start + BLOCK].to(mean, copy=True).sub_(mean)
