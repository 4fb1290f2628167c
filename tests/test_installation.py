"""What is installed: the command `bcnn`, and all that it reads."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Run

from bcnn.__main__ import VERBS, main
from bcnn.cli import cache as store
from bcnn.utils.options import command, program

BUILD = "from setuptools import build_meta; build_meta.build_wheel('.')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("clone")
    for part in ("bcnn", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, folder)
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_every_file_of_package_and_configuration(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if not name.startswith("bcnn-")}
    files = [path for part in ("bcnn", "conf", "hydra_plugins") for path in (ROOT / part).rglob("*")]
    ours = {path for path in files if path.suffix in (".py", ".yaml", ".css", ".html")}
    names = {path.relative_to(ROOT).as_posix() for path in ours}
    assert packed == {f"bcnn/{name}" if name.startswith("conf/") else name for name in names}


def test_installed_it_finds_its_configuration_and_that_of_the_working_folder(
    wheel: zipfile.ZipFile, python: Run, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path / "site")
    own = tmp_path / "conf" / "experiment" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults:\n  - override /last: sgd\nseed: 77\n")
    options = ["train", "--cfg", "job", "experiment=mine", "output=here"]
    run = python("-m", "bcnn", *options, PYTHONPATH=str(tmp_path / "site"))
    assert run.returncode == 0, run.stderr
    assert "seed: 77" in run.stdout and "solver: sgd" in run.stdout


@pytest.mark.parametrize(
    ("line", "offered"),
    [("bcnn ", "evaluate"), ("bcnn train last=", "last=sgd"), ("bcnn train last.ep", "")],
)
def test_a_shell_completes_verbs_and_options(python: Run, line: str, offered: str) -> None:
    place = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(ROOT)}
    run = python("-m", "bcnn", "-sc", "query=bash", **place)
    assert run.returncode == 0, run.stderr
    assert offered in run.stdout.split() if offered else not run.stdout.strip()


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command `bcnn`, on the PATH."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "bcnn"
    script.touch(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        return main()

    return call


def test_help_names_every_verb(tool: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        assert tool(*words) == 0
        said = capsys.readouterr().out
        assert all(f"\n  {verb} " in said for verb in VERBS) and len(VERBS) == 9
    assert tool("predikt", "x.jpg") == 1
    assert "no verb predikt: choose from train," in capsys.readouterr().err


def test_a_folder_alone_is_told_how_it_is_written(
    tool: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert tool("train", str(tmp_path)) == 1
    assert f"write data=folder data.root={tmp_path}" in capsys.readouterr().err


def test_commands_are_named_as_they_were_called(
    tool: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tool("store", "--help") == 0
    assert capsys.readouterr().out.startswith("bcnn store  ")
    assert tool("store", "remove=x") == 1
    assert "no such store: x; bcnn store lists them" in capsys.readouterr().err
    assert program("train") == ["bcnn", "train"]
    monkeypatch.setenv("PATH", "/nowhere")  # as .venv/bin/bcnn
    assert program("predict") == [sys.argv[0], "predict"]
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
    assert program("train")[1:] == ["train.py"] and program("predict")[1:] == ["-m", "bcnn.cli.predict"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/bcnn/__main__.py", "train"])
    assert program("train")[1:] == ["-m", "bcnn", "train"]
    assert command(store.Options, store.main, store.USAGE, ["--help"]) == 0
    assert capsys.readouterr().out.startswith("python -m bcnn.training.feature_store  ")
