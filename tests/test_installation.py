"""What is installed: the package, its configuration and its templates, and the command."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Run

BUILD = "from setuptools import build_meta; build_meta.build_wheel('.')"
PARTS = ("bcnn", "conf", "hydra_plugins")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("clone")
    for part in (*PARTS, "benchmarks"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, folder)
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture
def site(wheel: zipfile.ZipFile, tmp_path: Path) -> str:
    """A folder that the wheel is installed into."""
    wheel.extractall(tmp_path / "site")
    return str(tmp_path / "site")


def test_the_wheel_holds_package_configuration_and_templates_alone(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if not name.startswith("bcnn-")}
    files = [path for part in PARTS for path in (ROOT / part).rglob("*")]
    suffixes = (".py", ".yaml", ".css", ".html", ".md", ".mplstyle", ".typed")
    ours = {path for path in files if path.suffix in suffixes}
    names = {path.relative_to(ROOT).as_posix() for path in ours}
    assert packed == {f"bcnn/{name}" if name.startswith("conf/") else name for name in names}


def test_the_package_shows_what_is_public_and_imports_it_when_asked(python: Run) -> None:
    names = ["BCNN", "BCNNModule", "FineGrainedDataModule", "load_model", "predict_paths"]
    code = (
        "import bcnn, sys; print(*dir(bcnn)); print('torch' in sys.modules); print(bcnn.__version__);"
        f"print(*(getattr(bcnn, name).__name__ for name in {names}))"
    )
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    shown, early, version, found = run.stdout.splitlines()
    assert shown.split() == sorted(["__version__", *names]) and found.split() == names
    assert early == "False" and version[0].isdigit()


def test_the_command_starts(site: str, python: Run) -> None:
    run = python("-m", "bcnn", "--help", PYTHONPATH=site)
    assert run.returncode == 0, run.stderr
    assert "train" in run.stdout and "predict" in run.stdout


def test_it_finds_its_configuration_and_that_of_the_working_folder(
    site: str, python: Run, tmp_path: Path
) -> None:
    own = tmp_path / "conf" / "experiment" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults:\n  - override /last: sgd\nseed: 77\n")
    options = ["train", "--cfg", "job", "experiment=mine", "output=here"]
    run = python("-m", "bcnn", *options, PYTHONPATH=site)
    assert run.returncode == 0, run.stderr
    assert "seed: 77" in run.stdout and "solver: sgd" in run.stdout
