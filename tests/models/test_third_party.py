"""State dicts of the two-script original and of HaoMood's bilinear-cnn."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bcnn.data.transforms import Preprocessing
from bcnn.models.backbones.vgg16 import normalization_of
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model, save_model
from bcnn.models.third_party import to_original
from bcnn.utils.errors import UserError

IMAGES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> BCNN:
    torch.manual_seed(0)
    model = BCNN(["x", "y"], Preprocessing(64, "squash"))
    model.backbone.set_normalization(*normalization_of("imagenet"))
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    model.head.center_on(torch.rand(131_328) / 300)
    return model.eval()


@pytest.mark.parametrize("name", ["bcnn_alllayer.pth", "model.safetensors"])
def test_the_originals_layout_has_the_same_logits(model: BCNN, tmp_path: Path, name: str) -> None:
    state = {key: value.contiguous() for key, value in to_original(model).items()}
    assert state["classifiers.0.weight"].shape == (2, 512**2)
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    loaded = load_model(tmp_path / name)
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
    assert loaded.classes == ["0", "1"] and "448 px" in loaded.assumed
    assert load_model(tmp_path / name, ["x", "y"]).classes == ["x", "y"]
    with pytest.raises(UserError, match="2 classes, the images have 3"):
        load_model(tmp_path / name, ["a", "b", "c"])


def test_a_classifier_that_is_not_symmetric_keeps_its_logits(model: BCNN, tmp_path: Path) -> None:
    matrix = torch.randn(2, 512, 512)
    state = to_original(model) | {"classifiers.0.weight": matrix.flatten(1)}
    torch.save(state, tmp_path / "bcnn_lastlayer.pth")
    symmetric = to_original(load_model(tmp_path / "bcnn_lastlayer.pth"))["classifiers.0.weight"]
    torch.testing.assert_close(symmetric.view(2, 512, 512), (matrix + matrix.mT) / 2)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_checkpoints_of_haomoods_bilinear_cnn(model: BCNN, tmp_path: Path, wrapper: str | None) -> None:
    state = to_original(model)
    for kind in ("weight", "bias"):
        state[f"fc.{kind}"] = state.pop(f"classifiers.0.{kind}")
    state = {f"module.{key}": value for key, value in state.items()}  # trained on several GPUs
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "vgg_16_epoch_24.pth")
    loaded = load_model(tmp_path / "vgg_16_epoch_24.pth")
    with torch.no_grad():  # its forward pass adds 1e-5 under the root
        maps = model.backbone(IMAGES).flatten(2)
        matrix = (maps @ maps.mT / maps.shape[2]).flatten(1)
        descriptors = nn.functional.normalize((matrix + 1e-5).sqrt())
        expected = descriptors @ state["module.fc.weight"].mT + state["module.fc.bias"]
        torch.testing.assert_close(loaded(IMAGES), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(IMAGES), expected, rtol=1e-2, atol=1e-2)
    save_model(loaded, tmp_path / "own.safetensors")
    assert load_model(tmp_path / "own.safetensors").chosen["pooling"]["root"] == "plain"


def test_other_classifiers_are_refused(model: BCNN, tmp_path: Path) -> None:
    for weight in (torch.zeros(2, 4096), torch.ones(2, 512**2, dtype=torch.int8)):
        torch.save({**to_original(model), "classifiers.0.weight": weight}, tmp_path / "odd.pth")
        with pytest.raises(UserError, match=r"odd\.pth: .* is not of floating point on 262144 inputs"):
            load_model(tmp_path / "odd.pth")
