"""What is said when training goes wrong, and what is not."""

import copy
import math
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import configure, folder_data, quiet_trainer, toy
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training.callbacks import DivergenceMonitor, Float16, TrainingDiverged
from bcnn.training.checkpointing import BestOrLastCheckpoint
from bcnn.training.module import BCNNModule
from bcnn.training.run import run
from bcnn.utils.errors import UserError


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the guard prints at the end of an epoch of one batch."""

    def after(loss: float, top1: float = math.nan, start: float = 0.0) -> str:
        end_epoch(loss, top1, start)
        return capsys.readouterr().out.strip()

    return after


def end_epoch(loss: float, top1: float, start: float) -> None:
    trainer = SimpleNamespace(
        callback_metrics={"train_loss": torch.tensor(loss), "val_top1": torch.tensor(top1)},
        current_epoch=0,
        optimizers=[torch.optim.SGD([torch.zeros(1)], lr=0.5)],
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
    )
    keep = SimpleNamespace(start={"val_top1": start})
    guard = DivergenceMonitor(10, keep, "try less")  # type: ignore[arg-type]
    module = torch.nn.Linear(1, 1)
    module.device = torch.device("cpu")  # type: ignore[assignment]
    guard.on_train_batch_start(trainer, module, None, 0)  # type: ignore[arg-type]
    guard.on_train_batch_end(trainer, module, {"loss": torch.tensor(loss)}, None, 0)  # type: ignore[arg-type]
    guard.on_train_epoch_end(trainer, module)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0.5, 1, 1 + 1e-6, 1.01])
def test_the_loss_of_guessing_is_nothing_to_warn_of(said: Callable[..., str], factor: float) -> None:
    assert said(factor * math.log(10)) == ""


def test_what_is_clearly_worse_than_guessing_is_told(said: Callable[..., str]) -> None:
    line = said(2 * math.log(10))
    assert line == "epoch 1: the training loss, 4.61, is above that of guessing, 2.30: try less"


def test_a_fall_to_half_and_a_loss_that_is_no_number(said: Callable[..., str]) -> None:
    assert "fell from 90.0% to 40.0%" in said(1.0, 0.4, 0.9)
    assert said(1.0, 0.5, 0.9) == ""
    with pytest.raises(
        TrainingDiverged, match=r"loss is not finite after batch 1 of epoch 1, at a rate of 0\.5"
    ):
        said(math.nan, 0.5, 0.9)


class Waits(TorchDispatchMode):
    """Where a step of training asks for a tensor's value, but for images and the guard's look."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            stack = traceback.extract_stack()
            inside = {(Path(frame.filename).stem, frame.name) for frame in stack}
            if ("callbacks", "_refuse_loss") in inside:
                self.looks += 1
            elif ("training_epoch_loop", "advance") in inside and (
                "dataloader",
                "__next__",
            ) not in inside:
                self.places += traceback.format_list(stack[-4:-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_no_step_waits_for_the_device(images: Path, tmp_path: Path) -> None:
    options = ["model.backbone.name=tiny", "trainer.log_every_n_steps=1", f"output={tmp_path / 'out'}"]
    options += ["last=sgd", "last.epochs=1", "last.batch_size=4"]
    options += ["finetune.epochs=1", "finetune.batch_size=4", "finetune.optimizer.lr=1e-3"]
    with Waits() as waits:
        run(configure(*toy(images, *options)))
    assert waits.looks > 0
    assert "".join(waits.places) == ""


def test_too_little_memory_names_what_needs_less(images: Path, tmp_path: Path) -> None:
    def step(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    options = ["stage=last", "last=sgd", "last.store=false", f"output={tmp_path / 'out'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BCNNModule, "training_step", step)
        with pytest.raises(UserError, match=r"last\.batch_size, with last\.accumulate"):
            run(configure(*toy(images, *options)))


def test_a_compiler_that_fails_is_an_option_to_do_without(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no compiler is installed")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    options = ["last=sgd", "last.epochs=1", "finetune.batch_size=4"]
    with pytest.raises(UserError, match=r"no compiler is installed.*finetune\.compile=false"):
        run(configure(*toy(images, *options, "finetune.compile=true", f"output={tmp_path / 'out'}")))


def half_trainer(*callbacks: L.Callback, **options: object) -> L.Trainer:
    """A trainer in float16 with a scaler of gradients, which Lightning has on a GPU alone."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    return quiet_trainer(plugins=plugin, callbacks=[*callbacks], **options)


def photographs(count: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % 3), batch_size=4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_in_float16_is_that_in_float32(tiny: BCNN, fused: bool) -> None:
    moved = {}
    nn.init.normal_(tiny.head.weight, std=1e-2)
    for half in (True, False):
        model = copy.deepcopy(tiny)
        module = BCNNModule(
            model, "finetune", lambda p: torch.optim.SGD(p, lr=1.0, fused=fused), polyak=2.0
        )
        trainer = half_trainer(Float16(), max_steps=1) if half else quiet_trainer(max_steps=1)
        trainer.fit(module, photographs())
        moved[half] = model.head.weight.detach() - tiny.head.weight
    assert moved[False].norm() > 1e-3
    torch.testing.assert_close(moved[True], moved[False], rtol=0.02, atol=1e-4)


def test_steps_left_out_in_float16_are_told_where_they_are_many(
    tiny: BCNN, capsys: pytest.CaptureFixture[str]
) -> None:
    class Overflow(L.Callback):
        """Of the gradients of every other step."""

        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.fit_loop.batch_idx % 2:
                tiny.head.weight.grad[0, 0] = math.inf

    nn.init.normal_(tiny.head.weight, std=1e-2)
    module = BCNNModule(tiny, "finetune", lambda p: torch.optim.SGD(p, lr=1e-3), polyak=2.0)
    trainer = half_trainer(Float16(), Overflow(), max_epochs=1)
    trainer.fit(module, photographs(16))
    assert "epoch 1: 2 of 4 steps were left out" in capsys.readouterr().out
    half_trainer(Float16(), max_epochs=1).fit(module, photographs(16))
    assert "left out" not in capsys.readouterr().out
    assert all(parameter.isfinite().all() for parameter in tiny.parameters())


def test_an_average_that_is_validated_is_what_is_kept(images: Path, tmp_path: Path, tiny: BCNN) -> None:
    data = folder_data(images, batch_size=4)  # of one step there is no average
    keep = BestOrLastCheckpoint(tmp_path / "finetune", len(data.val))
    module = BCNNModule(tiny, "finetune", partial(torch.optim.SGD, lr=0.3))
    average = EMAWeightAveraging(decay=0.5)
    trainer = quiet_trainer(max_epochs=1, callbacks=[keep, average], enable_checkpointing=True)
    trainer.fit(module.train(), datamodule=data)
    kept = load_model(keep.best_model_path)
    logits, labels = zip(*((kept(x), y) for x, y in data.evaluation_dataloader(data.val)), strict=True)
    found = nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels)).item()
    assert found == pytest.approx(keep.metrics["val_loss"], rel=1e-5)
    assert set(torch.load(keep.best_model_path, weights_only=True)).isdisjoint({"averaging_state"})
