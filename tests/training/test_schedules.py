"""Learning rates over the steps of a stage."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from bcnn.training.schedules import multistep, warmup_cosine


def rates(make: Callable[..., LRScheduler], steps: int, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule, found = make(optimizer, steps, **options), []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_warmup_cosine_rises_and_ends_near_zero(warmup: float) -> None:
    found = rates(warmup_cosine, 40, warmup=warmup)
    peak = round(40 * warmup)
    assert max(found) == found[peak] == pytest.approx(2.0)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert found[-1] < 0.02


def test_milestones_are_shares_of_the_steps() -> None:
    found = rates(multistep, 8, milestones=[0.5, 0.75])
    assert found == pytest.approx([2.0] * 4 + [0.2] * 2 + [0.02] * 2)
