"""The network that a run starts from, and the record of images that comes with its weights."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL, configure, save_checkpoint, toy, write_classes, write_images
from hydra.utils import instantiate

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.network import build_model
from bcnn.utils.console import setup_logging
from bcnn.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny")


def start(photos: Path, *overrides: str) -> tuple[FineGrainedDataModule, BCNN]:
    """The data and the network that a run begins with."""
    setup_logging()
    cfg = configure(*toy(photos, SMALL, *overrides))
    data = instantiate(cfg.data)
    data.setup()
    return data, build_model(cfg, data)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_weights_of_a_checkpoint_bring_the_record_of_its_images(tmp_path: Path, suffix: str) -> None:
    """With another seed and a new class, no image that they were trained on is held out."""
    photos, file = tmp_path / "photos", tmp_path / f"best{suffix}"
    write_classes(photos, cat=12, dog=12, eel=12)
    earlier, model = start(photos, "data.classes=[cat,dog]", "data.seed=1")
    save_checkpoint(model, file)
    data, later = start(photos, "data.seed=2", f"model.weights={file}")
    for split in ("val", "test"):
        before, now = ({path for path, _ in getattr(each, split)} for each in (earlier, data))
        new = now - before
        assert before < now and new and all(Path(path).parent.name == "eel" for path in new)
    assert later.split and later.split.train == {data.digests[path] for path, _ in data.train}
    write_images(tmp_path / "others", 6)
    file = save_checkpoint(later, tmp_path / f"second{suffix}")
    data, third = start(tmp_path / "others", f"model.weights={file}")
    of_others = {data.digests[path] for path, _ in data.train}
    assert third.split and third.split.train == later.split.train | of_others


def test_weights_without_a_record_cause_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "photos", cat=12, dog=12)
    model = start(tmp_path / "photos")[1]
    model.split = None
    file = save_checkpoint(model, tmp_path / "best.ckpt")
    start(tmp_path / "photos", f"model.weights={file}")
    assert "the checkpoint records none of these images" in capsys.readouterr().err
    torch.save(model.backbone.state_dict(), tmp_path / "features.pth")
    start(tmp_path / "photos", f"model.weights={tmp_path / 'features.pth'}")
    assert "the checkpoint" not in capsys.readouterr().err


def test_a_normalisation_that_the_weights_do_not_have_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "photos", cat=12, dog=12)
    model = start(tmp_path / "photos", "model.normalization=imagenet")[1]  # of random weights, too
    file = save_checkpoint(model, tmp_path / "best.ckpt")
    for words in ([], [f"ckpt={file}", "stage=finetune"]):
        with pytest.raises(UserError, match="imagenet_features: the weights have another one"):
            start(tmp_path / "photos", "model.normalization=imagenet_features", *words)
    with pytest.raises(UserError, match="normalization=mine: choose from imagenet, imagenet_features"):
        start(tmp_path / "photos", "model.normalization=mine")
