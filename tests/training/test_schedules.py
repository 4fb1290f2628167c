"""Learning rates over the steps of a stage."""

import pytest
import torch

from bcnn.training.schedules import multistep, warmup_cosine


def rates(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_warmup_cosine_rises_and_ends_near_zero(
    optimizer: torch.optim.Optimizer, warmup: float
) -> None:
    found = rates(warmup_cosine(optimizer, total_steps=40, warmup=warmup), 40)
    peak = round(40 * warmup)
    assert max(found) == found[peak] == pytest.approx(2.0)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert found[-1] < 0.02


def test_milestones_are_shares_of_the_steps(optimizer: torch.optim.Optimizer) -> None:
    found = rates(multistep(optimizer, 8, milestones=[0.5, 0.75]), 8)
    assert found == pytest.approx([2.0] * 4 + [0.2] * 2 + [0.02] * 2)
