"""`bcnn train` and `python train.py`: from the words of a user to a run, at toy size."""

import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, Bcnn, Run, configure, read_csv, toy

from bcnn.cli import train as command
from bcnn.training import run as runs

TRAIN = str(ROOT / "train.py")


def next_command(printed: str) -> list[str]:
    line = next(line for line in printed.splitlines() if line.startswith("next, "))
    return shlex.split(line.partition(": ")[2])


@pytest.mark.slow
def test_last_then_the_command_that_it_prints_in_a_folder_of_any_name(
    bcnn: Bcnn, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "a=b (1), 'c'"
    here.mkdir()
    monkeypatch.chdir(here)
    options = toy(Path("..", "images"), "experiment=quick", "finetune.epochs=1")
    run = subprocess.run(
        [sys.executable, TRAIN, "stage=last", *options], capture_output=True, text=True
    )
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    last = run.stdout
    assert re.search(r"test top-1 +\d+\.\d%  of 6 images", last)
    checkpoint = re.search(r"\ncheckpoint: (.+)", last)
    assert checkpoint and Path(checkpoint[1]).is_file()
    program, verb, *overrides = next_command(last)
    assert (program, verb) == ("bcnn", "train")
    assert overrides == [
        "stage=finetune",
        next(w for w in overrides if w.startswith("ckpt=")),
        *(kept := [word for word in options if not word.startswith("model")]),  # ckpt has the network
    ]
    finetune = bcnn(verb, *overrides)
    assert finetune.code == 0 and "Traceback" not in finetune.err, finetune.err
    _, _, *again = next_command(finetune.out)
    assert {"stage=finetune", "finetune.optimizer.lr=0.003", *kept} <= {*again}


@pytest.mark.slow
def test_wandb_offline_and_tensorboard_need_no_account(
    train: Run, images: Path, tmp_path: Path
) -> None:
    def words(logger: str) -> list[str]:
        return toy(
            images, "stage=last", "last.folds=null", f"logger={logger}", f"output={tmp_path / logger}"
        )

    run = train(*words("wandb"), WANDB_DATA_DIR=str(tmp_path / "data"))
    assert run.returncode == 0, run.stderr
    runs.train(configure(*words("tensorboard")))
    for logger in ("wandb", "tensorboard"):
        log = read_csv(tmp_path / logger / "last" / "metrics.csv")
        assert any(row["val_top1"] for row in log)
    runs_of_wandb = list((tmp_path / "wandb").glob("last/wandb/offline-run-*"))
    assert len(runs_of_wandb) == 2 and len({each.name.split("-")[-1] for each in runs_of_wandb}) == 1
    report = (tmp_path / "wandb" / "report.html").read_bytes()
    assert any(
        path.is_file() and path.read_bytes() == report for path in (tmp_path / "data").rglob("*")
    )
    assert list((tmp_path / "tensorboard" / "last").glob("tensorboard/events.*"))


@pytest.mark.slow
def test_two_processes_share_the_building_under_ddp(
    python: Run, images: Path, stores: Path, tmp_path: Path
) -> None:
    ddp = ["stage=last", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    run = python(TRAIN, *toy(images, *ddp), OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\ncheckpoint: ") == 1
    assert len([*stores.glob("*/*.npy")]) == 2
    (log,) = tmp_path.glob("outputs/*/*/train.log")
    assert len(re.findall(r"^\d{4}-\d\d-\d\d ", log.read_text(), re.MULTILINE)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("data.sise=64", "there is no option data.sise: did you mean data.size?"),
        ("-m data.sise=64", "there is no option data.sise: did you mean data.size?"),
        ("-m seed=1,2 output=out", "output=out is one folder for all jobs of a sweep"),
        ("-m --epochs 5", "OPTION=VALUE, without dashes: did you mean finetune.epochs=5?"),
        ("batch_size=8", "there is no option batch_size: did you mean finetune.batch_size?"),
        ("last.lr=0.1", "there is no option last.lr: did you mean finetune.optimizer.lr?"),
        ("pooling=sqrt", "there is no option pooling: did you mean model/pooling?"),
        ("optimizer=adam", "did you mean optimizer@finetune.optimizer?"),
        ("model.pooling=sqrt", "model.pooling is a group of options: write model/pooling=NAME"),
        ("finetune.loss=3", "group of options: write finetune.loss.OPTION=VALUE"),
        ("last.optimizer.lr=0.1", "last.optimizer.lr is an option of last=sgd: add last=sgd"),
        ("trainer.max_time=1", "--help lists all; +trainer.max_time=… passes it to the class"),
        ("data.size=big", "Value 'big' of type 'str' could not be converted to Integer"),
        ("model/pooling=mean", "there is no model/pooling=mean: choose from auto, average, bilinear,"),
        ("model=3", "must be a string or a list"),
        ("seed=${nope}", "Interpolation key 'nope' not found"),
        ("finetune.epochs", "missing EQUAL"),
        ("--epochs 5", "OPTION=VALUE, without dashes: did you mean finetune.epochs=5?"),
        ("--data.root=my-images", "did you mean data.root=my-images?"),
    ],
)
def test_words_that_make_no_configuration(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert command.main(words.split()) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ") and sentence in said
    assert "Traceback" not in said and "append" not in said


def test_flags_may_stand_anywhere(train: Run, tmp_path: Path) -> None:
    own = tmp_path / "mine" / "experiment" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\nseed: 7\n")
    words = ["stage=last", "--config-dir", "mine", "experiment=own", "--cfg", "job", "data=folder"]
    shown = train(*words).stdout
    assert "seed: 7\n" in shown and "stage: last\n" in shown
    own.write_text("seed: 7\n")
    assert "experiment/own.yaml has to begin with the line # @package _global_" in train(*words).stderr


def test_a_run_is_resumed_with_the_configuration_of_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "a=b (1), 'c'" / "conf" / "experiment" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\nseed: 7\n")
    monkeypatch.chdir(own.parents[2])
    assert command.compose(["experiment=own"]).seed == 7
    monkeypatch.chdir(tmp_path)
    assert command.compose(["experiment=own"], str(own.parents[1])).seed == 7


@pytest.mark.usefixtures("tiny")
def test_a_run_with_a_folder_of_options_is_resumed_with_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "mine" / "experiment" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\nseed: 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    options = toy(Path("images"), "stage=last", SMALL, "experiment=own", "output=run")
    assert command.main([*options, "--config-dir", "mine"]) == 0
    assert f"experiment=own --config-dir={tmp_path}/mine\n" in capsys.readouterr().out
    assert command.main(["resume=run"]) == 1
    assert "experiment/own" in capsys.readouterr().err
    assert command.main(["resume=run", "--config-dir", "mine"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert command.main(["resume=run", "--config-dir", "mine", "--best"]) == 1
    assert "leave out --best" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_paths_are_those_of_the_working_folder_wherever_hydra_goes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    options = toy(Path("images"), "stage=last", SMALL, "hydra.job.chdir=true")
    assert command.main(options) == 0
    (log,) = tmp_path.glob("outputs/*/*/train.log")
    assert command.main([f"resume={log.parent}"]) == 0
    assert "this run has finished already" in capsys.readouterr().out
    assert Path.cwd() == tmp_path


def test_broken_images_stop_a_run_before_it_trains(train: Run, images: Path, tmp_path: Path) -> None:
    (images / "train" / "red" / "0.png").write_text("not a photograph")
    (images / "test" / "blue" / "1.png").write_bytes(b"")
    run = train(*toy(images, "stage=last"))
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("error: 2 of 24 images cannot be decoded")
    assert "Traceback" not in run.stderr and "Error executing job" not in run.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    "launched",
    [
        {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
    ],
)
def test_processes_that_were_started_together_need_one_folder(
    python: Run, tmp_path: Path, launched: dict[str, str]
) -> None:
    train = partial(python, TRAIN)
    run = train("stage=last", **launched)
    assert run.returncode == 1 and "add output=FOLDER" in run.stderr
    assert not (tmp_path / "outputs").exists()
    other = {name: "1" for name in launched if name in ("RANK", "SLURM_PROCID")}
    assert train("stage=last", **{**launched, **other}).stderr == ""  # said once
    named = train("last.optimiser.lr=1", "output=out", **launched)  # Hydra's mistake comes later
    assert "optimiser" in named.stderr


def test_train_takes_text_and_prints_on_any_terminal(python: Run, tmp_path: Path) -> None:
    (tmp_path / "a,b").touch()
    files = ["data.root=2024_01", "data.list=set (1)", "ckpt=λ/a=b", "data.taxonomy=a,b"]
    options = ["data=folder", *files, "data.unlabelled='o\\'clock'"]
    run = python(TRAIN, "--cfg", "job", *options, PYTHONIOENCODING="cp1252")
    assert run.returncode == 0, run.stderr
    assert "\n  root: '2024_01'\n  list: set (1)\n" in run.stdout
    assert "ckpt: \\u03bb/a=b\n" in run.stdout
    assert "taxonomy: a,b\n" in run.stdout and "unlabelled: o'clock\n" in run.stdout
