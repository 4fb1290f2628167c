"""Toy image folders, networks, trainers; the program as a command, and in this process."""

import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, settings
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bcnn.training.schema  # the types of the options
from bcnn.cli.app import main
from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.transforms import Preprocessing
from bcnn.models.backbones import BACKBONES, Backbone
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.calibration import Calibration, Subspace
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.utils.console import logger

ROOT = Path(__file__).parents[1]
# Children of a process that has imported all this once: importing takes seconds.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["bcnn.training.run", "torch._dynamo", "conftest"])
Run = Callable[..., subprocess.CompletedProcess[str]]
COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}

# `make torture` draws more of the same; neither leaves files behind, nor depends on the day.
ANY = settings(deadline=None, database=None, suppress_health_check=[*HealthCheck])
settings.register_profile("default", ANY, max_examples=60, derandomize=True)
settings.register_profile("torture", ANY, max_examples=20_000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


class Tiny(Backbone):
    """A few hundred weights, for whatever writes or reads many files of them."""

    stride, min_size, layers = 4, 8, ("features",)

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.channels = channels
        self.features = nn.Conv2d(3, channels, 4, stride=4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x).relu()

    def unfreeze_from(self, name: str) -> None:
        self.requires_grad_(True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, dealt to two processes: else one waits at the end for the other's last."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    items[:] = items[::2] + items[1::2]


@pytest.fixture(autouse=True)
def stores(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of descriptor stores for each test; checks are kept apart by their paths."""
    folder = tmp_path_factory.mktemp("stores")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("BCNN_STORES", str(folder))
    monkeypatch.setattr("bcnn.cli.errors.raise_interruptions", lambda: None)  # Ctrl-C is pytest's
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _blank_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures blank but where a test looks at them: drawing takes half of a tiny run."""
    if not request.node.get_closest_marker("figures"):
        monkeypatch.setattr("matplotlib.figure.Figure.draw", lambda *_: None)


def write_images(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (48, 40)) -> None:
    """`count` noisy images of each colour under `folder/<colour>/`."""
    for label, (name, colour) in enumerate(COLOURS.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise = np.random.default_rng([seed, label, index]).normal(0, 40, (*size[::-1], 3))
            pixels = (noise + colour).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def write(path: Path, seed: int = 0) -> None:
    """One image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_classes(root: Path, **counts: int) -> None:
    """Class folders of so many images of noise each, no two alike."""
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            write(root / name / f"{index}.png", seed=1000 * label + index)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image folder of three easy classes: 6 training and 2 test images each."""
    write_images(tmp_path / "images" / "train", 6, seed=0)
    write_images(tmp_path / "images" / "test", 2, seed=1)
    return tmp_path / "images"


def toy(images: Path, *overrides: str) -> list[str]:
    """Overrides for runs of seconds: 32 px, random weights, float32 on the CPU."""
    data = [f"data.root={images}", "data.size=32", "data.num_workers=0", "data.val_fraction=0.34"]
    trainer = ["trainer=cpu", "trainer.precision=32-true"]
    chosen = any(each.startswith("model/pooling=") for each in overrides)
    pooling = [] if chosen else ["model/pooling=bilinear"]
    return ["data=folder", *data, *pooling, "model.weights=random", *trainer, *overrides]


def nest(images: Path) -> Path:
    """Move red of `images` into warm/, and the others into all/cold/."""
    for split in images.iterdir():
        for name, parent in (("red", "warm"), ("green", "all/cold"), ("blue", "all/cold")):
            (split / parent).mkdir(parents=True, exist_ok=True)
            (split / name).rename(split / parent / name)
    return images


def set_up(root: Path | None = None, **options: Any) -> FineGrainedDataModule:
    """The data of a folder, ready."""
    data = FineGrainedDataModule(root, **{"size": 32, "num_workers": 0, **options})
    data.setup()
    return data


def folder_data(root: Path, **options: Any) -> FineGrainedDataModule:
    """The data of `images`, a third of it for validation."""
    return set_up(root, **{"val_fraction": 0.34, **options})


def network(seed: int = 0) -> BCNN:
    """Of random weights, for `images`."""
    torch.manual_seed(seed)
    return BCNN(["blue", "green", "red"], Preprocessing(32))


def register_tiny() -> None:
    """Add `Tiny` to the backbones, in a process of a test's own."""
    BACKBONES["tiny"] = Tiny


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> BCNN:
    """Of `Tiny`, which is among the backbones, in evaluation mode and of random weights."""
    monkeypatch.setitem(BACKBONES, "tiny", Tiny)
    torch.manual_seed(0)
    model = BCNN(["blue", "green", "red"], Preprocessing(32), {"name": "tiny"})
    nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that passed the backbone, a batch each."""
    found: list[int] = []
    original = BCNN.maps

    def counted(self: BCNN, images: Tensor) -> list[Tensor]:
        found.append(len(images))
        return original(self, images)

    monkeypatch.setattr(BCNN, "maps", counted)
    return found


@pytest.fixture
def calibrated(tiny: BCNN) -> BCNN:
    """`tiny`, calibrated by 40 images of noise: every image of one colour is unlike them."""
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(tiny.backbone.features.weight, generator=generator)
    images = torch.randint(256, (80, 3, 32, 32), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        x = tiny.descriptor(images)
        space, logits = Subspace.of(x[:40]), tiny.head(x[40:])
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        tiny.calibration = Calibration.of(logits, labels, space.residual(x[40:]), space)
    return tiny


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Bcnn = Callable[..., Outcome]


@pytest.fixture
def bcnn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bcnn:
    """Run `bcnn *words` in this process, in float32, on a terminal of 200 columns."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("bcnn.utils.device.fastest_precision", lambda *_: "32-true")

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def browser() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """The records of the program's logger."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger.name)
    return caplog


def save_checkpoint(
    model: BCNN, path: Path, about: dict[str, Any] | None = None, **tensors: Tensor
) -> Path:
    """Write a model as Lightning does, or `.safetensors`; with another description or other tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {**model.state_dict(), **tensors}
    about = model.description() if about is None else about
    if path.suffix == ".safetensors":
        copies = {key: value.contiguous().clone() for key, value in state.items()}
        save_file(copies, path, {"bcnn": json.dumps(about)})
    else:
        state = {f"model.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(3)}
        torch.save({"state_dict": state, "hyper_parameters": {**about, "stage": "last"}}, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def quiet_trainer(**options: Any) -> L.Trainer:
    """A trainer that writes and prints nothing."""
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet = {"accelerator": "cpu", "num_sanity_val_steps": 0, **dict.fromkeys(shown, False)}
    return L.Trainer(**{**quiet, **options})


def build(data: CachedFeatureDataModule) -> CachedFeatureDataModule:
    """The data with its descriptors computed."""
    data.trainer = quiet_trainer()
    data.setup()
    return data


def batches() -> DataLoader:
    """Two batches of noise of three classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return DataLoader(TensorDataset(pixels, torch.arange(8) % 3), batch_size=4)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors in a checkpoint of Lightning's."""
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
        return list(csv.DictReader(lines))


def run(images: Path, output: Path, *overrides: str) -> float:
    """Train in this process, at toy size, into a new folder; return validation top-1."""
    from bcnn.training.run import train  # takes a second

    return train(configure(*toy(images, *overrides, f"output={output}")))


SMALL = "model.backbone.name=tiny"
FINETUNE = ["finetune.epochs=1", "finetune.batch_size=6"]  # one epoch, for `images`


def configure(*overrides: str) -> DictConfig:
    """The configuration that `python train.py *overrides` would run."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Run `python *arguments` in an empty folder, as a user would; no account, no colours."""
    quiet = {"WANDB_MODE": "offline", "WANDB_DATA_DIR": str(tmp_path), "COLUMNS": "200"}

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {
            "capture_output": True,
            "text": True,
            "timeout": 300,
            "cwd": tmp_path,
        }
        command = [sys.executable, *arguments]
        return subprocess.run(command, env={**os.environ, **quiet, **variables}, **options)

    return run


@pytest.fixture
def train(tmp_path: Path) -> Run:
    """Run `bcnn train *overrides` in an empty folder, in a child of `fork`."""

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        files = tmp_path / "stdout", tmp_path / "stderr"
        process = fork.Process(target=_train, args=(words, {**os.environ, **variables}, files))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"bcnn train {words} did not end within 300 s")
        out, err = (file.read_text() for file in files)
        return subprocess.CompletedProcess(words, process.exitcode, out, err)

    return run


def _train(words: list[str], variables: dict[str, str], files: tuple[Path, Path]) -> None:
    """Run `bcnn train`, with its output in files, and exit as the command does."""
    os.environ.update(variables)
    os.chdir(files[0].parent)
    write_output(*files)
    sys.exit(main(["train", *words]))


def write_output(stdout: Path, stderr: Path) -> None:
    """Write what this process prints to files."""
    for number, file in enumerate((stdout, stderr), 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)


def watched(browser: Any) -> tuple[Any, list[str], list[str]]:
    """A tab of a desktop's size, what it complains of, and the addresses that it asks for."""
    tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    said, fetched = [], []
    for event in ("console", "pageerror", "dialog"):
        tab.on(event, lambda each: said.append(str(each)))
    tab.on("request", lambda request: fetched.append(request.url))
    return tab, said, fetched
