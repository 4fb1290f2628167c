"""What rank zero does for all."""

import pytest

from bcnn.utils.distributed import on_rank_zero


def fail() -> None:
    raise OSError("no space left")


def test_rank_zero_acts_and_every_rank_gets_its_result_or_error() -> None:
    assert on_rank_zero(0, lambda mine: mine, lambda: 7) == 7
    assert on_rank_zero(1, lambda mine: (7, None), fail) == 7
    sent: list[object] = []
    for rank in (0, 1):
        with pytest.raises(OSError, match="no space left"):
            on_rank_zero(rank, lambda mine: sent.append(mine) or sent[0], fail)
