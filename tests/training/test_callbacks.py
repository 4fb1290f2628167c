"""What a stage's callbacks log, raise and leave alone."""

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
from conftest import SMALL, batches, folder_data, quiet_trainer, run
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.callbacks import (
    DivergenceMonitor,
    EpochTable,
    Float16,
    SeededEpochs,
    TrainingDiverged,
)
from bcnn.training.checkpointing import BestOrLastCheckpoint
from bcnn.training.module import BCNNModule

Logged = Callable[[], list[str]]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Logged:
    """The messages logged so far, warnings with their level."""
    caplog.set_level("INFO", "bcnn")

    def messages() -> list[str]:
        levels = {"INFO": "", "WARNING": "warning: "}
        return [levels[r.levelname] + r.getMessage() for r in caplog.records if r.name == "bcnn"]

    return messages


def end_epoch(loss: float, top1: float = math.nan, start: float = 0.0) -> None:
    """Call the monitor as in an epoch of one batch."""
    trainer = SimpleNamespace(
        callback_metrics={"train_loss": torch.tensor(loss), "val_top1": torch.tensor(top1)},
        current_epoch=0,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda finite: finite),
    )
    checkpoint = SimpleNamespace(start={"val_top1": start})
    monitor = DivergenceMonitor(10, checkpoint, "try less")  # type: ignore[arg-type]
    module = torch.nn.Linear(1, 1)
    monitor.on_train_batch_end(trainer, module, {"loss": torch.tensor(loss)}, None, 0)  # type: ignore[arg-type]
    monitor.on_train_epoch_end(trainer, module)  # type: ignore[arg-type]


def test_a_loss_above_that_of_guessing_and_a_fallen_top1_are_warned_of(logged: Logged) -> None:
    for factor in (0.5, 1, 1.01, 2):
        end_epoch(factor * math.log(10))
    end_epoch(1.0, 0.4, 0.9)
    assert logged() == [
        "warning: epoch 1: the training loss, 4.61, is above that of guessing, 2.30: try less",
        "warning: epoch 1: validation top-1 fell from 90.0% to 40.0%: try less",
    ]
    with pytest.raises(TrainingDiverged, match="loss is not finite after batch 1 of epoch 1: try less"):
        end_epoch(math.nan, 0.5, 0.9)


STEP = ("training_epoch_loop", "advance")


class Waits(TorchDispatchMode):
    """Collects where a training step asks for a tensor's value, but for the monitor's check."""

    def __init__(self) -> None:
        super().__init__()
        self.checks = 0
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            stack = traceback.extract_stack()
            inside = {(Path(frame.filename).stem, frame.name) for frame in stack}
            if ("callbacks", "_check") in inside:
                self.checks += 1
            elif STEP in inside and ("dataloader", "__next__") not in inside:
                self.lines += traceback.format_list(stack[-4:-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_no_step_waits_for_the_device(images: Path, tmp_path: Path) -> None:
    last = ["last=sgd", "last.epochs=1", "last.batch_size=4"]
    finetune = ["finetune.epochs=1", "finetune.batch_size=4", "finetune.optimizer.lr=1e-3"]
    with Waits() as waits:
        run(images, tmp_path / "out", SMALL, "trainer.log_every_n_steps=1", *last, *finetune)
    assert waits.checks > 0
    assert "".join(waits.lines) == ""


def half_trainer(*callbacks: L.Callback, **options: object) -> L.Trainer:
    """A trainer in float16 with a scaler of gradients, which Lightning has on a GPU alone."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    return quiet_trainer(plugins=plugin, callbacks=[*callbacks], **options)


@pytest.mark.parametrize("polyak", [None, 2.0])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_in_float16_is_that_in_float32(
    tiny: BCNN, fused: bool, clip: float | None, polyak: float | None
) -> None:
    moved = {}
    nn.init.normal_(tiny.head.weight, std=1e-2)
    for half in (True, False):
        model = copy.deepcopy(tiny)
        optimizer = partial(torch.optim.SGD, lr=1.0, fused=fused)
        module = BCNNModule(model, "finetune", optimizer, polyak=polyak)
        options = {"max_steps": 1, "gradient_clip_val": clip}
        trainer = half_trainer(Float16(), **options) if half else quiet_trainer(**options)
        trainer.fit(module, batches())
        moved[half] = model.head.weight.detach() - tiny.head.weight
    assert moved[False].norm() > 1e-3
    torch.testing.assert_close(moved[True], moved[False], rtol=0.02, atol=1e-4)


def test_steps_skipped_in_float16_do_no_harm_and_many_are_warned_of(tiny: BCNN, logged: Logged) -> None:
    class Overflow(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            tiny.head.weight.grad[0, 0] = math.inf

    before = tiny.head.weight.clone()
    nn.init.normal_(tiny.head.weight, std=1e-2)
    module = BCNNModule(tiny, "finetune", lambda p: torch.optim.SGD(p, lr=1e-3), polyak=2.0)
    half_trainer(Float16(), max_epochs=1).fit(module, batches())
    assert logged() == [] and not torch.equal(tiny.head.weight, before)
    before = tiny.head.weight.clone()
    half_trainer(Float16(), Overflow(), max_epochs=10).fit(module, batches())
    warned = [text.partition(" steps")[0] for text in logged()]
    assert warned == ["warning: epoch 9: many", "warning: epoch 10: many"]
    assert torch.equal(tiny.head.weight, before)


def test_an_epoch_is_a_row_of_the_table(
    images: Path, tmp_path: Path, tiny: BCNN, logged: Logged
) -> None:
    data = folder_data(images, batch_size=4)
    keep = BestOrLastCheckpoint(tmp_path, len(data.val))
    shown: dict[str, Any] = {"callbacks": [keep, EpochTable(keep)], "enable_checkpointing": True}
    trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=-1, **shown)
    trainer.fit(BCNNModule(tiny, "finetune", partial(torch.optim.SGD, lr=1e-3)), datamodule=data)
    header, start, *rows = map(str.split, logged())
    assert header == ["epoch", "train", "loss", "val", "loss", "val", "top-1", "rate", "time"]
    validated = [f"{keep.start['val_loss']:.3g}", f"{keep.start['val_top1']:.1%}"]
    assert start == ["start", "–", *validated, "–", "–"]
    assert [row[0] for row in rows] == ["1/2", "2/2"]
    assert rows[1][2:5] == [f"{keep.last['val_loss']:.3g}", f"{keep.last['val_top1']:.1%}", "0.001"]
    assert rows[0][-3:] == ["best", "so", "far"]


def test_draws_of_an_epoch_are_those_of_the_seed(tiny: BCNN) -> None:
    class Drawn(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            draws.append(torch.rand(()).item())

    drawn = []
    for seed, unrelated in ((1, 0), (1, 5), (2, 0)):
        torch.rand(unrelated)
        draws: list[float] = []
        module = BCNNModule(copy.deepcopy(tiny), "last")
        quiet_trainer(max_epochs=2, callbacks=[SeededEpochs(seed), Drawn()]).fit(module, batches())
        drawn.append(draws)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][:2] != drawn[0][2:]
