"""Stage `last` on the trunk of a checkpoint: a class added or removed, more images, other sizes."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import FINETUNE, SMALL, run, write, write_classes

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training.feature_store import VIEWS
from bcnn.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny")
TUNED = [*FINETUNE, "finetune.optimizer.lr=1e-4"]  # no worse than it started


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_classes(tmp_path / "photos", cat=20, dog=30, eel=30)
    return tmp_path / "photos"


@pytest.fixture
def weights(tiny: BCNN, tmp_path: Path) -> str:
    torch.save(tiny.backbone.state_dict(), tmp_path / "features.pth")
    return f"model.weights={tmp_path / 'features.pth'}"


def grow(photos: Path, output: Path, *options: str) -> BCNN:
    """Train stage `last`, if nothing else is asked for, and return the model."""
    run(photos, output, SMALL, "stage=last", "data.val_fraction=0.1", *options)
    return load_model(output)


@pytest.mark.parametrize("stage", ["last=convex", "last=sgd"])
def test_new_classes_cost_the_passes_of_their_images_and_equal_training_from_the_start(
    photos: Path,
    tmp_path: Path,
    weights: str,
    stage: str,
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A class is removed, two are added; the images have other names in another folder."""
    grow(photos, tmp_path / "first", weights, stage)
    assert sum(passes) == VIEWS * 80
    passes.clear()
    changed = tmp_path / "changed"
    for name in ("dog", "eel"):
        (changed / name).mkdir(parents=True)
        for path in (photos / name).iterdir():
            shutil.copy(path, changed / name / f"photo {path.name}")
    for index in range(64):
        write(changed / ("ant", "fox")[index % 2] / f"{index}.png", seed=10_000 + index)
    grown = grow(changed, tmp_path / "grown", stage, f"ckpt={tmp_path / 'first'}")
    assert sum(passes) == VIEWS * 64
    passes.clear()
    assert grow(changed, tmp_path / "again", stage, weights).classes == ["ant", "dog", "eel", "fox"]
    assert not passes  # also a run from the start finds all images
    monkeypatch.setenv("BCNN_STORES", str(tmp_path / "empty"))
    anew = grow(changed, tmp_path / "anew", stage, weights)
    assert sum(passes) == VIEWS * 124
    assert grown.classes == anew.classes
    for part in ("backbone", "head"):
        found, expected = (getattr(model, part).state_dict() for model in (grown, anew))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_shares_of_the_training_images_share_descriptors(
    photos: Path, tmp_path: Path, weights: str, passes: list[int]
) -> None:
    for share in ("1.0", "0.5", "0.1"):
        grow(photos, tmp_path / share, weights, f"data.train_fraction={share}")
    assert sum(passes) == VIEWS * 80


def test_images_that_the_trunk_was_trained_on_are_never_held_out(
    photos: Path, tmp_path: Path, weights: str
) -> None:
    """With another seed. New images of a known class are trained on; a new class is split."""
    before = grow(photos, tmp_path / "first", weights).split
    for index in range(10):
        write(photos / "dog" / f"new{index}.png", seed=10_000 + index)
        write(photos / "fox" / f"{index}.png", seed=20_000 + index)
    shutil.rmtree(photos / "cat")
    after = grow(photos, tmp_path / "grown", f"ckpt={tmp_path / 'first'}", "seed=7").split
    assert before and after
    assert before.train < after.train and before.val < after.val and before.test < after.test
    assert len(after.digests) == 80 + 20 and len(after.train) < len(before.train) + 20


def test_projection_pooling_and_preprocessing_are_those_of_the_checkpoint(
    photos: Path, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = ["model/pooling=sqrt", "model.project=3", "data.resize=squash", "data.crop_pct=0.8"]
    first = grow(photos, tmp_path / "first", weights, *network)
    write_classes(photos, fox=10)
    monkeypatch.setattr("bcnn.training.stage.fit_principal_axes", None)
    start = [f"ckpt={tmp_path / 'first'}", "data.size=null"]
    for stage in ("last", "both"):
        grown = grow(photos, tmp_path / stage, *start, f"stage={stage}", *TUNED)
        assert (grown.chosen, grown.preprocessing) == (first.chosen, first.preprocessing)
        same = torch.equal(grown.backbone.projection.weight, first.backbone.projection.weight)
        assert same == (stage == "last") and grown.classes == ["cat", "dog", "eel", "fox"]
    other = grow(photos, tmp_path / "other", *start, "data.size=40", "model.project=3")
    assert other.preprocessing.size == 40 and other.preprocessing.resize == "squash"
    with pytest.raises(UserError, match=r"model\.project is 2, and .* has 3: leave it out"):
        grow(photos, tmp_path / "wrong", *start, "model.project=2")
