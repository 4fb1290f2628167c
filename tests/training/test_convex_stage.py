"""Stage `last` by the convex solver: the path of λ, what chooses among them, what is written."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import build, folder_data, quiet_trainer, read_csv
from lightning.pytorch.loggers import CSVLogger

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training import convex_stage
from bcnn.training.convex_stage import Solved, comparable, fold_numbers, save_solution, solve_each
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.logistic_regression import ConvexProblem
from bcnn.training.module import BCNNModule

PATH = [1e-2, 1e-3, 1e-4]


def solve(
    images: Path, folder: Path, model: BCNN, *, val: float = 0.34, **options: object
) -> tuple[Path, Solved, list[dict[str, str]], CachedFeatureDataModule]:
    """Run the stage; its checkpoint and solution, the rows of metrics.csv, and the data."""
    data = CachedFeatureDataModule(folder_data(images, val_fraction=val), model, "32-true")
    trainer = quiet_trainer(logger=CSVLogger(folder, name="", version=""))
    (solved,) = solve_each(trainer, [data], **{"l2": PATH, **options})  # type: ignore[arg-type]
    checkpoint = save_solution(trainer, solved, folder)
    return checkpoint, solved, read_csv(folder / "metrics.csv"), data


def problem_of(data: CachedFeatureDataModule) -> ConvexProblem:
    return ConvexProblem(*data.descriptors(data.data.train, views=2), len(data.model.classes))


def test_the_best_lambda_is_kept_and_each_is_logged(images: Path, tmp_path: Path, tiny: BCNN) -> None:
    """The checkpoint opens in every way."""
    checkpoint, solved, rows, data = solve(images, tmp_path, tiny)
    assert [float(row["l2"]) for row in rows[:3]] == PATH
    assert [row["step"] for row in rows] == [str(k) for k in range(len(rows))]
    problem, weights = problem_of(data), []
    images_, labels = next(iter(data.data.evaluation_dataloader(data.data.val)))
    for row in rows:
        solution = problem.solve(float(row["l2"]))
        weights.append(solution.weight)
        with torch.no_grad():
            logits = (tiny.descriptor(images_) - problem.mean) @ solution.weight.mT + solution.bias
        assert float(row["val_loss"]) == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-2)
        assert float(row["train_loss"]) == pytest.approx(float(solution.loss), rel=1e-5)
        assert float(row["gradient_norm"]) < 1e-5
    losses = [float(row["val_loss"]) for row in rows]
    best = losses.index(min(losses))
    assert solved.metrics["val_loss"] == pytest.approx(losses[best])
    assert torch.equal(tiny.head.weight, weights[best])
    assert checkpoint == tmp_path / "best.ckpt"
    loaded, module = load_model(checkpoint), BCNNModule.load_from_checkpoint(checkpoint)
    for model in (loaded, module.model):
        assert all(torch.equal(a, tiny.state_dict()[name]) for name, a in model.state_dict().items())
    found = quiet_trainer().validate(module, datamodule=data, verbose=False)[0]
    assert found == pytest.approx(solved.metrics, rel=1e-5)


def test_without_validation_images_a_cross_validation_chooses_lambda(
    images: Path, tmp_path: Path, tiny: BCNN
) -> None:
    """Labels without meaning: the weaker λ, the worse are the predictions of unseen images."""
    for i, path in enumerate(sorted((images / "train").glob("*/*.png"))):
        path.rename(path.parents[1] / ("blue", "green", "red")[i % 3] / f"moved{i}.png")
    l2 = [1, 1e-2, 1e-6]
    checkpoint, solved, rows, data = solve(images, tmp_path, tiny, val=0, l2=l2, folds=3)
    losses = [float(row["val_loss"]) for row in rows]
    assert len(losses) == 2 and losses[0] < losses[1]  # a weaker one is not tried
    torch.testing.assert_close(tiny.head.weight, problem_of(data).solve(1).weight)
    assert solved.held_out is not None
    found = F.cross_entropy(solved.held_out.logits, solved.held_out.labels)
    assert found.item() == pytest.approx(solved.metrics["val_loss"], rel=1e-5)
    assert checkpoint.name == "best.ckpt"


def test_where_nothing_chooses_the_last_lambda_is_kept(
    images: Path, tmp_path: Path, tiny: BCNN, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, solved, rows, data = solve(images, tmp_path, tiny, val=0)
    assert "no cross-validation choose λ: the weakest of last.l2, 0.0001, is kept" in caplog.text
    assert (solved.metrics, solved.held_out, checkpoint.name) == ({}, None, "last.ckpt")
    assert len(rows) == len(PATH) and "val_loss" not in rows[0]
    weight = [problem.solve(l2).weight for problem in [problem_of(data)] for l2 in PATH][-1]
    assert torch.equal(tiny.head.weight, weight)


def test_images_alone_in_their_class_are_not_cross_validated(
    images: Path, tmp_path: Path, tiny: BCNN
) -> None:
    """No fold without them knows their class: their loss grows without end as λ falls."""
    for path in sorted((images / "train" / "red").glob("*.png"))[1:]:
        path.unlink()
    _, solved, rows, _ = solve(images, tmp_path, tiny, val=0, l2=[1e-1, 1e-3], folds=3)
    assert solved.held_out is not None
    assert {*solved.held_out.labels.tolist()} == {0, 1} and len(solved.held_out.images) == 12
    assert float(rows[-1]["val_loss"]) < 5


@pytest.mark.parametrize(
    ("losses", "asked", "path"),
    [
        ([3.0, 2.0, 1.0, 1.5], [1e-3, 1e-4], [1e-3, 1e-4, 1e-5, 1e-6]),  # better still, then worse
        ([3.0, 1.0, 2.0], PATH, PATH),  # the best is inside
        ([3.0, 2.0, 1.99], PATH, PATH),  # hardly better
        ([1.0, 2.0], PATH, PATH[:2]),  # worse at once
        ([1.0, 0.005], PATH, PATH[:2]),  # nothing left to gain
        (range(8, 0, -1), [1e-3, 1e-4], [10.0**-n for n in range(3, 10)]),  # to the end
        ([1.0], [1e-3], [1e-3]),  # one λ is what was asked for
        ([3.0, 2.0, 1.0, 2.0], [1e-3, 1e-2], [1e-2, 1e-3, 1e-4, 1e-5]),  # from strong to weak
    ],
)
def test_the_path_is_followed_while_the_loss_falls_by_a_standard_error(
    images: Path,
    tmp_path: Path,
    tiny: BCNN,
    monkeypatch: pytest.MonkeyPatch,
    losses: Iterable[float],
    asked: list[float],
    path: list[float],
) -> None:
    """Two images, whose losses differ by twice 0.01, now this, now that: the standard error is 0.02."""
    labels, signs = torch.tensor([0, 1]), torch.tensor([0.01, -0.01])
    means = iter(enumerate(losses))

    def validate(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        step, mean = next(means)
        loss = (mean + (-1) ** step * signs).clamp(min=1e-4)
        return F.one_hot(labels, 3) * -(loss.expm1() / 2).log()[:, None], labels

    monkeypatch.setattr(convex_stage, "_validate", validate)
    _, _, rows, _ = solve(images, tmp_path, tiny, l2=asked)
    assert [float(row["l2"]) for row in rows] == pytest.approx(path)


def test_the_loss_reported_is_cross_entropy_whatever_is_minimised(
    images: Path, tmp_path: Path, tiny: BCNN
) -> None:
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.2)
    _, _, rows, data = solve(images, tmp_path, tiny, l2=[1e-2], loss=loss)
    descriptors, labels = build(data).descriptors(data.data.train, views=2)
    with torch.no_grad():
        logits = tiny.head(descriptors[:])
    assert float(rows[0]["train_loss"]) == pytest.approx(
        F.cross_entropy(logits, labels).item(), rel=1e-4
    )


def test_folds_split_every_class_evenly() -> None:
    labels = torch.tensor([0] * 12 + [1] * 5 + [2] * 3 + [3])
    folds = fold_numbers(labels, 5, range(len(labels)))
    assert all(a <= b for a, b in pairwise(folds[:12].tolist()))  # neighbours stay together
    assert sorted(folds[:12].bincount().tolist()) == [2, 2, 2, 3, 3]
    assert sorted(folds[12:17].tolist()) == [0, 1, 2, 3, 4]
    assert len(folds[17:20].unique()) == 3
    assert comparable(labels, folds).tolist() == [*range(20)]


def test_a_loss_of_one_image_falls_or_does_not() -> None:
    assert convex_stage._falls([torch.tensor([2.0]), torch.tensor([1.0])])
    assert not convex_stage._falls([torch.tensor([1.0]), torch.tensor([2.0])])
