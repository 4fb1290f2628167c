"""What is said when training goes wrong, and what is not."""

import math
from types import SimpleNamespace

import pytest
import torch

from bcnn.training.callbacks import CollapseGuard


def said(loss: float, top1: float = math.nan, start: float = 0.0) -> tuple[str, bool]:
    """What the guard prints at the end of an epoch, and whether it ends training."""
    lines: list[str] = []
    trainer = SimpleNamespace(
        callback_metrics={"train_loss": torch.tensor(loss), "val_top1": torch.tensor(top1)},
        current_epoch=0,
        should_stop=False,
        print=lines.append,
    )
    keep = SimpleNamespace(start={"val_top1": start})
    CollapseGuard(10, keep, "try less").on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    return "".join(lines), trainer.should_stop


@pytest.mark.parametrize("factor", [0.5, 1, 1 + 1e-6, 1.01])
def test_the_loss_of_guessing_is_nothing_to_warn_of(factor: float) -> None:
    assert said(factor * math.log(10)) == ("", False)


def test_what_is_clearly_worse_than_guessing_is_told() -> None:
    line, stops = said(2 * math.log(10))
    assert "epoch 1: the training loss, 4.61, is above that of guessing, 2.30: try less" in line
    assert not stops


def test_a_fall_to_half_and_a_loss_that_is_no_number() -> None:
    assert "fell from 90.0% to 40.0%" in said(1.0, 0.4, 0.9)[0]
    assert said(1.0, 0.5, 0.9) == ("", False)
    line, stops = said(math.nan, 0.5, 0.9)
    assert "not finite" in line and stops
