"""Which weights of a stage are kept, and that a resumed stage ends with the same ones."""

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import folder_data, quiet_trainer, weights
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training import checkpointing
from bcnn.training.callbacks import SeededEpochs
from bcnn.training.checkpointing import AtomicCheckpointIO, BestOrLastCheckpoint, no_worse
from bcnn.training.module import BCNNModule


class Interrupted(Exception):
    pass


class Interrupt(L.Callback):
    """Ends training in the second batch of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if (trainer.current_epoch, index) == (self.epoch, 1):
            raise Interrupted


class Scripted(BCNNModule):
    """Logs the validation losses that it is given, one a validation."""

    losses: Iterator[float] | None = None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.losses is None:
            super().validation_step(batch, batch_idx)
        elif batch_idx == 0:
            self.log_dict({"val_loss": next(self.losses), "val_top1": 0.5})


def halving(optimizer: torch.optim.Optimizer, total_steps: int) -> ReduceLROnPlateau:
    """A schedule that takes every epoch for a plateau."""
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e6, threshold_mode="abs")


def fit(
    model: BCNN,
    folder: Path,
    data: FineGrainedDataModule,
    *callbacks: L.Callback,
    epochs: int = 3,
    losses: Sequence[float] = (),
    **options: object,
) -> BestOrLastCheckpoint:
    """Train a stage in a folder, from its state if there is one."""
    checkpoint = BestOrLastCheckpoint(folder, len(data.val))
    trainer = quiet_trainer(
        max_epochs=epochs,
        callbacks=[checkpoint, SeededEpochs(0), *callbacks],
        plugins=AtomicCheckpointIO(),
        enable_checkpointing=True,
        logger=CSVLogger(folder, name="", version=""),
        **options,
    )
    scheduler = halving if data.val else None
    module = Scripted(model, "finetune", partial(torch.optim.SGD, lr=1e-2, momentum=0.9), scheduler)
    if losses:
        module.losses = iter(losses)
    state = checkpoint.state if checkpoint.state.is_file() else None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=state)
    finally:
        for logger in trainer.loggers:
            logger.finalize("success")
    return checkpoint


@pytest.fixture
def data(images: Path) -> FineGrainedDataModule:
    return folder_data(images, batch_size=4)


@pytest.mark.parametrize(("epoch", "every", "workers"), [(1, 0, 2), (2, 0, 0), (2, 1e6, 2)])
def test_a_resumed_stage_ends_with_the_same_weights(
    images: Path, tmp_path: Path, tiny: BCNN, monkeypatch: Any, epoch: int, every: float, workers: int
) -> None:
    """Workers draw the images of an epoch early; the state may be older than the best weights."""
    monkeypatch.setattr(checkpointing, "EVERY", every)

    def train(folder: str, *callbacks: L.Callback) -> BestOrLastCheckpoint:
        data = folder_data(images, batch_size=4, num_workers=workers)
        return fit(copy.deepcopy(tiny), tmp_path / folder, data, *callbacks)

    once = train("once")
    with pytest.raises(Interrupted):
        train("twice", Interrupt(epoch))
    (tmp_path / "twice").rename(tmp_path / "moved")
    twice = train("moved")
    assert twice.resumed and not once.resumed
    assert twice.kept is not None and once.kept is not None and twice.kept.name == once.kept.name
    found, expected = weights(twice.kept), weights(once.kept)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (twice.metrics, twice.last, twice.start) == (once.metrics, once.last, once.start)
    logs = [(tmp_path / name / "metrics.csv").read_text() for name in ("once", "moved")]
    assert logs[0] == logs[1]
    again = train("moved")  # no epoch is left
    assert (again.kept, again.metrics) == (twice.kept, twice.metrics)


def test_best_weights_of_an_epoch_after_the_state_are_forgotten(
    tmp_path: Path, tiny: BCNN, data: FineGrainedDataModule
) -> None:
    """On a GPU that epoch has other figures when it is trained again."""
    with pytest.raises(Interrupted):  # the state is of epoch 0: the next is due in a minute
        fit(tiny, tmp_path, data, Interrupt(2), losses=[0.3, 0.1])
    checkpoint = fit(tiny, tmp_path, data, losses=[0.5, 0.4])
    assert checkpoint.resumed and checkpoint.metrics["val_loss"] == pytest.approx(0.4)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 2


def test_best_and_last_are_kept_apart(tmp_path: Path, tiny: BCNN, data: FineGrainedDataModule) -> None:
    checkpoint = fit(tiny, tmp_path, data, losses=[1.0, 3.0, 2.0])
    assert checkpoint.kept == tmp_path / "best.ckpt"
    best, last = (torch.load(tmp_path / name, weights_only=True) for name in ("best.ckpt", "last.ckpt"))
    assert (best["epoch"], last["epoch"]) == (0, 2)
    assert checkpoint.metrics["val_loss"] == 1.0 and checkpoint.last["val_loss"] == 2.0
    assert "optimizer_states" in last and "optimizer_states" not in best
    assert torch.equal(load_model(tmp_path / "last.ckpt").head.weight, tiny.head.weight)
    checkpoint.finish()
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["best.ckpt"]


def test_a_finetune_as_good_as_its_best_epoch_keeps_the_last(
    tmp_path: Path, tiny: BCNN, data: FineGrainedDataModule
) -> None:
    checkpoint = fit(tiny, tmp_path, data, losses=[5.0, 1.0, 3.0, 2.0], num_sanity_val_steps=-1)
    assert checkpoint.kept == tmp_path / "last.ckpt"
    assert checkpoint.metrics["val_loss"] == 2.0 and checkpoint.start["val_loss"] == 5.0
    checkpoint.finish()
    assert torch.equal(load_model(tmp_path / "last.ckpt").head.weight, tiny.head.weight)
    assert "optimizer_states" not in torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (tmp_path / "best.ckpt").is_file()


def test_without_validation_images_the_last_epoch_is_kept(
    images: Path, tmp_path: Path, tiny: BCNN
) -> None:
    checkpoint = fit(tiny, tmp_path, folder_data(images, val_fraction=0, batch_size=4))
    assert checkpoint.kept == tmp_path / "last.ckpt" and checkpoint.metrics == {}
    assert torch.equal(load_model(checkpoint.kept).head.weight, tiny.head.weight)
    assert not (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize(
    ("final", "start", "best", "images", "keeps"),
    [
        (0.96, 0.95, 0.97, 100, True),  # a standard error is 0.017
        (0.94, 0.95, 0.94, 100, False),
        (0.94, 0.90, 0.97, 100, False),
        (0.96, 0.95, 0.97, 1000, False),  # and here 0.005
        (1.00, 1.00, 1.00, 40, True),
        (math.nan, 0.90, 0.90, 100, False),
        (0.99, 0.90, 1.0, 100, True),  # one of a hundred
        (0.97, 0.90, 1.0, 100, False),
    ],
)
def test_the_last_epoch_is_kept_unless_validation_tells_it_from_the_best(
    final: float, start: float, best: float, images: int, keeps: bool
) -> None:
    assert no_worse(final, start, best, images) is keeps


def test_an_average_that_is_validated_is_what_is_kept(
    tmp_path: Path, tiny: BCNN, data: FineGrainedDataModule
) -> None:
    checkpoint = fit(tiny, tmp_path, data, EMAWeightAveraging(decay=0.5), epochs=1)
    assert checkpoint.kept == tmp_path / "best.ckpt"
    for file in (checkpoint.kept, checkpoint.state):
        model = load_model(file)
        batches = ((model(x), y) for x, y in data.evaluation_dataloader(data.val))
        logits, labels = map(torch.cat, zip(*batches, strict=True))
        found = nn.functional.cross_entropy(logits, labels).item()
        assert found == pytest.approx(checkpoint.metrics["val_loss"], rel=1e-5)
    assert "averaging_state" not in torch.load(checkpoint.kept, weights_only=True)
