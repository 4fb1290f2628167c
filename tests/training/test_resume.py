"""Runs that are killed, and gone on with."""

import multiprocessing
import os
import shutil
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
from conftest import ROOT, Run, configure, toy, write

from bcnn.models import backbones
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.checkpointing import BestOrLastCheckpoint
from bcnn.cli.train import resume as resume_command
from bcnn.training.run import train
from bcnn.training.run_state import RunState, StageResult
from bcnn.utils.errors import UserError
from bcnn.utils.interruption import Interruption, raise_interruptions

# Children of a process that has imported all this once.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["bcnn.training.run", "torch._dynamo", "test_resume"])


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
    """Begin a run, or go on with it where it was begun; a signal at an event."""
    import bcnn.evaluation.figures
    import bcnn.training.checkpointing
    from bcnn.training.feature_store import FeatureStore
    from bcnn.training.module import BCNNModule

    bcnn.training.checkpointing.EVERY = 0
    # For the loaders: of a server of their own, workers would outlive a job that is killed.
    multiprocessing.set_start_method("fork", force=True)
    backbones.__path__.append(variables["backbones"])
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
        (bcnn.evaluation.figures, "_write_classes", "report"),
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
        variables["backbones"] = backbones.__path__[-1]
        process = fork.Process(target=job, args=(variables, words, folder, kill, number))
        process.start()
        process.join(200)
        return process.exitcode or 0

    return start


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


SMALL = "model.backbone.name=tiny"
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
                ("checkpoint", 1),  # before an epoch is done: nothing to go on from yet
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
    assert not [*parts.rglob(".part-*"), *parts.rglob("resume.ckpt")]
    with pytest.raises(UserError, match="finished"):
        RunState.read(parts)


