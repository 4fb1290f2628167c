"""Sweeps: their jobs are ranked, interrupted ones continue, Optuna and launchers run them."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL, Run, read_csv, toy
from filelock import FileLock

from bcnn.cli import train as command
from bcnn.training.run_state import StageResult
from bcnn.training.stage import Stage
from bcnn.utils.errors import Interruption

LAST = ["stage=last", "last=sgd", "last.epochs=2", SMALL]
Main = Callable[..., int]


@pytest.fixture
def main(tiny: object, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """`bcnn train -m` with toy options, in this process and an empty folder; returns the exit code."""
    for name in ("run._write_report", "stage.plot_curves"):  # which take most of the time
        monkeypatch.setattr(f"bcnn.training.{name}", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", *words])
        try:
            return command.main(["-m", *toy(images, *LAST), *words])
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            return end.code if isinstance(end.code, int) else 1

    return call


def rows(folder: Path) -> list[dict[str, str]]:
    """What `jobs.csv` says of each job."""
    return read_csv(folder / "jobs.csv")


def test_a_sweep_ends_with_its_jobs_and_how_to_train_the_best_again(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main("last.optimizer.lr=1e-6,1e-2,1", "hydra.sweep.dir=s", "data.crop_pct=1.0") == 0
    printed = capsys.readouterr().out
    table = sorted(
        rows(tmp_path / "s"), key=lambda row: (-float(row["val_top1"]), float(row["val_loss"]))
    )
    assert len(table) == 3
    assert all(float(row["test_top1"]) >= 0 and float(row["seconds"]) > 0 for row in table)
    assert all((row["images_val"], row["images_test"]) == ("6", "6") for row in table)
    ranking = printed[printed.index("jobs, best validation top-1 first:") :]
    lines = [line.split() for line in ranking.splitlines() if "–" in line]
    assert [[line[0], line[3]] for line in lines] == [
        [row["job"], row["last.optimizer.lr"]] for row in table
    ]
    best = Path(table[0]["checkpoint"])
    assert f"best checkpoint: {best}" in ranking and best.is_file()
    assert (tmp_path / "s" / "sweep.html").is_file()

    words = shlex.split(ranking.partition("train it again: bcnn train ")[2].partition("\n")[0])
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert command.main([*words, "output=again"]) == 0
    once, again = (StageResult.read(folder, "last") for folder in (best.parents[1], Path("again")))
    assert once and again and once.metrics == again.metrics


def test_a_validation_of_some_images_has_no_interval(main: Main, tmp_path: Path) -> None:
    words = ["last.optimizer.lr=1e-2,1", "last.batch_size=3", "+trainer.limit_val_batches=1"]
    assert main(*words, "hydra.sweep.dir=s") == 0
    assert [row["images_val"] for row in rows(tmp_path / "s")] == ["", ""]


def test_jobs_that_fail_are_named_and_the_others_ranked(
    main: Main, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"data.root=nowhere,{images}", "hydra.sweep.dir=s") == 1
    assert re.search(r"error: s/0 failed \(.*data\.root=nowhere", capsys.readouterr().err)
    assert [row["data.root"] for row in rows(tmp_path / "s")] == ["nowhere", str(images)]
    assert "nowhere" in rows(tmp_path / "s")[0]["failure"]


def test_a_job_that_ended_worse_counts_by_what_it_kept(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = Stage._kept

    def worse(stage: Stage, *arguments: Any) -> StageResult:
        result = keep(stage, *arguments)
        result.failure = "it ended worse"
        return result

    monkeypatch.setattr(Stage, "_kept", worse)
    assert main("last.optimizer.lr=1e-2", "seed=0,1", "hydra.sweep.dir=s") == 1
    assert "it ended worse" in capsys.readouterr().err
    assert all(row["val_top1"] and row["failure"] for row in rows(tmp_path / "s"))
    (line,) = (tmp_path / "s" / "sweep.md").read_text().splitlines()[2:]
    assert " 2 |" in line  # seeds


@pytest.mark.parametrize(
    "words",
    [
        ["last.optimizer.lr=1e-6,1e-4,1e-2"],
        ["hparams_search=optuna_last", "hydra.sweeper.n_trials=3", "data.crop_pct=choice(0.9,1.0)"],
    ],
    ids=["grid", "optuna"],
)
def test_the_same_command_continues_an_interrupted_sweep(
    main: Main,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(*words, "hydra.sweep.dir=whole") == 0
    test, tested = Stage._test, []

    def interrupted(stage: Stage, result: StageResult) -> None:
        tested.append(result)
        if len(tested) == 2:  # Ctrl-C when the second job has trained
            raise Interruption(signal.SIGINT)
        test(stage, result)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_test", interrupted)
        assert main(*words, "hydra.sweep.dir=parts") == 130
    printed, first = capsys.readouterr(), tmp_path / "parts" / "0" / "last" / "best.ckpt"
    assert re.search(r"continue the sweep: bcnn train .*hydra\.sweep\.dir=parts", printed.out)
    assert "parts/1 has not finished" in printed.err
    assert [row["job"] for row in rows(tmp_path / "parts")] == ["0", "1"]
    written = first.stat().st_mtime_ns
    assert main(*words, "hydra.sweep.dir=parts") == 0 and first.stat().st_mtime_ns == written
    whole, parts = (rows(tmp_path / folder) for folder in ("whole", "parts"))
    for row in (*whole, *parts):
        del row["seconds"], row["checkpoint"]
    assert whole == parts and len(whole) == 3


def test_a_folder_takes_no_other_sweep(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["hparams_search=optuna", "hydra.sweep.dir=s", "hydra.sweeper.n_trials=1"]
    assert main(*words) == 1
    assert "nothing to search" in capsys.readouterr().err
    assert main(*words, "last.optimizer.lr=1,2") == 0
    assert main(*words, "last.optimizer.lr=1,3") == 1
    assert "holds a sweep with other options" in capsys.readouterr().err
    with FileLock(tmp_path / "s" / ".lock"):
        assert main(*words, "last.optimizer.lr=1,2") == 1
    assert "another sweep is running there" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["launcher=joblib", "hparams_search=optuna_last"])
def test_options_of_sweeps_need_a_sweep(main: Main, word: str, images: Path) -> None:
    with pytest.raises(SystemExit, match=f"{word} is for sweeps: add -m"):
        command.main([*toy(images, *LAST), word])


SBATCH = """#!/bin/sh
for task in 0 1; do
  SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 \\
  SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NODELIST=here SLURM_CPUS_PER_TASK=1 \\
  sh "$1" > /dev/null 2>&1 &
