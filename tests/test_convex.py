"""The convex solver, against other ways to the same optimum."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build, folder_data, network, quiet_trainer
from sklearn.linear_model import LogisticRegression

from bcnn.store import VIEWS
from bcnn.training import convex
from bcnn.training.convex import ConvexModule, cholesky, gram_matrix
from bcnn.training.descriptors import DescriptorData

L2 = 1e-3


def solve(data: DescriptorData, l2: list[float]) -> ConvexModule:
    module = ConvexModule(data.model, data, l2)
    quiet_trainer(max_epochs=len(l2), limit_train_batches=1).fit(module, datamodule=data)
    return module


def problem(root: Path) -> tuple[DescriptorData, torch.Tensor, torch.Tensor]:
    """The store, its training rows (both views) in float64, and their labels."""
    folder = folder_data(root, val_fraction=0)
    data = build(DescriptorData(folder, network(), "32-true"))
    first = data.rows(folder.train)
    rows = data.read([row + view for view in range(VIEWS) for row in first]).double()
    return data, rows, torch.tensor([label for _, label in folder.train] * VIEWS)


def objective(rows: torch.Tensor, labels: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> float:
    return (F.cross_entropy(rows @ w.mT + b, labels) + L2 / 2 * w.square().sum()).item()


def test_gram_matrix_in_blocks(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, rows, _ = problem(images)
    monkeypatch.setattr(convex, "BLOCK", 7)
    samples = data.images.train
    indices = [row + view for view in range(VIEWS) for row in data.rows(samples)]
    mean = rows.mean(0)
    gram = gram_matrix(data, indices, mean.float())
    centred = rows - mean
    torch.testing.assert_close(gram.double(), centred @ centred.mT, rtol=1e-5, atol=1e-8)


def test_factor_of_a_matrix_that_rounding_left_indefinite() -> None:
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))  # rank 8 of 60
    gram = (rows @ rows.mT).double()
    assert torch.linalg.eigvalsh(gram).min() < 0
    factor = cholesky(gram)
    assert (factor @ factor.mT - gram).norm() / gram.norm() < 1e-5


def test_repeated_images_are_no_obstacle(images: Path) -> None:
    for path in sorted((images / "train").glob("*/*.png")):
        path.write_bytes((path.parent / "0.png").read_bytes())
    data, _, _ = problem(images)
    module = solve(data, [L2])
    assert torch.isfinite(module.model.classifier.weight).all()
    assert module.trainer.callback_metrics["train_top1"] == 1


@pytest.mark.slow
def test_solution_is_that_of_scikit_learn(images: Path) -> None:
    data, rows, labels = problem(images)
    model = solve(data, [1e-2, L2]).model
    weight = model.classifier.weight.detach().double()
    bias = model.classifier.bias.detach().double() - weight @ model.centering.mean.double()
    reference = LogisticRegression(C=1 / (L2 * len(rows)), tol=1e-10, max_iter=10_000)
    reference.fit(rows.numpy(), labels.numpy())
    expected = objective(
        rows, labels, torch.tensor(reference.coef_), torch.tensor(reference.intercept_)
    )
    assert objective(rows, labels, weight, bias) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(weight.numpy(), reference.coef_, atol=2e-3 * np.abs(weight).max())


@pytest.mark.slow
def test_solution_is_that_of_many_small_steps(images: Path) -> None:
    data, rows, labels = problem(images)
    head = solve(data, [L2]).model.classifier
    weight = torch.zeros(3, rows.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([weight, bias], lr=3.0, momentum=0.9)
    for _ in range(500):
        sgd.zero_grad()
        loss = F.cross_entropy(rows @ weight.mT + bias, labels) + L2 / 2 * weight.square().sum()
        loss.backward()
        sgd.step()
    error = (head.weight.double() - weight).norm() / weight.norm()
    assert error < 1e-3


def test_the_path_reports_each_optimum(images: Path) -> None:
    data, _, _ = problem(images)
    module = ConvexModule(data.model, data, [1e-2, 1e-4, 1e-6])
    seen: list[dict[str, float]] = []
    module.on_train_epoch_end = lambda: seen.append(  # type: ignore[method-assign]
        {key: value.item() for key, value in module.trainer.callback_metrics.items()}
    )
    quiet_trainer(max_epochs=3, limit_train_batches=1).fit(module, datamodule=data)
    assert [entry["l2"] for entry in seen] == pytest.approx([1e-2, 1e-4, 1e-6])
    losses = [entry["train_loss"] for entry in seen]
    assert losses[0] > 5 * losses[1] > 25 * losses[2]
    assert all(entry["gradient_norm"] < 1e-5 for entry in seen)