def interrupt(words: list[str], folder: Path, sign: str, number: signal.Signals) -> tuple[int, str]:
    """`python train.py *words`, with a signal once a file `sign` is there: exit code and output."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not [*folder.glob(sign)]:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    return process.returncode, output


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_says_how_to_go_on_and_that_does(
    images: Path, tmp_path: Path, train: Run
) -> None:
    words = ["-m", "seed=1,2", "stage=last", *toy(images, *SGD[:1], "last.epochs=10_000")]
    sweep = ["hydra.sweep.dir=sweep"]
    code, output = interrupt([*words, *sweep], tmp_path, "sweep/0/last/resume.ckpt", signal.SIGINT)
    assert code == 130, output
    assert "interrupted (SIGINT)" in output and "Traceback" not in output
    assert f"best weights until now: {tmp_path}/sweep/0/last/best.ckpt" in output
    assert f"go on with: {sys.executable} {ROOT}/train.py resume={tmp_path}/sweep/0" in output
    assert not (tmp_path / "sweep" / "1").exists()
    record = tmp_path / "sweep" / "0" / "run.yaml"
    record.write_text(record.read_text().replace("epochs: 10000", "epochs: 1"))  # it is here for long
    done = train(f"resume={tmp_path}/sweep/0")
    assert done.returncode == 0, done.stderr
    assert "best checkpoint" in done.stdout and "next: " in done.stdout
    both = train(f"resume={tmp_path}/sweep/0", "seed=3")
    assert both.returncode == 1 and "give no others" in both.stderr


@pytest.mark.slow
def test_sigterm_and_a_job_that_slurm_runs_again(
    images: Path, tmp_path: Path, killed: Callable[..., int]
) -> None:
    words = ["stage=last", *toy(images, SMALL, *SGD), "output=run"]
    assert killed(words, tmp_path / "run", ("step", 5), signal.SIGTERM) == 143
    assert (tmp_path / "run" / "last" / "resume.ckpt").is_file()
    assert killed(words, tmp_path / "run", SLURM_RESTART_COUNT="1") == 0
    assert len((tmp_path / "run" / "last" / "metrics.csv").read_text().splitlines()) == 6
    with pytest.raises(UserError, match="holds a run already"):
        train(configure(*words[:-1], f"output={tmp_path / 'run'}"))


def begun(images: Path, output: Path) -> Path:
    """A run of stage `last` as if it had been interrupted after its stage."""
    train(configure(*toy(images, "stage=last", "last.l2=[1e-2]", f"output={output}")))
    record = output / "run.yaml"
    record.write_text(record.read_text().replace("finished: true", "finished: false"))
    return record


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_moved_to_and_not_with_other_images(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone() -> dict[str, str]:
        return {"commit": "altered since" if (tmp_path / "run" / "last").exists() else "as it began"}

    monkeypatch.setattr("bcnn.training.run.software", clone)
    begun(images, tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    assert "32 px (keep, crop_pct 1, bilinear)" in text
    assert "as it began" in text and "altered since" not in text and "gone on with" not in text
    (tmp_path / "run").rename(tmp_path / "moved")
    resume(tmp_path / "moved")
    assert f"best checkpoint: {tmp_path}/moved/last/best.ckpt" in capsys.readouterr().out
    text = (tmp_path / "moved" / "report.html").read_text()
    assert "as it began since it was gone on with; before that is not known" in text
    record = begun(images, tmp_path / "other")
    write(images / "train" / "red" / "new.png", seed=99)
    with pytest.raises(UserError, match=r"not those that .*other was begun with"):
        resume(record.parent)


def test_a_record_keeps_any_path_and_makes_it_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a\udcff: [b]", "imagenet"):
        Path(name).mkdir()
    cfg = configure(*toy(Path("x"), "output=run", "model.weights=imagenet"))
    cfg.data.root = "a\udcff: [b]"
    RunState(cfg, ["data.root=a"]).write()
    monkeypatch.chdir("/")
    record = RunState.read(tmp_path / "run")
    assert record.cfg.data.root == str(tmp_path / "a\udcff: [b]")
    assert record.cfg.model.weights == "imagenet"
    assert (record.cfg.output, record.words) == (str(tmp_path / "run"), ["data.root=a"])


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("finished", "finis: [", "lacks or is damaged"),
        ("cfg:", "stuff:", "lacks or is damaged"),
        ("lightning.pytorch.loggers.CSVLogger", "os.system", "os.system, which no configuration needs"),
        ("torch.nn.CrossEntropyLoss", "subprocess.run", "subprocess.run, which no configuration needs"),
        ("torch.nn.CrossEntropyLoss", "no.such.thing", "there is no no.such.thing"),
        ("seed: 0", "sed: 0", "seed"),
    ],
)
def test_a_strangers_record_runs_nothing(
    images: Path, tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    RunState(configure(*toy(images, f"output={tmp_path}")), []).write()
    record = tmp_path / "run.yaml"
    record.write_text(record.read_text().replace(old, new))
    with pytest.raises(UserError, match=sentence):
        resume(tmp_path)


def test_no_room_is_said_before_an_epoch(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run cannot be written: Not a directory"):
        train(configure(*toy(images, f"output={tmp_path}/file/run")))
    free = shutil._ntuple_diskusage(10**9, 0, 5 * 10**6)
    monkeypatch.setattr("bcnn.training.checkpointing.shutil.disk_usage", lambda _: free)
    words = toy(images, "stage=last", "last=sgd", "last.store=false", f"output={tmp_path}/run")
    with pytest.raises(UserError, match=r"no room for checkpoints: 0.\d\d GB are needed"):
        train(configure(*words))


def test_a_record_tells_where_weights_are_however_its_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning says it absolutely, without links; a run may be moved all the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    Path("link").symlink_to("disk")
    for output in (Path("a"), Path("link/b")):
        (output / "last").mkdir(parents=True)
        StageResult("last", (output / "last" / "best.ckpt").resolve(), {}).write(output)
        output.rename("moved")
        found = StageResult.read(Path("moved"), "last")
        assert found is not None and found.checkpoint == Path("moved/last/best.ckpt")
        Path("moved").rename(f"{output.name} of before")


@pytest.mark.usefixtures("tiny")
def test_weights_of_an_epoch_after_the_state_are_forgotten(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state is of a minute ago at most; what is gone on with keeps figures with their weights."""
    words = toy(images, f"output={tmp_path / 'run'}", SMALL, "stage=last", *SGD, "last.epochs=4")
    save, states = BestOrLastCheckpoint.on_train_epoch_end, []

    def end(self: BestOrLastCheckpoint, trainer: Any, module: Any) -> None:
        save(self, trainer, module)
        states.append(self.state.read_bytes() if self.state.is_file() else b"")
        if len(states) == 2:
            self.state.write_bytes(states[0])  # as if none had been due since
            raise Interruption(signal.SIGTERM)

    monkeypatch.setattr(BestOrLastCheckpoint, "on_train_epoch_end", end)
    with pytest.raises(Interruption):
        train(configure(*words), words)
    monkeypatch.setattr(BestOrLastCheckpoint, "on_train_epoch_end", save)
    seen: list[dict[str, float]] = []
    load = BestOrLastCheckpoint.load_state_dict

    def loaded(self: BestOrLastCheckpoint, state: dict[str, Any]) -> None:
        load(self, state)
        seen.append(self.metrics)

    monkeypatch.setattr(BestOrLastCheckpoint, "load_state_dict", loaded)
    assert 0 <= resume(tmp_path / "run") <= 1
    assert seen == [{}]


def test_a_run_that_ends_between_its_last_notes_is_gone_on_with(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: RunState) -> None:
        raise Interruption(signal.SIGTERM)

    finish = RunState.finish
    monkeypatch.setattr(RunState, "finish", interrupted)
    words = toy(images, "stage=last", "last.l2=[1e-2]", f"output={tmp_path / 'run'}")
    with pytest.raises(Interruption):
        train(configure(*words), words)
    monkeypatch.setattr(RunState, "finish", finish)
    weights_of = (tmp_path / "run" / "last" / "best.ckpt").stat().st_mtime_ns
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "last" / "best.ckpt").stat().st_mtime_ns == weights_of
    with pytest.raises(UserError, match="this run is finished"):
        resume(tmp_path / "run")
