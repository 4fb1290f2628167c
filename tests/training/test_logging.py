"""What wandb keeps of a run, offline: configuration, confusion matrix, images, checkpoint."""

import json
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import COLOURS, configure, folder_data, quiet_trainer, toy, write_images
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from omegaconf import OmegaConf
from PIL import Image, UnidentifiedImageError

from bcnn.evaluation.predictions import Predictions
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training import logging as training_logging
from bcnn.training.convex_stage import save_solution, solve_each
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.logging import _next_command, close, log_options, log_results, make_loggers
from bcnn.training.run_state import StageResult


@pytest.fixture
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where wandb keeps what it will send later, images and checkpoints."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def logger(staged: Path, tmp_path: Path) -> Iterator[WandbLogger]:
    cfg = configure("logger=wandb", "logger.wandb.log_model=true")
    logger = instantiate(cfg.logger.wandb, save_dir=tmp_path / "run")
    yield logger
    logger.experiment.finish()


@pytest.fixture
def predictions(tmp_path: Path) -> Predictions:
    """Six images, of which the last, red, is taken for blue."""
    write_images(tmp_path / "photos", 2)
    paths = sorted(map(str, (tmp_path / "photos").glob("*/*.png")))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    probabilities = torch.eye(3)[[0, 0, 1, 1, 2, 0]] * 0.7 + 0.1
    return Predictions(sorted(COLOURS), paths, labels, probabilities)


def pictures(folder: Path) -> list[Image.Image]:
    found = []
    for path in folder.rglob("*"):
        with suppress(IsADirectoryError, UnidentifiedImageError):
            found.append(Image.open(path))
    return found


def colour(picture: Image.Image) -> str:
    pixel = picture.resize((1, 1)).getpixel((0, 0))
    return ("red", "green", "blue")[pixel.index(max(pixel))]


def table(folder: Path, name: str) -> dict[str, list[list[object]]]:
    (path,) = folder.rglob(f"files/media/table/{name}*.table.json")
    return json.loads(path.read_text())


def test_confusion_and_the_hardest_images(
    logger: WandbLogger,
    predictions: Predictions,
    tmp_path: Path,
    staged: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_logging, "TABLE_IMAGES", 4)
    monkeypatch.setattr(training_logging, "THUMBNAIL", 24)
    log_results([logger], {"test_top1": 0.5}, predictions)
    cells = table(tmp_path / "run", "confusion")["data"]
    assert cells == [
        ["blue", "blue", 2],
        ["green", "green", 2],
        ["red", "blue", 1],
        ["red", "red", 1],
    ]
    rows = table(tmp_path / "run", "predictions")
    assert len(rows["data"]) == 4
    first = dict(zip(rows["columns"], rows["data"][0], strict=True))
    assert (first["class"], first["top1"]) == ("red", "blue")
    assert first["path"] == predictions.paths[-1]
    assert [first["probability"], first["probability_of_class"]] == pytest.approx([0.8, 0.1])
    kept = pictures(staged)
    assert {picture.size for picture in kept} == {(24, 20)}
    assert sorted(map(colour, kept)) == ["blue", "blue", "green", "red"]


def test_a_convex_stage_uploads_its_checkpoint(
    logger: WandbLogger, images: Path, tmp_path: Path, staged: Path, tiny: BCNN
) -> None:
    data = CachedFeatureDataModule(folder_data(images), tiny, "32-true")
    trainer = quiet_trainer(logger=logger)
    checkpoint = save_solution(trainer, *solve_each(trainer, [data], [1e-3]), tmp_path)
    close([logger])
    kept = checkpoint.read_bytes()
    assert any(path.is_file() and path.read_bytes() == kept for path in staged.rglob("*"))


def test_the_next_command_leaves_the_network_to_the_checkpoint(tmp_path: Path) -> None:
    network = ["model/pooling=sqrt", "model.weights=own.pth", "model.backbone.name=tiny"]
    given = ["data=folder", "data.root=a b", *network, "last.l2=[1e-5]", "output=run", "stage=both"]
    result = StageResult("finetune", tmp_path / "best.ckpt", {})
    command = _next_command(configure(*given), given, result)
    expected = ["stage=finetune", f'ckpt="{tmp_path}/best.ckpt"', "finetune.optimizer.lr=0.003"]
    kept = ["data=folder", "data.root=a b", "last.l2=[1e-5]"]
    assert shlex.split(command) == ["bcnn", "train", *expected, *kept]


def test_stages_are_runs_of_one_group(staged: Path, tmp_path: Path) -> None:
    cfg = configure("logger=wandb", "logger.wandb.project=birds", "+logger.wandb.tags=[small]")
    for stage in ("last", "finetune"):
        loggers = make_loggers(cfg.logger, tmp_path / stage, "a1b2")
        (run,) = (each.experiment for each in loggers if isinstance(each, WandbLogger))
        assert (run.id, run.group, run.job_type) == (f"a1b2-{stage}", "a1b2", stage)
        assert (run.project, run.tags) == ("birds", ("small",))
        close(loggers)


def test_loggers_are_told_the_configuration_and_wandb_alone_what_it_can_show(
    logger: WandbLogger, predictions: Predictions, tmp_path: Path
) -> None:
    other = CSVLogger(tmp_path / "csv", name="", version="")
    cfg = configure(*toy(tmp_path, "last.l2=[1e-5]", f"output={tmp_path}"))
    log_options([logger, other], cfg, "last")
    log_results([other], {"test_top1": 0.5}, predictions)
    other.save()
    for kept in (logger.experiment.config, OmegaConf.load(tmp_path / "csv" / "hparams.yaml")):
        assert (kept["stage"], kept["last"]["l2"], kept["seed"]) == ("last", [1e-5], 0)
        assert kept["data"]["size"] == 32 and kept["data"]["seed"] == 0  # an interpolation, resolved
    assert "confusion" not in (tmp_path / "csv" / "metrics.csv").read_text()
