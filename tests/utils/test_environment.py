"""The cores of this process, and the versions of the software."""

import os
from pathlib import Path

import pytest

from bcnn.utils import environment
from bcnn.utils.environment import commit, cores, default_workers


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of sixteen cores, without limits; a container's quota would be in `cpu.max`."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(environment, "QUOTA", tmp_path / "cpu.max")


@pytest.mark.parametrize(
    ("quota", "slurm", "sweep", "expected"),
    [("max", "", "", 16), ("250000", "", "", 3), ("max", "4", "", 4), ("250000", "4", "2", 2)],
)
def test_the_least_limit_decides(
    quota: str, slurm: str, sweep: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.QUOTA.write_text(f"{quota} 100000\n")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    monkeypatch.setenv("BCNN_CORES", sweep)
    assert cores() == expected
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    assert cores() == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7}, raising=False)
    assert cores() == 1


def test_ranks_share_the_cores_unless_slurm_has_divided_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [default_workers(ranks) for ranks in (1, 4, 32)] == [16, 4, 1]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert default_workers(8) == 6


def test_a_folder_inside_another_clone_has_no_commit(tmp_path: Path) -> None:
    assert commit(tmp_path) == ""
    (tmp_path / ".git").mkdir()  # not a repository
    assert commit(tmp_path) == ""
