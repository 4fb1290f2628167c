"""docs/extend.md, executed: each example is put where it says, and used as it says."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, configure, toy

from bcnn import data as data_package
from bcnn.models import backbones, pooling
from bcnn.models.checkpoint import load_model
from bcnn.training.run import run

EXAMPLES = dict(
    re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.DOTALL)
)
PACKAGES = {
    "bcnn/models/backbones": backbones,
    "bcnn/models/pooling": pooling,
    "bcnn/data": data_package,
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The examples in folders that the packages look into, too."""
    before = set(sys.modules)
    for name, text in EXAMPLES.items():
        file = tmp_path / "examples" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for folder, package in PACKAGES.items():
        places = [*package.__path__, str(tmp_path / "examples" / folder)]
        monkeypatch.setattr(package, "__path__", places)
    monkeypatch.syspath_prepend(str(tmp_path / "examples"))
    yield
    for name in set(sys.modules) - before:
        if name.rpartition(".")[2] in ("resnet18", "average", "parts", "my_module"):
            del sys.modules[name]


def test_every_example_is_under_forty_lines() -> None:
    assert len(EXAMPLES) == 4
    assert all(len(text.splitlines()) < 40 for text in EXAMPLES.values())


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_a_backbone_and_a_pooling_train_and_come_back(images: Path, tmp_path: Path) -> None:
    new = ["model.backbone.name=resnet18", "model.pooling.name=average", "data.size=64"]
    short = ["finetune.epochs=1", "finetune.batch_size=6", "finetune.unfreeze_from=layer4"]
    run(configure(*toy(images, *new, *short, f"output={tmp_path / 'out'}")))
    model = load_model(tmp_path / "out" / "finetune" / "best.ckpt")
    assert model.chosen == {"backbone": {"name": "resnet18"}, "pooling": {"name": "average"}}
    assert model.head.weight.shape == (3, 512)
    assert (tmp_path / "out" / "report.html").is_file()  # with the evidence of its mistakes
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 96)).isfinite().all()


@pytest.mark.usefixtures("installed")
def test_a_data_set(images: Path, tmp_path: Path) -> None:
    from bcnn.data.parts import Parts  # type: ignore[import-not-found]

    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (images / "train").glob("*/*.png"):
        path.rename(flat / f"{path.parent.name}-{path.name}")
    data = Parts(flat, size=32, num_workers=0)
    data.setup()
    assert data.classes == ["blue", "green", "red"]
    assert len(data.train) + len(data.val) + len(data.test) == 18


@pytest.mark.usefixtures("installed")
def test_a_callback(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = ["stage=last", "+callbacks.mine._target_=my_module.Announce"]
    run(configure(*toy(images, *mine, f"output={tmp_path / 'out'}")))
    assert "last: all validation images are right" in capsys.readouterr().out
