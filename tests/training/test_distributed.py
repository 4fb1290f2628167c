"""Two processes that train together do what one does alone: on gloo, at toy size."""

import csv
import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, configure, folder_data, toy, write_images
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from bcnn.models import backbones
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.plan import plan
from bcnn.training.run import run
from bcnn.utils.distributed import on_rank_zero
from bcnn.utils.errors import UserError

DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
JOBS = {
    "both": ["finetune.epochs=2", "finetune.batch_size=4", "finetune.optimizer.lr=1e-3"],
    "sgd": [
        *("stage=last", "last=sgd", "last.store=false", "last.class_weights=true"),
        *("last.epochs=2", "last.batch_size=6", "last.accumulate=2"),
    ],
}
LOST = ["stage=last", "last=sgd", "last.epochs=2", "last.batch_size=4"]


def start(rank: int, folder: Path, port: int, jobs: list[list[str]]) -> subprocess.Popen[str]:
    """One of the two processes, as torchrun would start it."""
    place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
    environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "rank.py"), str(folder), json.dumps(jobs)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]


def figures(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as lines:
        rows = [*csv.DictReader(lines)]
    assert any(row["val_loss"] for row in rows)
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


@pytest.mark.slow
def test_two_processes_do_what_one_does_until_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, folder = tmp_path / "images", tmp_path / "backbones"
    write_images(images / "train", 6, seed=0)
    for name in ("4.png", "5.png"):
        (images / "train" / "red" / name).unlink()
    write_images(images / "val", 3, seed=1)  # nine, which two cannot share equally
    folder.mkdir()
    (folder / "tiny.py").write_text(TINY)
    monkeypatch.setattr(backbones, "__path__", [*backbones.__path__, str(folder)])

    def job(kind: str, name: str, *options: str) -> list[str]:
        output = f"output={tmp_path / kind / name}"
        return toy(images, "model.backbone.name=tiny", output, *options)

    jobs = [job("two", name, *options, *DDP) for name, options in (*JOBS.items(), ("lost", LOST))]
    port = free_port()
    pair = [start(rank, folder, port, jobs) for rank in range(2)]
    for name, options in JOBS.items():
        run(configure(*job("one", name, *options)))
    first, killed = (process.communicate(timeout=200)[0] for process in pair)
    for stage in ("both/last", "both/finetune", "sgd/last"):
        one, two = tmp_path / "one" / stage, tmp_path / "two" / stage
        torch.testing.assert_close(weights(two), weights(one), rtol=1e-4, atol=1e-5)
        for together, alone in zip(figures(two), figures(one), strict=True):
            assert together == pytest.approx(alone, rel=1e-3)
    assert [process.returncode for process in pair] == [1, -9], (first, killed)
    assert "Traceback" not in first
    assert "error: another process of this run has ended" in first


def test_the_first_rank_alone_asks_for_room(
    images: Path, tiny: BCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 100

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Full)
    options = configure(*toy(images, f"output={tmp_path}")).last
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
        with pytest.raises(UserError, match="no room") if rank == 0 else nullcontext():
            plan("last", options, folder_data(images), tiny, "32-true")


def test_a_mistake_of_the_first_rank_reaches_the_others_before_it_ends() -> None:
    sent: list[object] = []

    def broadcast(outcome: object) -> object:
        sent.append(outcome)
        return outcome

    def mistake() -> None:
        raise UserError("no space left")

    with pytest.raises(UserError, match="no space left"):
        on_rank_zero(0, broadcast, mistake)
    assert [type(outcome) for outcome in sent] == [UserError]
    with pytest.raises(UserError, match="no space left"):
        on_rank_zero(1, lambda mine: sent[0], lambda: pytest.fail("only the first asks"))
