"""Runs that are killed and resumed."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, Run, configure, fork, register_tiny, toy, weights, write

from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.run import train
from bcnn.training.run_state import RunState
from bcnn.utils.errors import Interruption, UserError, raise_interruptions

Kill = tuple[str, int]  # at the n-th of an event


def count(
    owner: Any, name: str, event: str, seen: Counter[str], kill: Kill | None, number: signal.Signals
) -> None:
    """Count the calls of a function; get a signal at the n-th of an event."""
    function = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        seen[event] += 1
        if kill == (event, seen[event]):
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    setattr(owner, name, counted)


def job(
    variables: dict[str, str],
    words: list[str],
    folder: Path,
    kill: Kill | None,
    number: signal.Signals,
) -> None:
    """Begin a run, or resume one that was begun; a signal at an event."""
    import bcnn.evaluation.results
    import bcnn.training.checkpointing
    from bcnn.training.feature_store import FeatureStore
    from bcnn.training.module import BCNNModule

    bcnn.training.checkpointing.EVERY = 0
    # For the loaders: of a server of their own, workers would outlive a job that is killed.
    multiprocessing.set_start_method("fork", force=True)
    register_tiny()
    os.environ.update(variables)
    os.chdir(folder.parent)  # the words name the folder relatively
    seen: Counter[str] = Counter()
    for owner, name, event in (
        (FeatureStore, "write", "chunk"),
        (BCNNModule, "training_step", "step"),
        (BCNNModule, "validation_step", "validation"),
        (torch, "save", "checkpoint"),
        (os, "fsync", "sync"),
        (Path, "replace", "rename"),
        (bcnn.evaluation.results, "_write_classes", "report"),
    ):
        count(owner, name, event, seen, kill, number)
    raise_interruptions()
    begun = (folder / "run.yaml").is_file()
    try:
        train(configure(*words), words, resume=begun)
    except Interruption as error:
        sys.exit(error.exit_code)
    except UserError as error:
        if "worse than it started" not in str(error):
            raise


@pytest.fixture
def killed(stores: Path, tiny: BCNN) -> Callable[..., int]:
    """Run in a process of its own; returns its exit code."""

    def start(
        words: list[str],
        folder: Path,
        kill: Kill | None = None,
        number: signal.Signals = signal.SIGKILL,
        **variables: str,
    ) -> int:
        for name in ("BCNN_STORES", "XDG_CACHE_HOME"):
            variables[name] = os.environ[name]
        process = fork.Process(target=job, args=(variables, words, folder, kill, number))
        process.start()
        process.join(200)
        return process.exitcode or 0

    return start


SGD = ("last=sgd", "last.epochs=2", "last.batch_size=4", "last.optimizer.lr=0.1")
FINETUNE = ("finetune.epochs=3", "finetune.batch_size=4", "finetune.optimizer.lr=1e-3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kills"),
    [
        (
            ("scheduler@finetune.scheduler=plateau",),
            [
                ("chunk", 2),
                ("checkpoint", 1),  # before an epoch is done: nothing to resume from yet
                ("rename", 6),
                ("validation", 6),
                ("step", 6),  # of the second stage
                ("sync", 4),
                ("report", 1),
            ],
        ),
        (
            ("data.val_fraction=0", "data.num_workers=2", "data.sampler=balanced"),
            [("step", 15), ("step", 6)],
        ),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    images: Path,
    tmp_path: Path,
    killed: Callable[..., int],
    options: tuple[str, ...],
    kills: list[Kill],
) -> None:
    words = toy(images, SMALL, *SGD, *FINETUNE, *options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*words, "output=parts"]
    for kill in kills:
        assert killed(words, parts, kill) == -signal.SIGKILL, kill
    assert killed(words, parts) == 0
    assert killed([*words[:-1], "output=whole"], whole) == 0
    name = "last.ckpt" if "data.val_fraction=0" in options else "best.ckpt"
    for stage in ("last", "finetune"):
        once, often = (weights(folder / stage / name) for folder in (whole, parts))
        assert all(torch.equal(once[key], often[key]) for key in once), stage
        log, resumed = ((folder / stage / "metrics.csv").read_text() for folder in (whole, parts))
        assert log == resumed
    assert (whole / "classes.csv").read_text() == (parts / "classes.csv").read_text()
    assert not [*parts.rglob(".part-*")]
    assert RunState.read(parts).finished


@pytest.mark.slow
def test_ctrl_c_ends_a_run_that_the_command_it_shows_resumes(
    images: Path, tmp_path: Path, train: Run
) -> None:
    words = ["stage=last", *toy(images, *SGD[:1], "last.epochs=10_000"), "output=run"]
    command = [sys.executable, str(ROOT / "train.py"), *words]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    while not (tmp_path / "run" / "last" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 130 and "Traceback" not in output, output
    assert f"resume with: bcnn train resume={tmp_path}/run" in output
    state = tmp_path / "run" / "run.yaml"
    state.write_text(re.sub(r"epochs(:|=)( ?)10_?000", r"epochs\1\g<2>1", state.read_text()))
    done = train(f"resume={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert "\ncheckpoint: " in done.stdout and "next, to fine-tune it: " in done.stdout
    both = train(f"resume={tmp_path}/run", "seed=3")
    assert both.returncode == 1 and "leave out seed=3" in both.stderr


@pytest.mark.slow
def test_sigterm_and_a_job_that_slurm_runs_again(
    images: Path, tmp_path: Path, train: Run, killed: Callable[..., int]
) -> None:
    words = ["stage=last", *toy(images, *SGD), "output=run"]
    assert killed(words, tmp_path / "run", ("step", 5), signal.SIGTERM) == 143
    assert (tmp_path / "run" / "last" / "last.ckpt").is_file()
    for _ in range(2):  # the second time, the run has finished
        again = train(*words, SLURM_RESTART_COUNT="1")
        assert again.returncode == 0, again.stderr
    assert len((tmp_path / "run" / "last" / "metrics.csv").read_text().splitlines()) == 6
    refused = train(*words)
    assert refused.returncode == 1 and "holds a run already" in refused.stderr


@pytest.mark.usefixtures("tiny")
def test_a_run_is_resumed_where_it_was_moved_to_and_not_with_other_images(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = toy(images, SMALL, "stage=last", "last.l2=[1e-2]")

    def begun(output: Path) -> None:
        """A run that is interrupted after its stage."""
        with monkeypatch.context() as patch:
            patch.setattr("bcnn.training.run._write_report", interrupted)
            with pytest.raises(Interruption):
                train(configure(*words, f"output={output}"), words)

    begun(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    train(configure(*words, f"output={tmp_path / 'moved'}"), words, resume=True)
    report = (tmp_path / "moved" / "report.html").read_text()
    assert "32 px (keep, crop_pct 1, bilinear)" in report and "<dt>resumed</dt>" in report
    begun(tmp_path / "other")
    write(images / "train" / "red" / "new.png", seed=99)
    with pytest.raises(UserError, match=r"the images or their classes changed since .*other began"):
        train(configure(*words, f"output={tmp_path / 'other'}"), words, resume=True)


def interrupted(*_: Any) -> None:
    raise Interruption(signal.SIGTERM)
