"""The examples of docs/extend.md, executed."""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, Run, configure, toy

from bcnn.models.backbones import BACKBONES
from bcnn.models.checkpoint import load_model
from bcnn.models.pooling import POOLINGS
from bcnn.training.run import train
from bcnn.utils.errors import UserError

EXAMPLES = dict(
    re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.DOTALL)
)


@pytest.fixture(autouse=True)
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The examples as files that can be imported, and the dictionaries as before afterwards."""
    folder = tmp_path / "examples"
    folder.mkdir()
    for name, text in EXAMPLES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    with patch.dict(BACKBONES), patch.dict(POOLINGS):
        yield


def test_every_example_is_under_forty_lines() -> None:
    names = ("bcnn", "backbone", "pooling", "data", "callback")
    assert [*EXAMPLES] == [f"my_{name}.py" for name in names]
    assert all(len(text.splitlines()) < 40 for text in EXAMPLES.values())


@pytest.mark.slow
def test_a_backbone_and_a_pooling_train_and_come_back(
    images: Path, tmp_path: Path, python: Run
) -> None:
    new = ["model.backbone.name=resnet18", "model.pooling.name=diagonal", "data.size=64"]
    short = ["finetune.epochs=1", "finetune.batch_size=6", "finetune.unfreeze_from=layer4"]
    words = toy(images, *new, *short, f"output={tmp_path / 'out'}")
    finished = python(str(tmp_path / "examples" / "my_bcnn.py"), "train", *words)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "out" / "report.html").is_file()  # with the evidence of its mistakes
    best = tmp_path / "out" / "finetune" / "best.ckpt"
    with pytest.raises(UserError, match="there is no backbone resnet18: choose from vgg16, timm"):
        load_model(best)
    import_module("my_backbone")
    import_module("my_pooling")
    model = load_model(best)
    assert model.chosen["backbone"] == {"name": "resnet18"} and model.head.weight.shape == (3, 512)
    assert model(torch.rand(1, 3, 64, 96)).isfinite().all()


def test_a_data_set(images: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (images / "train").glob("*/*.png"):
        path.rename(flat / f"{path.parent.name}-{path.name}")
    data = import_module("my_data").Parts(flat, size=32, num_workers=0)
    data.setup()
    assert data.classes == ["blue", "green", "red"]
    assert len(data.train) + len(data.val) + len(data.test) == 18


def test_a_callback(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = ["stage=last", "last=sgd", "+callbacks.mine._target_=my_callback.Announce"]
    train(configure(*toy(images, *mine, f"output={tmp_path / 'out'}")))
    assert "last: all validation images are right" in capsys.readouterr().out
