"""Which held-out images calibrate a model, and that the calibration stays with its weights."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL, folder_data, quiet_trainer, run

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.calibration import Subspace
from bcnn.models.checkpoint import load_model
from bcnn.training.module import BCNNModule
from bcnn.utils.errors import UserError

UNVALIDATED = [SMALL, "stage=last", "data.val_fraction=0"]
FINETUNE = ["finetune.epochs=2", "finetune.batch_size=6", "finetune.optimizer.lr=1e-3"]


def held_out(checkpoint: Path) -> int:
    """The number of images that calibrated the model in a file; 0 if it is not calibrated."""
    calibration = load_model(checkpoint).calibration
    return 0 if calibration is None else len(calibration.scores)


def test_validation_images_calibrate_each_stage_or_more_of_a_cross_validation(
    images: Path, tmp_path: Path, tiny: BCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 18 training images, 6 are drawn for validation."""
    run(images, tmp_path / "out", SMALL, *FINETUNE)
    assert held_out(tmp_path / "out" / "last" / "best.ckpt") == 12
    monkeypatch.setattr("bcnn.training.calibrate.ENOUGH", 6)
    run(images, tmp_path / "enough", SMALL, "stage=last")
    assert held_out(tmp_path / "enough" / "last" / "best.ckpt") == 6
    tuned = next((tmp_path / "out" / "finetune").glob("*.ckpt"))
    assert held_out(tuned) == 6
    module = BCNNModule.load_from_checkpoint(tuned)
    assert quiet_trainer().test(module, folder_data(images).test_dataloader(), tuned, verbose=False)


def test_without_validation_images_a_cross_validation_calibrates_if_there_is_one(
    images: Path, tmp_path: Path, tiny: BCNN
) -> None:
    run(images, tmp_path / "out", *UNVALIDATED)
    assert held_out(tmp_path / "out" / "last" / "best.ckpt") == 18
    run(images, tmp_path / "none", *UNVALIDATED, "last.folds=null")
    assert held_out(tmp_path / "none" / "last" / "last.ckpt") == 0


def test_a_held_out_image_is_measured_by_models_that_have_not_seen_it(
    images: Path, tmp_path: Path, tiny: BCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    spanned, measured = [], []
    of, residual = Subspace.of, Subspace.residual

    def span(descriptors: torch.Tensor) -> Subspace:
        spanned.append(descriptors)
        return of(descriptors)

    def measure(self: Subspace, descriptors: torch.Tensor) -> torch.Tensor:
        measured.append((descriptors.float(), spanned[-1].float()))
        return residual(self, descriptors)

    monkeypatch.setattr(Subspace, "of", span)
    monkeypatch.setattr(Subspace, "residual", measure)
    run(images, tmp_path / "out", *UNVALIDATED, "last.folds=3")
    by_folds = measured[:3]
    assert sum(len(held) for held, _ in by_folds) == 18
    whole = spanned[3].float()
    for held, others in by_folds:  # together they are all training images, each once
        assert (len(held), len(others)) == (6, 12)
        torch.testing.assert_close(torch.cat([held, others]).sum(dim=0), whole.sum(dim=0))


def test_a_stage_that_ends_with_its_start_keeps_the_calibration_of_that(
    images: Path, tmp_path: Path, tiny: BCNN
) -> None:
    run(images, tmp_path / "last", SMALL, "stage=last")
    start = tmp_path / "last" / "last" / "best.ckpt"
    before = start.read_bytes()
    words = ["stage=finetune", f"ckpt={start}", *FINETUNE, "finetune.optimizer.lr=1e9"]
    with pytest.raises(UserError, match=r"worse|not finite"):
        run(images, tmp_path / "worse", *words, "finetune.polyak=null")
    assert start.read_bytes() == before
    table = (tmp_path / "worse" / "predictions.csv").read_text()
    assert "prediction_set" in table.partition("\n")[0]
