"""Two processes that train together do what one does alone: on gloo, at toy size."""

import json
import os
import signal
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import SMALL, configure, fork, read_csv, register_tiny, toy, write_images, write_output
from torch import Tensor

from bcnn.cli.errors import exit_code_of
from bcnn.training.module import BCNNModule
from bcnn.training.run import train

DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
JOBS = {
    "both": ["finetune.epochs=2", "finetune.batch_size=4", "finetune.optimizer.lr=1e-3"],
    "sgd": [
        *("stage=last", "last=sgd", "last.store=false", "last.class_weights=true"),
        *("last.epochs=2", "last.batch_size=6", "last.accumulate=2"),
    ],
}
LOST = ["stage=last", "last=sgd", "last.epochs=2", "last.batch_size=4"]
TOLERANCE = {"both/last": 0.0, "both/finetune": 1e-5, "sgd/last": 1e-5}


def start(rank: int, port: int, jobs: list[list[str]], output: Path) -> BaseProcess:
    """Start one of the two processes, with the environment that torchrun would give it."""
    ranks = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = {**os.environ, **{key: str(value) for key, value in ranks.items()}}
    environment["MASTER_ADDR"] = "127.0.0.1"
    process = fork.Process(target=train_rank, args=(environment, jobs, output))
    process.start()
    return process


def train_rank(environment: dict[str, str], jobs: list[list[str]], output: Path) -> None:
    """Run the jobs; in the last one, rank 1 is killed."""
    os.environ.update(environment)
    write_output(output, output)
    torch.set_num_threads(1)
    register_tiny()
    *jobs, last = jobs
    for overrides in jobs:
        train(configure(*overrides))
    if environment["LOCAL_RANK"] == "1":
        BCNNModule.training_step = die  # type: ignore[method-assign,assignment]
    sys.exit(exit_code_of(lambda: bool(train(configure(*last)))))


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights that a stage ended with."""
    name = json.loads((folder / "result.json").read_text())["checkpoint"]
    return torch.load(folder.parent / name, weights_only=True)["state_dict"]


def figures(folder: Path) -> list[dict[str, float]]:
    rows = read_csv(folder / "metrics.csv")
    assert any(row["val_loss"] for row in rows)
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_two_processes_do_what_one_does_until_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    write_images(images / "train", 6, seed=0)
    for name in ("4.png", "5.png"):
        (images / "train" / "red" / name).unlink()
    write_images(images / "val", 3, seed=1)  # nine, which two cannot share equally

    def job(kind: str, name: str, *options: str) -> list[str]:
        output = f"output={tmp_path / kind / name}"
        return toy(images, SMALL, output, *options)

    jobs = [job("two", name, *options, *DDP) for name, options in (*JOBS.items(), ("lost", LOST))]
    # The pair has a store of its own: each of the two has to compute its share.
    monkeypatch.setenv("BCNN_STORES", str(tmp_path / "stores"))
    port = free_port()
    outputs = [tmp_path / f"rank{rank}" for rank in range(2)]
    pair = [start(rank, port, jobs, output) for rank, output in enumerate(outputs)]
    monkeypatch.setenv("BCNN_STORES", str(tmp_path / "others"))
    for name, options in JOBS.items():
        train(configure(*job("one", name, *options)))
    for process in pair:
        process.join(200)
    first, killed = (output.read_text() for output in outputs)
    assert [process.exitcode for process in pair] == [1, -9], (first, killed)
    for stage, bound in TOLERANCE.items():
        one, two = tmp_path / "one" / stage, tmp_path / "two" / stage
        pairs = [(name, weights(two)[name], tensor) for name, tensor in weights(one).items()]
        for name, together, alone in pairs:
            # A calibration is of logits, which are as close as weights times their size.
            slack = 1e-3 if bound and "calibration." in name else 0
            torch.testing.assert_close(together, alone, rtol=slack, atol=bound + slack)
        for together, alone in zip(figures(two), figures(one), strict=True):
            assert together == pytest.approx(alone, rel=1e-3)
    assert "Traceback" not in first
    assert "error: another process of this run has ended" in first