done
cp "$1" sbatch.sh
echo Submitted batch job 7
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do [ "$1" = --unbuffered ] || shift; shift; done
exec "$@"
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "slurm", "ray"])
def test_launchers_run_jobs_in_other_processes_that_share_a_store(
    launcher: str, python: Run, images: Path, tmp_path: Path, stores: Path
) -> None:
    if launcher == "ray":
        pytest.importorskip("ray")  # 70 MB, not in the development environment
    (tmp_path / "bin").mkdir()
    for name, script in {"sbatch": SBATCH, "srun": SRUN, "sacct": "#!/bin/sh\n"}.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    words = [f"launcher={launcher}", *LAST[:2], "last.epochs=1", "last.optimizer.lr=0.1,10"]
    if launcher == "joblib":
        words.append("hydra.launcher.n_jobs=2")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    words = ["-m", *toy(images, *words), "hydra.sweep.dir=s"]
    done = python(str(ROOT / "train.py"), *words, PATH=path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows(tmp_path / "s")) == 2 and "train it again: " in done.stdout
    assert len(list(stores.glob("*/store.json"))) == 1
    if launcher == "slurm":
        batch = (tmp_path / "sbatch.sh").read_text()
        assert "--array=0-1%2" in batch and "--gpus-per-node=1" in batch
