"""`model/pooling=auto`: what is compared, what is kept, and what the run is afterwards."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FINETUNE, SMALL, build, configure, folder_data, read_csv, run, toy
from torch import Tensor

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training.choose_pooling import choose_pooling, make_candidates
from bcnn.training.convex_stage import HeldOut, Solved
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.feature_store import VIEWS
from bcnn.training.module import BCNNModule
from bcnn.training.run import train
from bcnn.utils.errors import UserError

CHOICES = [{"name": "average"}, {"name": "sqrt", "project": 2}, {"name": "bilinear"}]
AUTO = ["model/pooling=auto", SMALL]


def candidates(
    images: Path, model: BCNN, choices: Sequence[dict[str, Any]] = CHOICES, largest: int = 100
) -> list[CachedFeatureDataModule]:
    """Descriptors of the only layer of this model."""
    cpu = torch.device("cpu")
    (found,) = make_candidates(model, choices, largest, folder_data(images), cpu, "32-true")
    return found


@pytest.fixture
def bare(tiny: BCNN) -> BCNN:
    return tiny.with_pooling({"name": "average"})


def test_one_pass_makes_all_descriptors_that_are_missing(
    images: Path, bare: BCNN, passes: list[int]
) -> None:
    build(candidates(images, bare)[1])  # those of the projection are there already
    passes.clear()
    first, *first.beside = found = candidates(images, bare)
    build(first)
    data = first.data
    assert not data.test
    assert len(data.train) * VIEWS + len(data.val) <= sum(passes) <= 24 * VIEWS
    passes.clear()
    pixels, _ = next(iter(data.evaluation_dataloader(data.val)))
    for each in found:
        with torch.no_grad():
            expected = each.model.descriptor(pixels)
        descriptors, _ = each.descriptors(data.val)
        torch.testing.assert_close(descriptors[:].float(), expected, rtol=1e-3, atol=1e-6)
    for each in candidates(images, bare):
        build(each)
    assert sum(passes) == len(found) * len(pixels)  # those of this test


def test_candidates_that_do_not_suit_the_backbone_are_left_out(images: Path, bare: BCNN) -> None:
    unsuited = [{"project": 4}, {"name": "compact", "width": 101}, {"level": -2}]
    choices = [*CHOICES, *({"name": "sqrt"} | options for options in unsuited)]
    names = [each.model.chosen["pooling"]["name"] for each in candidates(images, bare, choices)]
    assert names == ["average", "sqrt", "bilinear"]
    with pytest.raises(UserError, match="none suits this backbone"):
        candidates(images, bare, largest=1)


def solved(width: int, losses: Sequence[float], level: int = -1) -> Solved:
    """A solution with these cross-validated losses of images, whose class is the first of two."""
    logits = torch.stack([Tensor(losses).expm1().log().neg(), torch.zeros(len(losses))], dim=1)
    count = torch.arange(len(losses))
    held_out = HeldOut(count, count, torch.zeros(len(losses), dtype=torch.long), logits)
    backbone = {"name": "timm", "level": level}
    chosen = {"backbone": backbone, "pooling": {"name": f"of {width}"}, "project": None}
    model = SimpleNamespace(chosen=chosen, classes=["a", "b"])
    features = SimpleNamespace(store=SimpleNamespace(width=width), model=model)
    return Solved(features, 1e-4, {}, held_out, [], 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("means", "kept"),
    [
        ([0.5, 0.6, 0.7], 30),  # the lowest loss is that of the narrowest
        ([0.5, 0.45, 0.7], 30),  # the lowest is less than a standard error, 0.1, better
        ([0.5, 0.3, 0.25], 60),
        ([0.9, 0.6, 0.3], 90),
    ],
)
def test_the_narrowest_within_a_standard_error_of_the_lowest_loss_is_kept(
    tmp_path: Path, means: list[float], kept: int
) -> None:
    """The error is that of the difference: how hard the images are does not count."""
    spread = 0.1 * 5**0.5 * Tensor([-1, 1, -1, 1, 0])  # its standard error is 0.1
    lowest, hard = means.index(min(means)), Tensor([3, 0, 0, 1, 0])
    losses = [mean + hard + spread * (k != lowest) for k, mean in enumerate(means)]
    found = [solved(width, loss.tolist()) for width, loss in zip((30, 60, 90), losses, strict=True)]
    file = tmp_path / "poolings.csv"
    assert choose_pooling(found, file).features.store.width == kept
    rows = read_csv(file)
    assert [row["loss"] for row in rows] == [f"{mean + hard.mean():.3f}" for mean in means]
    expected = [f"{mean - min(means):.3f} ± {0.1 * (mean > min(means)):.3f}" for mean in means]
    assert [row["above lowest"] for row in rows] == expected
    assert [row["width"] for row in rows if row[""] == "kept"] == [str(kept)]


@pytest.mark.parametrize(("loss", "level"), [(0.4, -1), (0.6, -2)])
def test_an_earlier_layer_is_kept_where_it_is_ahead_by_a_standard_error(
    tmp_path: Path, loss: float, level: int
) -> None:
    """Even where it is narrower."""
    spread = 0.1 * 5**0.5 * Tensor([-1, 1, -1, 1, 0])  # its standard error is 0.1
    found = [solved(90, (loss + spread).tolist()), solved(30, [0.45] * 5, -2)]
    kept = choose_pooling(found, tmp_path / "poolings.csv")
    assert kept.features.model.chosen["backbone"]["level"] == level
    rows = read_csv(tmp_path / "poolings.csv")
    assert [row["pooling"] for row in rows] == ["of 90", "of 30, level -2"]


@pytest.mark.parametrize(("loss", "gains"), [(0.9, True), (0.3, False)])
def test_the_gain_over_the_average_is_logged_where_another_is_kept(
    tmp_path: Path, logged: pytest.LogCaptureFixture, loss: float, gains: bool
) -> None:
    found = [solved(30, [loss, loss]), solved(60, [0.4, 0.4])]
    found[0].features.model.chosen["pooling"]["name"] = "average"
    choose_pooling(found, tmp_path / "poolings.csv")
    assert ("gain of of 60 over average: 100.0 points" in logged.text) == gains
    assert ("over average" in logged.text) == gains


TIMM = [
    *("model/backbone=timm", "model.backbone.model=resnet10t", "model.weights=random", "data.size=96"),
    *("last.l2=[1e-3]", "last.folds=2"),
]


def stop(*_: Any) -> None:
    raise RuntimeError("stopped")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "choices", "kept"),
    [
        ([SMALL], "{name: average}, {name: sqrt, project: 3}", "3 axes"),
        (TIMM, "{name: sqrt, project: 6, level: -2}", "6 axes, level -2"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_the_run_continues_with_what_was_kept(
    images: Path,
    tmp_path: Path,
    network: list[str],
    choices: str,
    kept: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends with the same weights and calibration as a run with this network alone, also resumed."""
    auto = ["model/pooling=auto", f"model.pooling.candidates=[{choices}]", *network, *FINETUNE]
    with monkeypatch.context() as patch:
        patch.setattr(BCNNModule, "on_train_start", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run(images, tmp_path / "auto", *auto)
    train(configure(*toy(images, *auto, f"output={tmp_path / 'auto'}")), resume=True)
    chosen = load_model(tmp_path / "auto").chosen
    options = [f"model/pooling={chosen['pooling']['name']}", f"model.project={chosen['project']}"]
    if "level" in chosen["backbone"]:
        options.append(f"model.backbone.level={chosen['backbone']['level']}")
    run(images, tmp_path / "alone", *network, *options, *FINETUNE)
    for stage in ("last", "finetune"):
        first, second = (
            torch.load(next((tmp_path / name / stage).glob("*.ckpt")), weights_only=True)
            for name in ("auto", "alone")
        )
        about, expected = first["hyper_parameters"], second["hyper_parameters"]
        for name in ("backbone", "project", "preprocessing", "split"):
            assert about[name] == expected[name]
        tensors, expected = first["state_dict"], second["state_dict"]
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    report = (tmp_path / "auto" / "report.html").read_text()
    assert "<h2>Poolings</h2>" in report and kept in report
    assert "<h2>Poolings</h2>" not in (tmp_path / "alone" / "report.html").read_text()


def test_a_checkpoint_keeps_its_pooling(images: Path, tmp_path: Path, tiny: BCNN) -> None:
    run(images, tmp_path / "first", SMALL, "model/pooling=sqrt", "stage=last")
    run(images, tmp_path / "second", *AUTO, "stage=last", f"ckpt={tmp_path / 'first'}")
    assert load_model(tmp_path / "second").chosen["pooling"]["name"] == "sqrt"
