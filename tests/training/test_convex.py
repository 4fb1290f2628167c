"""The convex solver, against other ways to the same optimum, and the module around it."""

import csv
import gc
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build, configure, folder_data, network, quiet_trainer, toy
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from bcnn.evaluation.predictions import Predictions
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training import solver
from bcnn.training.convex_stage import ConvexModule, fold_numbers
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.logistic_regression import ConvexProblem, cholesky, gram_matrix
from bcnn.training.run import run
from bcnn.training.run_state import StageResult
from bcnn.utils.errors import UserError

L2 = 1e-3
CLASSES = 3


@pytest.fixture
def rows() -> Tensor:
    """40 rows of unit length that are much alike, of three classes in turn."""
    generator = torch.Generator().manual_seed(0)
    noise, means = torch.randn(40, 90, generator=generator), torch.randn(3, 90, generator=generator)
    return F.normalize(5 + means.repeat(14, 1)[:40] + noise)


LABELS = torch.arange(40) % CLASSES


def objective(rows: Tensor, weight: Tensor, bias: Tensor, loss: nn.Module, l2: float = L2) -> Tensor:
    return loss(rows @ weight.mT + bias, LABELS) + l2 / 2 * weight.square().sum()


def test_gram_matrix_in_blocks(rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "BLOCK", 7)
    gram = gram_matrix(rows.half(), rows.half().float().mean(0))
    centred = rows.half().double() - rows.half().double().mean(0)
    torch.testing.assert_close(gram.double(), centred @ centred.mT, rtol=1e-5, atol=1e-6)


