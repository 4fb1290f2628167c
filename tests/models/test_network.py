"""The network in three parts is the network that it was: outputs stored when it was one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcnn.data.transforms import Preprocessing
from bcnn.models.attribution import evidence
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import RENAMED, load_model, save_model

STORED = json.loads(Path(__file__).with_name("golden.json").read_text())
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture
def model() -> BCNN:
    """As when the outputs were stored: the seed draws the same weights."""
    torch.manual_seed(0)
    model = BCNN(["x", "y", "z"], Preprocessing(64))
    model.backbone.set_normalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    model.head.center_on(torch.rand(131328) / 300)
    model.head.batch_mean = True
    return model


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 64, 80), dtype=torch.uint8, generator=generator)


def close(found: Tensor, stored: list[Any], rtol: float = 1e-4) -> None:
    expected = torch.tensor(stored)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_logits_rows_and_evidence(model: BCNN, images: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        close(model(images), STORED["logits"])
        close(model.descriptor(images)[:, ::20001], STORED["descriptor"])
    close(evidence(model, images, LABELS, LABELS.flip(0)).flatten(1), STORED["evidence"])


def test_gradients(model: BCNN, images: Tensor) -> None:
    F.cross_entropy(model.train()(images), LABELS).backward()
    parts = dict(model.named_parameters())
    for name, (_, norm) in STORED["gradients"].items():
        gradient = parts[today(name)].grad
        assert gradient is not None
        assert float(gradient.double().norm()) == pytest.approx(norm, rel=1e-4)


def today(name: str) -> str:
    """A tensor's name in files of before as it is now."""
    old, new = next((old, new) for old, new in RENAMED.items() if name.startswith(old))
    return new + name.removeprefix(old)


@pytest.mark.parametrize("kind", ["ckpt", "pth", "safetensors"])
def test_files_of_before_go_on_loading(model: BCNN, images: Tensor, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import save_file

    before = {new: old for old, new in RENAMED.items()}
    state = {
        next(old + key.removeprefix(new) for new, old in before.items() if key.startswith(new)): value
        for key, value in model.state_dict().items()
    }
    about = {"classes": ["x", "y", "z"], "size": 64, "resize": "squash", "crop_pct": 0.875}
    path = tmp_path / f"old.{kind}"
    if kind == "ckpt":
        lightning = {f"model.{key}": value for key, value in state.items()} | {
            "loss.weight": torch.ones(3)
        }
        torch.save({"state_dict": lightning, "hyper_parameters": {**about, "stage": "last"}}, path)
    elif kind == "pth":
        torch.save(state, path)
    else:
        strings = {key: str(value) for key, value in about.items()} | {"classes": '["x", "y", "z"]'}
        save_file({key: value.contiguous() for key, value in state.items()}, path, strings)
    loaded = load_model(path, ["x", "y", "z"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model.eval()(images))
    if kind != "pth":
        assert loaded.preprocessing == Preprocessing(64, "squash", 0.875)
    save_model(loaded, tmp_path / "new.safetensors")
    again = load_model(tmp_path / "new.safetensors")
    assert again.description() == loaded.description()
    with torch.no_grad():
        assert torch.equal(again(images), loaded(images))
