"""Sweeps: their jobs ranked at the end, gone on with, by Optuna, and by other launchers."""

import csv
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Run, toy
from filelock import FileLock

from bcnn.evaluation.jobs import Job, in_order, swept_options, write_jobs
from bcnn.evaluation.plots import option_svg
from bcnn.training import command, stages, sweep
from bcnn.training.run_state import StageResult
from bcnn.utils.interruption import Interruption

LAST = ["stage=last", "last=sgd", "last.epochs=2", "model.backbone.name=tiny"]
Main = Callable[..., int]


@pytest.fixture
def main(
    tiny: object, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """`train.py -m` with toy options in this process, in a folder of its own; returns the exit code."""
    monkeypatch.setattr(command, "raise_interruptions", lambda: None)
    for name in ("_report", "plot_curves"):  # which take most of the time
        monkeypatch.setattr(stages, name, lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", *words])
        try:
            return command.main(["-m", *toy(images, *LAST), *words])
        except SystemExit as end:
            return int(end.code or 0)

    return call


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def job(name: str, top1: float | None, loss: float = 1.0, failure: str = "", **options: str) -> Job:
    words = ["stage=last", *(f"{key}={value}" for key, value in options.items())]
    metrics = {} if top1 is None else {"val_top1": top1, "val_loss": loss}
    return Job(Path(name), words, "bcnn train …", metrics, 1.0, Path("best.ckpt"), failure)


def test_jobs_are_ranked_by_validation_top1_then_by_its_loss() -> None:
    jobs = [
        job("10", 0.5, 0.3),
        job("2", 0.5, 0.3),
        job("3", None),
        job("4", 0.9, failure="the disk is full"),
        job("5", 0.5, 0.2),
        job("6", 0.7, 9.0),
    ]
    assert [each.folder.name for each in in_order(jobs)] == ["6", "5", "2", "10", "3", "4"]


def test_options_that_differ_are_told_apart_from_those_of_all() -> None:
    jobs = [
        job("0", 0.5, lr="1", size="64"),
        job("1", 0.5, lr="2", size="64"),
        job("2", 0.5, size="64"),
    ]
    assert swept_options(jobs) == ["lr"]
    assert jobs[0].said(["lr"]) == "lr=1" and jobs[2].said(["lr"]) == ""


def test_the_page_shows_what_a_formula_or_markup_would_be(tmp_path: Path) -> None:
    jobs = [
        job("0", 0.5, pooling="=1+1"),
        job("1", 0.75, pooling="<script>"),
        job("2", None, failure="<b>"),
    ]
    write_jobs(tmp_path, in_order(jobs))
    page = (tmp_path / "sweep.html").read_text()
    assert "<script" not in page and "<b>" not in page and "75.0%" in page
    assert page.index("&lt;script&gt;") < page.index("=1+1</td>")
    assert [row["job"] for row in rows(tmp_path)] == ["1", "0", "2"]
    assert rows(tmp_path)[1]["pooling"] == "'=1+1"


@pytest.mark.parametrize(
    ("values", "even"),
    [(["1e-3", "1e-2", "1e-1"], True), (["0", "1e-5", "1e-4"], False), (["1", "2", "4"], False)],
)
def test_values_that_span_decades_are_on_a_logarithmic_axis(values: list[str], even: bool) -> None:
    svg = option_svg("lr", values, [0.5, 0.6, 0.7])
    ticks = [float(x) for x in re.findall(r'id="xtick_\d+".*?<use [^>]*x="([\d.]+)"', svg, re.DOTALL)]
    low, middle, high = ticks
    if values[0] == "0":
        assert middle - low == pytest.approx(high - middle, rel=0.2)
    else:
        assert (middle - low == pytest.approx(high - middle, rel=0.01)) == even


def test_a_sweep_ends_with_its_jobs_and_how_to_train_the_best_again(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = ["1e-6", "1e-2", "1"]
    assert main(f"last.optimizer.lr={','.join(rates)}", "hydra.sweep.dir=s", "data.crop_pct=1.0") == 0
    said = capsys.readouterr().out
    table = rows(tmp_path / "s")
    order = [(-float(row["val_top1"]), float(row["val_loss"])) for row in table]
    assert len(table) == 3 and order == sorted(order)
    assert [float(row["test_top1"]) >= 0 and float(row["seconds"]) > 0 for row in table] == [True] * 3
    ranking = said[said.index("jobs, the best validation top-1 first") :]
    assert re.findall(r"last\.optimizer\.lr=(\S+)$", ranking, re.MULTILINE)[:3] == [
        row["last.optimizer.lr"] for row in table
    ]
    assert f"best checkpoint: {table[0]['checkpoint']}" in ranking
    assert Path(table[0]["checkpoint"]).is_file() and (tmp_path / "s" / "sweep.html").is_file()

    line = next(line for line in ranking.splitlines() if line.startswith("train it again: "))
    words = shlex.split(line)[shlex.split(line).index("train.py") + 1 :]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert command.main([*words, "output=again"]) == 0
    once, again = (
        StageResult.read(place, "last") for place in (tmp_path / "s" / table[0]["job"], Path("again"))
    )
    assert once and again and once.metrics == again.metrics


def test_without_validation_images_no_job_is_the_best(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("last.optimizer.lr=1,2", "data.val_fraction=0", "hydra.sweep.dir=s") == 0
    said = capsys.readouterr().out
    assert "without validation images to rank them by" in said and "train it again" not in said
    page = (tmp_path / "s" / "sweep.html").read_text()
    assert "no validation images" in page and "The best again" not in page


def test_jobs_that_fail_are_named_and_the_others_ranked(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("data.size=32,33.5", "hydra.sweep.dir=s") == 1
    said = capsys.readouterr()
    assert "jobs that failed (1):" in said.err and "data.size=33.5" in said.err
    assert [row["data.size"] for row in rows(tmp_path / "s")] == ["32", "33.5"]
    assert "whole number" in rows(tmp_path / "s")[1]["failure"]


def interrupt_job(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when that job has trained."""
    fit, begun = stages._fit, []

    def interrupted(*arguments: Any) -> str:
        begun.append(arguments)
        failure = fit(*arguments)
        if len(begun) == number + 1:
            raise Interruption(signal.SIGINT)
        return failure

    monkeypatch.setattr(stages, "_fit", interrupted)


@pytest.mark.parametrize(
    "words",
    [
        ["last.optimizer.lr=1e-6,1e-4,1e-2"],
        ["sweep=optuna_last", "hydra.sweeper.jobs=3", "data.crop_pct=choice(0.9,1.0)"],
    ],
    ids=["grid", "optuna"],
)
def test_the_same_command_goes_on_with_an_interrupted_sweep(
    main: Main,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(*words, "hydra.sweep.dir=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_job(1, patch)
        assert main(*words, "hydra.sweep.dir=parts") == 130
    said = capsys.readouterr()
    assert re.search(r"go on with the sweep: .*hydra\.sweep\.dir=parts", said.out)
    assert "jobs that have not ended (1):" in said.err
    assert [row["job"] for row in rows(tmp_path / "parts")] == ["0", "1"]
    first = (tmp_path / "parts" / "0" / "last" / "best.ckpt").stat().st_mtime_ns
    assert main(*words, "hydra.sweep.dir=parts") == 0
    assert (tmp_path / "parts" / "0" / "last" / "best.ckpt").stat().st_mtime_ns == first
    left = {"seconds", "checkpoint", "command"}
    whole, parts = (
        [
            {name: cell for name, cell in row.items() if name not in left}
            for row in rows(tmp_path / place)
        ]
        for place in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 3


def test_a_folder_takes_no_other_sweep(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep=optuna", "hydra.sweep.dir=s", "hydra.sweeper.jobs=1"]
    assert main(*words) == 1
    assert "nothing to search" in capsys.readouterr().err
    assert main(*words, "last.optimizer.lr=1,2") == 0
    assert main(*words, "last.optimizer.lr=1,3") == 1
    assert "holds a sweep with other options" in capsys.readouterr().err
    with FileLock(tmp_path / "s" / ".lock"):
        assert main(*words, "last.optimizer.lr=1,2") == 1
    assert "another sweep is running there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "package"),
    [
        ("launcher=joblib", "hydra-joblib-launcher"),
        ("launcher=slurm", "hydra-submitit-launcher"),
        ("launcher=ray", "hydra-ray-launcher"),
        ("sweep=optuna_last", "optuna"),
    ],
)
def test_what_is_not_installed_is_a_sentence_before_anything_is_trained(
    main: Main,
    word: str,
    package: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    assert main("seed=1,2", word, "hydra.sweep.dir=s") == 1
    said = capsys.readouterr()
    assert said.err.strip() == f"error: this sweep needs {package}: pip install {package}"
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("word", ["launcher=joblib", "sweep=optuna_last"])
def test_how_jobs_are_run_is_for_sweeps(
    main: Main, word: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main([*toy(images, *LAST), word])
    assert f"{word} is for sweeps: add -m" in capsys.readouterr().err


def test_jobs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "cores", lambda: 12)
    gpus = SimpleNamespace(count=0)
    monkeypatch.setattr(sweep, "gpus", lambda: gpus.count)
    assert sweep.jobs_at_once() == 12
    gpus.count = 4
    assert sweep.jobs_at_once() == 1


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
    launcher: str, train: Run, images: Path, tmp_path: Path, stores: Path
) -> None:
    if launcher == "ray":
        pytest.importorskip("ray")  # 70 MB, not of the development environment
    (tmp_path / "bin").mkdir()
    for name, script in {"sbatch": SBATCH, "srun": SRUN, "sacct": "#!/bin/sh\n"}.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    options = toy(images, "stage=last", "last=sgd", "last.epochs=1", "last.optimizer.lr=0.1,10")
    at_once = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    place = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run = train(
        "-m",
        *options,
        f"launcher={launcher}",
        *at_once,
        "hydra.sweep.dir=s",
        PATH=place,
        HOME=str(tmp_path),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(rows(tmp_path / "s")) == 2 and "train it again: " in run.stdout
    assert len(list(stores.glob("*/store.json"))) == 1
    if launcher == "slurm":
        batch = (tmp_path / "sbatch.sh").read_text()
        assert "--array=0-1%2" in batch and "--gpus-per-node=1" in batch
