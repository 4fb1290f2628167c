"""Toy image folders, networks, trainers; the program as a command, and in this process."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from PIL import Image
from torch import nn

import bcnn.training.schema  # the types of the options
from bcnn.cli.app import main
from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.transforms import Preprocessing
from bcnn.models.backbones import BACKBONES
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.feature_data import CachedFeatureDataModule

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}

# `make torture` draws more of the same; neither leaves files behind, nor depends on the day.
settings.register_profile(
    "default",
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[*HealthCheck],
)
settings.register_profile(
    "torture", settings.get_profile("default"), max_examples=20_000, derandomize=False, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# A backbone of a few hundred weights, for whatever writes or reads many files of them.
TINY = """
from torch import nn
from bcnn.models.backbones import Backbone

class Tiny(Backbone):
    stride, min_size, layers = 4, 8, ("features",)

    def __init__(self, channels=4):
        super().__init__()
        self.channels = channels
        self.features = nn.Conv2d(3, channels, 4, stride=4)

    def forward_features(self, x):
        return self.features(x).relu()

    def unfreeze_from(self, name):
        self.requires_grad_(True)
"""
FEW = settings(max_examples=settings.default.max_examples // 5)  # of what is dear, or of many kinds


@st.composite
def mutated(draw: st.DrawFn, contents: Sequence[bytes]) -> bytes:
    """One of the contents cut, with bytes altered at its beginning or anywhere, or spliced."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, min(len(content), draw(st.sampled_from((64, 1 << 20))))))
        kind = draw(st.sampled_from(("cut", "alter", "alter", "alter", "zero", "splice", "repeat")))
        if kind == "cut":
            del content[start:]
        elif kind == "alter":
            altered = st.binary(min_size=1, max_size=4)
            extreme = st.sampled_from((b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
            new = draw(st.one_of(altered, extreme))
            content[start : start + len(new)] = new
        elif kind == "zero":
            content[start:] = bytes(len(content) - start)
        elif kind == "splice":
            other = draw(st.sampled_from(contents))
            content[start:] = other[draw(st.integers(0, len(other))) :]
        else:
            content[start:start] = content[start : start + draw(st.integers(1, 4096))]
    return bytes(content)


@contextmanager
def bounded(seconds: float = 20, megabytes: int = 3000) -> Iterator[None]:
    """Takes no longer (on a machine with other work), and no more memory than the process had."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, dealt to two processes: else one waits at the end for the other's last."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    items[:] = items[::2] + items[1::2]


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def stores(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test has a folder of descriptor stores to itself; checks are kept apart by their paths."""
    folder = tmp_path_factory.mktemp("stores")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("BCNN_STORES", str(folder))
    monkeypatch.setattr("bcnn.cli.errors.raise_interruptions", lambda: None)  # Ctrl-C is pytest's
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def write_images(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (48, 40)) -> None:
    """`count` noisy images of each colour under `folder/<colour>/`."""
    for label, (name, colour) in enumerate(COLOURS.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise = np.random.default_rng([seed, label, index]).normal(0, 40, (*size[::-1], 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def write(path: Path, seed: int = 0) -> None:
    """One image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_classes(root: Path, **counts: int) -> None:
    """Class folders of so many images of noise each, no two alike."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
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
    return [
        "data=folder",
        f"data.root={images}",
        "data.size=32",
        "data.num_workers=0",
        "data.val_fraction=0.34",
        "model.weights=random",
        "trainer=cpu",
        "trainer.precision=32-true",
        *overrides,
    ]


def set_up(root: Path | None = None, **options: object) -> FineGrainedDataModule:
    """The data of a folder, ready."""
    data = FineGrainedDataModule(root, **{"size": 32, "num_workers": 0, **options})  # type: ignore[arg-type]
    data.setup()
    return data


def folder_data(root: Path, **options: object) -> FineGrainedDataModule:
    """The data of `images`, a third of it for validation."""
    return set_up(root, **{"val_fraction": 0.34, **options})


def network(seed: int = 0) -> BCNN:
    """Of random weights, for `images`."""
    torch.manual_seed(seed)
    return BCNN(["blue", "green", "red"], Preprocessing(32))


Damage = Callable[[bytes], bytes]


@st.composite
def damage(draw: st.DrawFn) -> Damage:
    """What disks and strangers do to a file: bytes changed, cut out, put in, repeated, cut off."""
    kinds = st.sampled_from(["change", "cut", "insert", "repeat", "end"])
    steps = draw(st.lists(st.tuples(kinds, st.floats(0, 1), st.binary(min_size=1)), min_size=1))

    def apply(content: bytes) -> bytes:
        for kind, place, new in steps:
            at = int(place * len(content))
            before, after = content[:at], content[at:]
            content = {
                "change": before + new + after[len(new) :],
                "cut": before + after[len(new) :],
                "insert": before + new + after,
                "repeat": before + after[: len(new)] + after,
                "end": before,
            }[kind]
        return content

    return apply


def junk() -> st.SearchStrategy:
    """Values that a JSON file or a pickle of numbers and texts may hold."""
    numbers = st.sampled_from([0, -1, 1, 4, 32, 3.0, 10**9, 2**63, 10**40, 1e-9, 1e300])
    texts = st.sampled_from(["", "keep", "squash", "vgg16", "tiny", "bilinear", "plain", "../x", "0"])
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | numbers | texts
    keys = st.text() | st.sampled_from(["name", "size", "channels", "root", "train", "recipe"])
    return st.recursive(plain, lambda v: st.lists(v) | st.dictionaries(keys, v), max_leaves=8)


def register_tiny() -> None:
    """Add the backbone `TINY` to the backbones, in a process of a test's own."""
    namespace: dict[str, Any] = {}
    exec(TINY, namespace)
    BACKBONES["tiny"] = namespace["Tiny"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> BCNN:
    """Of `TINY`, which is among the backbones, in evaluation mode and of random weights."""
    monkeypatch.setitem(BACKBONES, "tiny", None)  # taken out after the test
    register_tiny()
    torch.manual_seed(0)
    model = BCNN(["blue", "green", "red"], Preprocessing(32), {"name": "tiny"})
    nn.init.normal_(model.head.weight)
    return model.eval()


class Outcome(NamedTuple):
    """What a command of this process ended with."""

    code: int
    out: str
    err: str


Bcnn = Callable[..., Outcome]


@pytest.fixture
def bcnn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bcnn:
    """Run `bcnn *words` in this process, on a terminal of 200 columns."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def quiet_trainer(**options: object) -> L.Trainer:
    """A trainer that writes and prints nothing."""
    defaults: dict[str, object] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**defaults, **options})  # type: ignore[arg-type]


def build(data: CachedFeatureDataModule) -> CachedFeatureDataModule:
    """The data with its descriptors computed."""
    data.trainer = quiet_trainer()
    data.setup()
    return data


def make_near_sighted(model: BCNN) -> None:
    """Leave the middle of every kernel alone: a location of relu5_3 sees its own 16 px, no others."""
    for layer in model.backbone.features:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.mul_(F.pad(torch.full((1, 1, 1, 1), 3.0), (1, 1, 1, 1)))


FINETUNE = ["finetune.epochs=1", "finetune.batch_size=6"]  # one epoch, for `images`


def configure(*overrides: str) -> DictConfig:
    """The configuration that `python train.py *overrides` would run."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Run `python *arguments` in an empty folder, as a user would; no GPU, no account, no colours."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        quiet = {"WANDB_MODE": "offline", "WANDB_DATA_DIR": str(tmp_path), "COLUMNS": "200"}
        variables = {**os.environ, **quiet, **environment}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def train(python: Run) -> Run:
    """Run `python train.py *overrides`."""

    def run(*overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return python(str(ROOT / "train.py"), *overrides, **environment)

    return run


def watched(browser: Any) -> tuple[Any, list[str], list[str]]:
    """A tab of a desktop's size, what it complains of, and the addresses that it asks for."""
    tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    said: list[str] = []
    fetched: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.on("request", lambda request: fetched.append(request.url))
    return tab, said, fetched
