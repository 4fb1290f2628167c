"""The benchmarks run at toy size, beside a network that is the original's."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, Run
from torchvision.models import VGG16_Weights

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.third_party import to_original


def test_the_original_network_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from harness import OriginalNet

    torch.manual_seed(0)
    model = BCNN(["a", "b"]).double()
    preset = VGG16_Weights.IMAGENET1K_V1.transforms()  # the original's
    model.backbone.set_normalization(preset.mean, preset.std)
    torch.nn.init.normal_(model.head.weight)
    original = OriginalNet(2).double()
    original.load_state_dict(to_original(model))
    images = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    normalised = (images - model.backbone.mean) / model.backbone.std
    torch.testing.assert_close(original(normalised), model(images), rtol=1e-10, atol=1e-12)


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
        options += ["model.weights=random", "data.num_workers=0", "data.val_fraction=0.34"]
    run = python(str(ROOT / "benchmarks" / f"{script}.py"), *options, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    rows = [line.split("│")[1].strip() for line in run.stdout.splitlines() if line.startswith("│")]
    assert len(rows) >= len(contenders)
    assert all(row.startswith(name) for row, name in zip(rows, contenders, strict=False))