def test_gram_matrix_of_a_machine_that_allows_tf32(
    rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def centred(*arguments: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return original(*arguments)

    original = solver._centred
    monkeypatch.setattr(solver, "_centred", centred)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        gram_matrix(rows, rows.mean(0))
        assert seen == ["highest"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


class Counted:
    """Rows that count how many of them were read."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.read = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice, /) -> Tensor:
        self.read += len(self.rows[part])
        return self.rows[part]


@pytest.mark.parametrize("fits", [True, False])
def test_rows_are_read_once_where_there_is_room_for_them(
    rows: Tensor, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    monkeypatch.setattr(solver, "BLOCK", 7)
    monkeypatch.setattr(solver, "_room", lambda device: rows.nbytes if fits else rows.nbytes - 1)
    counted = Counted(rows)
    solution = ConvexProblem(counted, LABELS, CLASSES).solve(L2)
    assert (counted.read <= len(rows) + 1) == fits  # one to see how large they are
    assert torch.equal(solution.weight, ConvexProblem(rows, LABELS, CLASSES).solve(L2).weight)


def test_factor_of_a_matrix_that_rounding_left_indefinite() -> None:
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))  # rank 8 of 60
    gram = rows @ rows.mT
    assert torch.linalg.eigvalsh(gram.double()).min() < 0
    factor = cholesky(gram)
    assert (factor @ factor.mT - gram.double()).norm() / gram.norm() < 1e-5


def test_each_lift_is_added_to_the_matrix_itself() -> None:
    gram = torch.tensor([[1.0, 1 + 5e-5], [1 + 5e-5, 1.0]])  # needs the third
    lifted = gram.double() + 1e-4 * torch.eye(2, dtype=torch.float64)
    factor = cholesky(gram)
    torch.testing.assert_close(factor @ factor.mT, lifted, rtol=0, atol=1e-11)


def test_a_matrix_that_no_lift_can_mend() -> None:
    with pytest.raises(UserError, match=r"semi-definite.*last=sgd"):
        cholesky(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the most memory held at a time")
def test_a_matrix_is_factored_in_the_memory_of_its_factor() -> None:
    def kilobytes(name: str) -> int:
        return int(re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    gram = torch.eye(3000)
    Path("/proc/self/clear_refs").write_text("5")  # begins to look for the most anew
    before = kilobytes("VmRSS")
    factor = cholesky(gram)
    assert kilobytes("VmHWM") - before < 1.2 * factor.nbytes / 1024


def test_rows_that_are_not_finite(rows: Tensor) -> None:
    rows[3, 4] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        ConvexProblem(rows, LABELS, CLASSES)


def test_repeated_rows_are_no_obstacle(rows: Tensor) -> None:
    solution = ConvexProblem(rows[:3].repeat(14, 1)[:40], LABELS, CLASSES).solve(L2)
    assert torch.isfinite(solution.weight).all()
    assert torch.equal(solution.logits.argmax(1), LABELS)


@pytest.mark.parametrize(
    ("width", "remembered"), [(90, 30), (40, 30), (20, 30), (90, 2)]
)  # fewer rows than columns, as many, more; and with little memory
def test_solution_is_that_of_scikit_learn(
    rows: Tensor, width: int, remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows[:, :width]
    monkeypatch.setattr(solver, "HISTORY_BYTES", remembered * 2 * min(40, width) * CLASSES * 8)
    problem = ConvexProblem(rows, LABELS, CLASSES)
    assert problem.optimizer.param_groups[0]["history_size"] == remembered
    problem.solve(1e-2)
    solution = problem.solve(L2)
    weight = solution.weight.double()
    bias = solution.bias.double() - weight @ problem.mean.double()
    x = rows.double()
    reference = LogisticRegression(C=1 / (L2 * len(x)), tol=1e-10, max_iter=10_000)
    reference.fit(x.numpy(), LABELS.numpy())
    coefficients, intercepts = map(torch.tensor, (reference.coef_, reference.intercept_))
    loss = nn.CrossEntropyLoss()
    expected = objective(x, coefficients, intercepts, loss).item()
    assert objective(x, weight, bias, loss).item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(weight.numpy(), reference.coef_, atol=2e-3 * np.abs(weight).max())


@pytest.mark.parametrize("width", [90, 20])
def test_held_out_rows_are_called_as_scikit_learn_does_that_has_not_seen_them(
    rows: Tensor, width: int
) -> None:
    rows = rows[:, :width]
    folds = torch.arange(40) // 8
    problem = ConvexProblem(rows, LABELS, CLASSES)
    before = problem.solve(L2)
    logits = problem.held_out(L2, folds)
    for fold in range(5):
        seen, held = rows[folds != fold].double(), rows[folds == fold].double()
        reference = LogisticRegression(C=1 / (L2 * len(seen)), tol=1e-10, max_iter=10_000)
        reference.fit(seen.numpy(), LABELS[folds != fold].numpy())
        expected = torch.tensor(reference.predict_proba(held.numpy()))
        torch.testing.assert_close(logits[folds == fold].softmax(1), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(problem.solve(L2).weight, before.weight, rtol=1e-3, atol=1e-4)


def test_held_out_labels_of_no_meaning_are_not_known(rows: Tensor) -> None:
    """However weak the λ is that would draw a solution away from what it has seen before."""
    labels = torch.randint(2, (40,), generator=torch.Generator().manual_seed(1))
    problem = ConvexProblem(rows, labels, 2)
    assert torch.equal(problem.solve(1e-9).logits.argmax(1), labels)
    found = problem.held_out(1e-9, torch.arange(40) // 8).argmax(1)
    assert 0.25 < (found == labels).double().mean() < 0.75


def test_folds_have_of_every_class_as_many() -> None:
    labels = torch.tensor([0] * 12 + [1] * 5 + [2] * 3 + [3])
    folds = fold_numbers(labels, 5)
    assert folds[:12].tolist() == sorted(folds[:12].tolist())  # neighbours stay together
    assert folds[:12].bincount().tolist() in ([3, 2, 3, 2, 2], [3, 3, 2, 2, 2], [2, 3, 2, 3, 2])
    assert sorted(folds[12:17].tolist()) == [0, 1, 2, 3, 4]
    assert len(folds[17:20].unique()) == 3


@pytest.mark.slow
def test_a_wrong_label_is_found(images: Path, tmp_path: Path) -> None:
    blue = images / "train" / "blue" / "3.png"
    wrong = blue.rename(images / "train" / "green" / "wrong.png")
    options = ["stage=last", "data.val_fraction=0", f"output={tmp_path / 'out'}"]
    run(configure(*toy(images, *options)))
    with (tmp_path / "out" / "held_out.csv").open() as lines:
        found = {row["path"]: row for row in csv.DictReader(lines)}
    assert len(found) == 18  # all that are trained on
    mistaken = [row for row in found.values() if row["correct"] == "0"]
    assert [row["path"] for row in mistaken] == [str(wrong)]
    assert (mistaken[0]["class"], mistaken[0]["predicted"]) == ("green", "blue")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("Training photographs to look at") < page.index(str(wrong))


def test_without_validation_images_a_cross_validation_chooses_lambda(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels of no meaning: the weaker λ, the worse is what has not been seen."""
    for i, path in enumerate(sorted((images / "train").glob("*/*.png"))):
        path.rename(path.parents[1] / ("blue", "green", "red")[i % 3] / f"moved{i}.png")
    options = ["stage=last", "data.val_fraction=0", "last.l2=[1,1e-2,1e-4]", "last.folds=3"]
    top1 = run(configure(*toy(images, f"output={tmp_path / 'out'}", *options)))
    with (tmp_path / "out" / "last" / "metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["val_loss"]]
    losses = [float(row["val_loss"]) for row in rows]
    assert len(losses) == 3 and losses.index(min(losses)) == 0
    assert top1 == pytest.approx(float(rows[0]["val_top1"]))
    kept = load_model(tmp_path / "out" / "last" / "best.ckpt")
    folder = folder_data(images, val_fraction=0)
    data = build(CachedFeatureDataModule(folder, kept, "32-true"))
    problem = ConvexProblem(*data.means(folder.train), CLASSES)
    torch.testing.assert_close(kept.head.weight, problem.solve(1).weight, rtol=1e-4, atol=1e-6)
    with (tmp_path / "out" / "held_out.csv").open() as lines:
        right = [row["correct"] == "1" for row in csv.DictReader(lines)]
    assert np.mean(right) == pytest.approx(top1)
    printed = capsys.readouterr().out
    assert "3-fold cross-validation" in printed
    assert re.search(r"validation top-1 .* of the training images, each by classifiers", printed)


def test_a_class_of_one_image_is_left_out_of_the_cross_validation(images: Path) -> None:
    data = descriptors(images)
    samples = [sample for sample in data.images.train if sample[1] < 2][:9]
    samples += [sample for sample in data.images.train if sample[1] == 2][:1]
    module = ConvexModule(data.model, *data.means(samples), [1e-4], folds=3)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    found = module.held_out_predictions(samples)
    assert found is not None and found.paths == [path for path, label in samples if label < 2]


def test_images_alone_in_their_class_do_not_choose_lambda(rows: Tensor, tiny: BCNN) -> None:
    """None has learnt them where they are held out: their loss grows without end as λ falls."""
    labels = torch.cat([torch.arange(len(rows) - 5) % 2, torch.arange(2, 7)])
    module = ConvexModule(
        BCNN(list("abcdefg"), backbone={"name": "tiny"}), rows, labels, [1e-2], folds=4, choose=True
    )
    assert not module.cross_validates  # one λ
    module.problem = ConvexProblem(rows, labels, 7)
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    module._cross_validate(1e-2)
    assert module.held_out is not None
    found = module.val_metrics["loss"].compute()
    expected = F.cross_entropy(module.held_out[:-5], labels[:-5])
    torch.testing.assert_close(found, expected.float())
    alone = ConvexModule(tiny, rows[:3], torch.arange(3), [1, 0.1], folds=3, choose=True)
    assert not alone.cross_validates


@pytest.mark.parametrize("option", ["last.loss.label_smoothing=0.2", "last.class_weights=true"])
@pytest.mark.usefixtures("tiny")
def test_the_training_loss_is_cross_entropy_whatever_is_minimised(
    images: Path, tmp_path: Path, option: str
) -> None:
    for path in sorted((images / "train" / "red").glob("*.png"))[:3]:
        path.unlink()
    words = [
        "stage=last",
        "model.backbone.name=tiny",
        "last.l2=[1e-2]",
        option,
        f"output={tmp_path / 'o'}",
    ]
    run(configure(*toy(images, *words)))
    kept = load_model(tmp_path / "o" / "last" / "best.ckpt")
    folder = folder_data(images)
    means, labels = build(CachedFeatureDataModule(folder, kept, "32-true")).means(folder.train)
    with torch.no_grad():
        logits = kept.head(torch.as_tensor(means[:]).float())
    with (tmp_path / "o" / "last" / "metrics.csv").open() as lines:
        said = [float(row["train_loss"]) for row in csv.DictReader(lines) if row["train_loss"]]
    assert said == pytest.approx([F.cross_entropy(logits, labels).item()], rel=1e-3)


def test_what_was_held_out_is_kept_for_a_run_that_goes_on(tmp_path: Path) -> None:
    made = Predictions(["a", "b"], ["x", "y"], torch.tensor([0, 1]), torch.eye(2))
    (tmp_path / "last").mkdir()
    StageResult("last", tmp_path / "last" / "best.ckpt", {}, held_out=made).write(tmp_path)
    again = StageResult.read(tmp_path, "last")
    assert again is not None and again.held_out is not None
    assert (again.held_out.classes, again.held_out.paths) == (made.classes, made.paths)
    assert torch.equal(again.held_out.probabilities, made.probabilities)
    file = tmp_path / "last" / "held_out.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        StageResult.read(tmp_path, "last")


def test_solution_is_that_of_many_small_steps(rows: Tensor) -> None:
    """In float64, of another loss than the plain one, whose module the solver leaves as it is."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)
    solution = ConvexProblem(rows, LABELS, CLASSES, loss).solve(L2)
    assert loss.weight is not None and loss.weight.dtype == torch.float32
    x = rows.double() - rows.double().mean(0)
    weight = torch.zeros(CLASSES, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    loss.double()
    sgd = torch.optim.SGD([weight, bias], lr=8.0, momentum=0.95)
    for _ in range(500):
        sgd.zero_grad()
        objective(x, weight, bias, loss).backward()
        sgd.step()
    assert (solution.weight - weight).norm() / weight.norm() < 1e-3
    torch.testing.assert_close(solution.logits, x @ weight.mT + bias, rtol=0, atol=1e-3)
    torch.testing.assert_close(solution.loss, loss(x @ weight.mT + bias, LABELS), rtol=1e-4, atol=0)


def test_solution_is_that_of_the_formulas_as_they_stand(
    rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without blocks, and with the lift as a multiple of the identity."""
    monkeypatch.setattr(solver, "BLOCK", 16)
    before = rows.clone()
    problem = ConvexProblem(rows, LABELS, CLASSES)
    centred = rows - rows.mean(0)
    gram = (centred @ centred.mT).double()
    lift = 1e-6 * gram.diagonal().mean() + 1e-12
    factor = torch.linalg.cholesky(gram + lift * torch.eye(40, dtype=torch.float64))
    theta = torch.zeros(40, CLASSES, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    for l2 in (1e-2, L2):
        lbfgs = torch.optim.LBFGS(
            [theta, bias],
            max_iter=1000,
            history_size=30,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure(l2: float = l2, lbfgs: torch.optim.LBFGS = lbfgs) -> Tensor:
            lbfgs.zero_grad()
            value = objective(factor, theta.mT, bias, nn.CrossEntropyLoss(), l2)
            value.backward()
            return value

        lbfgs.step(closure)
        solution = problem.solve(l2)
        weight = torch.linalg.solve(factor.mT, theta.detach()).float().mT @ centred
        torch.testing.assert_close(solution.weight, weight, rtol=0, atol=1e-4 * weight.abs().max())
        torch.testing.assert_close(solution.bias, bias.detach().float(), rtol=0, atol=1e-4)
    assert torch.equal(rows, before)


def descriptors(root: Path) -> CachedFeatureDataModule:
    return build(CachedFeatureDataModule(folder_data(root, val_fraction=0), network(), "32-true"))


def test_the_path_leads_through_each_optimum(images: Path) -> None:
    data = descriptors(images)
    rows, labels = data.means(data.images.train)
    module = ConvexModule(data.model, rows, labels, [1e-2, 1e-4, 1e-6])
    problem = ConvexProblem(rows[:], labels, CLASSES)  # of a tensor
    seen: list[dict[str, float]] = []

    def look() -> None:
        seen.append({key: value.item() for key, value in module.trainer.callback_metrics.items()})
        solution = problem.solve(module.l2[module.current_epoch])
        assert torch.equal(module.model.head.weight, solution.weight)
        assert torch.equal(module.model.head.bias, solution.bias)
        logits = module.model.head(rows[:])  # by way of the model's own centering
        torch.testing.assert_close(logits, solution.logits.float(), rtol=1e-3, atol=2e-3)
        assert module.train_metrics.compute()["train_top1"] == 1

    module.on_train_epoch_end = look  # type: ignore[method-assign]
    trainer = quiet_trainer(max_epochs=3, limit_train_batches=1)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 3  # without steps there are no checkpoints
    assert [entry["l2"] for entry in seen] == pytest.approx([1e-2, 1e-4, 1e-6])
    losses = [entry["train_loss"] for entry in seen]
    assert losses[0] > 5 * losses[1] > 25 * losses[2]
    assert all(entry["gradient_norm"] < 1e-5 for entry in seen)


@pytest.mark.parametrize(
    ("losses", "path"),
    [
        ([3.0, 2.0, 1.0, 1.5], [1e-3, 1e-4, 1e-5, 1e-6]),  # better still, then worse
        ([3.0, 1.0, 2.0], [1e-3, 1e-4, 1e-5]),  # the best is inside of it
        ([3.0, 2.0, 1.999], [1e-3, 1e-4, 1e-5]),  # no better to speak of
        ([2.0, 1.0, *[1 / n for n in range(2, 20)]], [10.0**-n for n in range(3, 10)]),  # to the end
    ],
)
def test_the_path_goes_on_while_its_end_is_best(
    images: Path, losses: list[float], path: list[float]
) -> None:
    data = build(CachedFeatureDataModule(folder_data(images), network(), "32-true"))
    asked = path[: 2 if len(path) > 3 else 3]
    module = ConvexModule(data.model, *data.means(data.images.train), asked)
    validated = iter(losses)
    module.validation_step = lambda batch, batch_idx: module.log("val_loss", next(validated))  # type: ignore[method-assign]
    trainer = quiet_trainer(max_epochs=len(asked), limit_train_batches=1)
    trainer.fit(module, datamodule=data)
    assert module.l2 == pytest.approx(path)
    assert trainer.global_step == len(path)


def test_a_path_of_one_is_what_was_asked_for(images: Path) -> None:
    data = descriptors(images)
    module = ConvexModule(data.model, *data.means(data.images.train), [1e-4])
    quiet_trainer(max_epochs=1, limit_train_batches=1).fit(module, datamodule=data)
    assert module.l2 == [1e-4]


def test_the_problem_s_memory_is_free_after_the_fit(images: Path) -> None:
    data = descriptors(images)
    module = ConvexModule(data.model, *data.means(data.images.train), [L2])
    held: list[weakref.ref[Tensor]] = []
    module.on_train_end = lambda: held.extend(  # type: ignore[method-assign]
        weakref.ref(tensor) for tensor in (module.problem.factor, module.problem.theta)
    )
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(module, datamodule=data)
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    trainer.test(module, datamodule=data, verbose=False)  # needs none of it
