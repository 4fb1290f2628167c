"""The convex solver, against other ways to the same optimum."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from bcnn.training import logistic_regression
from bcnn.training.logistic_regression import BLOCK, ConvexProblem, Triangular, cholesky, gram_matrix
from bcnn.utils.errors import UserError

L2 = 1e-3
CLASSES = 3
LABELS = torch.arange(40) % CLASSES


@pytest.fixture
def descriptors() -> Tensor:
    """40 similar descriptors of unit length, of three classes in turn."""
    generator = torch.Generator().manual_seed(0)
    noise, means = torch.randn(40, 90, generator=generator), torch.randn(3, 90, generator=generator)
    return F.normalize(5 + means.repeat(14, 1)[:40] + noise)


def objective(x: Tensor, weight: Tensor, bias: Tensor, loss: nn.Module, l2: float = L2) -> Tensor:
    return loss(x @ weight.mT + bias, LABELS) + l2 / 2 * weight.square().sum()


def scikit_learn(x: Tensor, labels: Tensor, l2: float = L2) -> LogisticRegression:
    reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000)
    return reference.fit(x.double().numpy(), labels.numpy())


class Counted:
    """Descriptors that count how many of them were read, and at which precision TF32 was allowed."""

    def __init__(self, descriptors: Tensor) -> None:
        self.descriptors, self.read = descriptors, 0
        self.precisions: set[str] = set()

    def __len__(self) -> int:
        return len(self.descriptors)

    def __getitem__(self, part: slice, /) -> Tensor:
        self.read += len(self.descriptors[part])
        self.precisions.add(torch.get_float32_matmul_precision())
        return self.descriptors[part]


def test_tf32_is_off_while_descriptors_are_multiplied(descriptors: Tensor) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        counted = Counted(descriptors)
        gram_matrix(counted, descriptors.mean(0))
        assert counted.precisions == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("fits", [True, False])
def test_descriptors_are_read_once_onto_a_device_with_room(
    descriptors: Tensor, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    monkeypatch.setattr(logistic_regression, "BLOCK", 7)
    room = descriptors.nbytes if fits else descriptors.nbytes - 1
    monkeypatch.setattr(logistic_regression, "_room", lambda device: room)
    counted = Counted(descriptors)
    solution = ConvexProblem(counted, LABELS, CLASSES).solve(L2)
    assert (counted.read <= len(descriptors) + 1) == fits  # one to see how large they are
    assert torch.equal(solution.weight, ConvexProblem(descriptors, LABELS, CLASSES).solve(L2).weight)


def test_each_lift_is_added_to_the_matrix_itself() -> None:
    gram = torch.tensor([[1.0, 1 + 5e-5], [1 + 5e-5, 1.0]])  # needs the third
    lifted = gram.double() + 1e-4 * torch.eye(2, dtype=torch.float64)
    factor = cholesky(gram)
    torch.testing.assert_close(factor @ factor.mT, lifted, rtol=0, atol=1e-11)


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_products_leave_out_the_zeros_of_a_triangular_matrix() -> None:
    side = 2 * BLOCK + 7
    matrix, right = torch.randn(side, side).double().tril(), torch.randn(side, 3).double()
    upper = torch.full_like(matrix, torch.nan).triu(BLOCK)  # far above the diagonal nothing is read
    found = Triangular(matrix + upper)
    torch.testing.assert_close(found.times(right), matrix @ right)
    torch.testing.assert_close(found.transposed_times(right), matrix.mT @ right)


def test_a_matrix_is_factored_in_the_memory_of_its_factor() -> None:
    def kilobytes(name: str) -> int:
        return int(re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    gram = torch.eye(3000)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = kilobytes("VmRSS")
    factor = cholesky(gram)
    assert kilobytes("VmHWM") - before < 1.2 * factor.nbytes / 1024


def test_descriptors_that_are_not_finite_are_a_sentence(descriptors: Tensor) -> None:
    descriptors[3, 4] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        ConvexProblem(descriptors, LABELS, CLASSES)


@pytest.mark.parametrize("width", [90, 20])  # fewer descriptors than columns, and more
def test_figures_are_those_of_the_weights_returned(descriptors: Tensor, width: int) -> None:
    """Equal descriptors with conflicting labels get equal logits, whatever lifts the matrix's rank."""
    x = descriptors[:10, :width].repeat(4, 1)
    labels = torch.arange(40) // 10 % CLASSES  # each descriptor has three labels
    problem = ConvexProblem(x, labels, CLASSES)
    solution = problem.solve(1e-9)
    logits = (x - problem.mean) @ solution.weight.mT + solution.bias
    torch.testing.assert_close(solution.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(solution.logits[:10], solution.logits[10:20], rtol=1e-5, atol=1e-5)
    assert (solution.logits.argmax(1) == labels).float().mean() <= 0.5
    torch.testing.assert_close(solution.loss.float(), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("l2", [L2, 1e-9])
@pytest.mark.parametrize(
    ("width", "remembered"), [(90, 30), (40, 30), (20, 30), (90, 2)]
)  # fewer descriptors than columns, as many, more; and with little memory
def test_solution_is_that_of_scikit_learn(
    descriptors: Tensor, width: int, remembered: int, l2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logistic_regression, "BLOCK", 7)
    x = descriptors[:, :width]
    bytes_ = remembered * 2 * min(40, width) * CLASSES * 4
    monkeypatch.setattr(logistic_regression, "HISTORY_BYTES", bytes_)
    problem = ConvexProblem(x, LABELS, CLASSES)
    assert problem.history == remembered
    problem.solve(10 * l2)
    solution = problem.solve(l2)
    weight = solution.weight.double()
    bias = solution.bias.double() - weight @ problem.mean.double()
    reference, loss = scikit_learn(x, LABELS, l2), nn.CrossEntropyLoss()
    coefficients, intercepts = map(torch.tensor, (reference.coef_, reference.intercept_))
    expected = objective(x.double(), coefficients, intercepts, loss, l2).item()
    assert objective(x.double(), weight, bias, loss, l2).item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(weight.numpy(), reference.coef_, atol=2e-3 * np.abs(weight).max())


@pytest.mark.parametrize("width", [90, 20])
def test_descriptors_that_memory_does_not_hold_are_read_and_have_the_same_solution(
    descriptors: Tensor, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, folds = descriptors[:, :width], torch.arange(40) // 8
    held = ConvexProblem(x, LABELS, CLASSES)
    needed = 12 * 40 * 40 if width > 40 else 4 * 40 * width  # to factor a matrix, or hold one
    monkeypatch.setattr(logistic_regression, "free_memory", lambda device: needed)
    monkeypatch.setattr(logistic_regression, "BLOCK", 7)
    counted = Counted(x)
    read = ConvexProblem(counted, LABELS, CLASSES)
    assert ("in memory" in held.way or "Gram" in held.way) and "more than memory holds" in read.way
    found = []
    for problem in (held, read):
        problem.solve(1e-2)
        solution = problem.solve(L2)
        found.append(solution.loss + L2 / 2 * solution.weight.double().square().sum())
    assert found[1].item() == pytest.approx(found[0].item(), rel=1e-5)
    assert counted.read > 400
    logits = [problem.held_out(L2, folds).softmax(1) for problem in (held, read)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("width", [90, 20])
def test_held_out_logits_are_those_of_scikit_learn_without_the_fold(
    descriptors: Tensor, width: int
) -> None:
    x = descriptors[:, :width]
    folds = torch.arange(40) // 8
    problem = ConvexProblem(x, LABELS, CLASSES)
    before = problem.solve(L2)
    logits = problem.held_out(L2, folds).double()
    for fold in range(5):
        held = folds == fold
        reference = scikit_learn(x[~held], LABELS[~held])
        expected = torch.tensor(reference.predict_proba(x[held].double().numpy()))
        torch.testing.assert_close(logits[held].softmax(1), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(problem.solve(L2).weight, before.weight, rtol=1e-3, atol=1e-4)


def test_the_solution_of_a_loss_with_options_has_no_gradient(descriptors: Tensor) -> None:
    """None that counts; the solver leaves the module of the loss unchanged."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)
    solution = ConvexProblem(descriptors, LABELS, CLASSES, loss).solve(L2)
    assert loss.weight is not None and loss.weight.dtype == torch.float32
    x = descriptors.double() - descriptors.double().mean(0)
    weight, bias = (p.double().requires_grad_() for p in (solution.weight, solution.bias))
    loss.double()
    objective(x, weight, bias, loss).backward()
    assert weight.norm() > 1 and max(p.grad.abs().max() for p in (weight, bias)) < 2e-5
    logits = x @ weight.mT + bias
    torch.testing.assert_close(solution.loss, loss(logits, LABELS), rtol=1e-5, atol=0)
