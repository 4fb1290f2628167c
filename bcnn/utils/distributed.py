"""Ranks: processes that train together, one on each device."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of `x` over the ranks, differentiable for a loss that is the mean of theirs."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    return _Mean.apply(x)  # type: ignore[no-any-return]


def on_rank_zero(rank: int, broadcast: Callable[[Any], Any], act: Callable[[], T]) -> T:
    """Call `act` on rank 0 and return its result, or raise its exception, on every rank.

    Without the exception the other ranks would wait. `broadcast` is `trainer.strategy.broadcast`.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = act() if rank == 0 else None
    except Exception as raised:
        error = raised
    result, error = broadcast((result, error))
    if error:
        raise error
    return result  # type: ignore[no-any-return]


class _Mean(torch.autograd.Function):
    """Torch's own (`torch.distributed.nn.functional.all_reduce`) is deprecated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Mean.apply(gradient)
