"""What rank zero does for all."""

import pytest

from bcnn.utils.distributed import on_rank_zero


def test_rank_zero_acts_and_every_rank_gets_the_result() -> None:
    assert on_rank_zero(0, lambda mine: mine, lambda: 7) == 7
    assert on_rank_zero(1, lambda mine: (7, None), lambda: pytest.fail("acts on rank 1")) == 7


def test_an_error_of_rank_zero_reaches_the_ranks_that_wait() -> None:
    sent: list[object] = []

    def broadcast(mine: object) -> object:
        sent.append(mine)
        return mine

    def fail() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        on_rank_zero(0, broadcast, fail)
    with pytest.raises(OSError, match="no space left"):
        on_rank_zero(1, lambda mine: sent[0], fail)
