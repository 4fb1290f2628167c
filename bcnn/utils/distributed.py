"""Ranks: processes that train together, a device each; what they have of one another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from bcnn.utils.errors import UserError

T = TypeVar("T")


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of `x`, of any shape, over the ranks; none of them waits for its device.

    Differentiable, where the loss is the mean of the ranks' losses: as DistributedDataParallel has it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    mean: Tensor = _Mean.apply(x)
    return mean


def on_rank_zero(rank: int, broadcast: Callable[[Any], Any], act: Callable[[], T]) -> T:
    """What rank 0's `act` returns, on every rank.

    Args:
        rank: of this process.
        broadcast: object → that of rank 0, as a strategy of Lightning's has it.

    Raises:
        UserError: `act` does; on every rank, or the others would wait for this one.
    """
    outcome: Any = None
    if rank == 0:
        try:
            outcome = act()
        except UserError as error:
            outcome = error
    outcome = broadcast(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome  # type: ignore[no-any-return]


@contextmanager
def together() -> Iterator[None]:
    """Raises UserError where another rank is gone: killed, or ended by a mistake that it told."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError("another process of this run has ended, and this one with it") from error
        raise


class _Mean(Function):
    """The gradient of the mean is the mean of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        mean: Tensor = _Mean.apply(gradient.contiguous())
        return mean
