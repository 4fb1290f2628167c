"""What is said when training goes wrong, and what is not."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from bcnn.training.callbacks import CollapseGuard, Diverged


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
    guard = CollapseGuard(10, keep, "try less")  # type: ignore[arg-type]
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
        Diverged, match=r"loss is not finite after batch 1 of epoch 1, at a rate of 0\.5"
    ):
        said(math.nan, 0.5, 0.9)
