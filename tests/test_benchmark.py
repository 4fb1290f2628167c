"""The benchmarks run at toy size."""

import os
import runpy
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from bcnn.utils.files import cache_folder

SCRIPTS = ROOT / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "contenders"),
    [
        ("last", ["the original", "last=sgd", "last=convex"]),
        ("finetune", ["the original", "bcnn", "with grad_checkpointing", "with sqrt, project=8"]),
        ("predict", ["a plain loop", "bcnn predict"]),
        ("data", ["torchvision", "bcnn", "bcnn, data.cache=true"]),
        ("solver", ["to prepare", "0.0001", "1e-05"]),
        ("shards", ["files, at random", "members, at random", "and an index", "members, in order"]),
    ],
)
def test_each_contender_has_a_row(
    script: str,
    contenders: list[str],
    images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process, since starting one takes seconds."""
    options = ["--device", "cpu", "--size", "32", "--images", "4"]
    options += {
        "last": ["--batch=2", "--epochs=2", "--", "data=folder", f"data.root={images}"],
        "finetune": ["--batch=2", "--pooling=sqrt", "--project=8"],
        "predict": [f"--root={images}"],
        "data": [f"--root={images / 'train'}"],
        "shards": ["--members=8"],
        "solver": [],
    }[script]
    if script == "solver":  # has no images
        options = ["--descriptors=40", "--width=10", "--classes=3"]
    if script == "last":
        options += ["model/pooling=bilinear", "model.weights=random"]
        options += ["data.num_workers=0", "data.val_fraction=0.34"]
    measure = lambda name, contender, options: {**contender(options), "peak": 1}  # noqa: E731
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(import_module("harness"), "measure", measure)
    monkeypatch.setattr("sys.argv", [script, *options])
    runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")]
    assert len(rows) >= len(contenders)
    assert all(row.startswith(name) for row, name in zip(rows, contenders, strict=False))


def own_process(options: Namespace) -> dict[str, float]:
    """A contender: it finds an empty cache."""
    assert not [*cache_folder("stores").iterdir()]
    return {"seconds": 0.5, "process": os.getpid()}


def test_a_contender_has_a_process_and_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    (cache_folder("stores") / "mine").touch()
    options = Namespace(device=torch.device("cpu"))
    found = import_module("harness").measure("a contender", own_process, options)
    assert found["seconds"] == 0.5 and found["peak"] >= 0 and found["process"] != os.getpid()
