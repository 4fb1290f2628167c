"""The benchmarks run at toy size."""

from pathlib import Path

import pytest
from conftest import ROOT, Run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "contenders"),
    [
        ("last", ["the original", "last=sgd", "last=convex"]),
        ("finetune", ["the original", "bcnn", "with grad_checkpointing", "with sqrt, project=8"]),
        ("predict", ["a plain loop", "bcnn predict"]),
        ("data", ["torchvision", "bcnn", "bcnn, data.cache=true"]),
    ],
)
def test_each_contender_has_a_row(
    script: str, contenders: list[str], images: Path, python: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--device", "cpu", "--size", "32", "--images", "4"]
    options += {
        "last": ["--batch=2", "--epochs=2", "--rows", "40", "--", "data=folder", f"data.root={images}"],
        "finetune": ["--batch=2", "--pooling=sqrt", "--project=8"],
        "predict": [f"--root={images}"],
        "data": [f"--root={images / 'train'}"],
    }[script]
    if script == "last":
        options += ["model/pooling=bilinear", "model.weights=random"]
        options += ["data.num_workers=0", "data.val_fraction=0.34"]
    run = python(str(ROOT / "benchmarks" / f"{script}.py"), *options, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    rows = [line.split("│")[1].strip() for line in run.stdout.splitlines() if line.startswith("│")]
    assert len(rows) >= len(contenders)
    assert all(row.startswith(name) for row, name in zip(rows, contenders, strict=False))
