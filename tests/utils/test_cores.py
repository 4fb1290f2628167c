"""How many cores are ours."""

import os
from pathlib import Path

import pytest

from bcnn.utils import environment as module
from bcnn.utils.environment import cores, default_workers


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sixteen cores, all of them ours; returns the file of the container's quota."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(module, "QUOTA", tmp_path / "cpu.max")
    for name in ("SLURM_CPUS_PER_TASK", "BCNN_CORES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cpu.max"


def test_what_the_machine_has(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores() == 16
    many.write_text("max 100000\n")
    assert cores() == 16
    monkeypatch.delattr(os, "sched_getaffinity")  # as on a Mac
    assert cores() == 16


def test_what_is_left_to_the_process(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many.write_text("250000 100000\n")
    assert cores() == 3
    monkeypatch.setenv("BCNN_CORES", "")  # where a launcher does not say
    assert cores() == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert cores() == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    monkeypatch.setenv("BCNN_CORES", "2")
    assert cores() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7}, raising=False)
    assert cores() == 1


def test_processes_that_decode_share_the_machine(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_workers() == 16
    assert default_workers(4) == 4
    assert default_workers(32) == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)), raising=False)
    assert default_workers() == default_workers(8) == 16
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")  # of each of the eight
    assert default_workers(8) == 6
