"""timm's networks as backbones."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor, nn

from bcnn.data.transforms import Preprocessing, Resize
from bcnn.models.backbones import Timm, make_backbone
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model, save_model
from bcnn.models.export import export_model
from bcnn.models.weights import initialise_backbone
from bcnn.training.module import BCNNModule
from bcnn.utils.errors import UserError

timm = pytest.importorskip("timm")

FAMILIES = {  # a name of each, and the stride of the last maps
    "resnet10t": 32,
    "convnext_atto": 32,
    "densenet121": 32,
    "vit_tiny_patch16_224": 16,
    "vit_small_patch14_reg4_dinov2": 14,
    "swin_tiny_patch4_window7_224": 32,
}


def bilinear(name: str, size: int = 64, resize: Resize = "keep") -> BCNN:
    torch.manual_seed(0)
    pooling = {"name": "compact", "width": 64}
    return BCNN(["a", "b"], Preprocessing(size, resize), {"name": "timm", "model": name}, pooling)


@pytest.mark.parametrize(("name", "stride"), FAMILIES.items())
def test_families_train_and_come_back(name: str, stride: int, tmp_path: Path) -> None:
    size = 4 * stride
    model = bilinear(name, size)
    assert (model.backbone.stride, model.backbone.size_divisor) == (stride, stride)
    nn.init.normal_(model.head.weight)
    module = BCNNModule(model, "finetune").train()
    before = {key: value.clone() for key, value in model.backbone.named_buffers()}
    images = torch.randint(256, (2, 3, size, size + stride), dtype=torch.uint8)
    assert model.backbone(images).shape == (2, model.backbone.channels, 4, 5)
    module(images)[:, 0].sum().backward()
    trained = [p.grad is not None for p in model.backbone.parameters()]
    assert sum(trained) > 0.9 * len(trained)
    torch.testing.assert_close(dict(model.backbone.named_buffers()), before)  # BatchNorm's statistics
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(images), model.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["densenet121", "vit_tiny_patch16_224"])
def test_files_with_timms_names_give_timms_maps(name: str, tmp_path: Path) -> None:
    theirs, model = timm.create_model(name, num_classes=7).eval(), bilinear(name, 224)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    initialise_backbone(model, str(tmp_path / "theirs.pth"))
    images = torch.rand(1, 3, 224, 224)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected: Tensor = theirs.forward_features((images - mean) / std)
        if name.startswith("vit"):
            expected = expected[:, 1:].mT.unflatten(2, (14, 14))
        torch.testing.assert_close(model.eval().backbone(images), expected, rtol=1e-4, atol=1e-4)


def test_the_level_before_is_twice_as_fine() -> None:
    maps = Timm("resnet10t", level=-2)(torch.rand(1, 3, 64, 64))
    assert maps.shape == (1, 256, 4, 4)


def test_a_network_on_an_earlier_layer_has_the_same_weights() -> None:
    whole, images = bilinear("resnet10t", 64), torch.rand(1, 3, 64, 64)
    earlier = whole.at_level(-2)
    expected = whole.backbone.network.forward_intermediates(
        (images - whole.backbone.mean) / whole.backbone.std, indices=[-2], intermediates_only=True
    )
    torch.testing.assert_close(earlier.backbone(images), expected[0])
    assert (earlier.preprocessing.divisor, whole.preprocessing.divisor) == (16, 32)
    assert earlier.chosen == {**whole.chosen, "backbone": {**whole.chosen["backbone"], "level": -2}}


def seen_by(backbone: Timm, location: int, side: int) -> float:
    """Where the pixels lie on average that a location depends on, if filters pass their middle only."""
    for layer in [*backbone.modules()]:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
            middle = layer.weight[..., layer.kernel_size[0] // 2, layer.kernel_size[1] // 2]
            nn.init.constant_(middle, 1 / layer.in_channels)
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()
    maps = backbone.forward_features(image)
    (gradient,) = torch.autograd.grad(maps[:, :, location, location].sum(), image)
    mass = gradient.abs().sum(dim=(0, 1, 2))
    return float((mass * (torch.arange(side) + 0.5)).sum() / mass.sum())


@pytest.mark.parametrize(
    ("name", "min_size", "offset"), [("inception_v3", 128, 37.5), ("resnet10t", 64, 16)]
)
def test_maps_lie_where_their_locations_look(
    name: str, min_size: int, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inception v3 begins without padding: its maps lack two locations a row."""

    def mean(x: Tensor, kernel_size: int, stride: int, padding: int = 0, *_: Any, **__: Any) -> Tensor:
        return F.avg_pool2d(x, kernel_size, stride, padding)

    backbone = Timm(name)
    assert (backbone.min_size, backbone.offset) == (min_size, offset)
    assert backbone(torch.rand(1, 3, min_size, min_size)).shape[2:] == (2, 2)
    with pytest.raises(ValueError, match=f"at least {min_size} px"):
        backbone(torch.rand(1, 3, min_size - 32, min_size - 32))
    monkeypatch.setattr(F, "max_pool2d", mean)
    side = 320
    location = backbone.locations(side) // 2
    assert seen_by(backbone, location, side) == pytest.approx(offset + 32 * location, abs=4)


def test_layers_are_blocks() -> None:
    assert Timm("vit_tiny_patch16_224").layers[2:5] == ("patch_embed", "blocks.0", "blocks.1")
    assert Timm("resnet10t").layers[-1] == "layer4.0"


def test_the_configuration_of_the_weights_is_used() -> None:
    model = bilinear("vit_tiny_patch16_224.augreg_in21k")
    initialise_backbone(model, "random")
    torch.testing.assert_close(model.backbone.std.flatten(), torch.full((3,), 0.5))
    assert Timm("dla46_c.in1k").interpolation == "bilinear"
    assert Timm("resnet10t.c3_in1k").interpolation == "bicubic"
    assert Timm("convnextv2_atto.fcmae").licence == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet5O", "timm has no network resnet5O"),
        ("resnet50.a9_in1k", "timm has no weights a9_in1k of resnet50: choose from a1_in1k"),
        ("hf-hub:stranger/resnet50", "timm has no network hf-hub:stranger"),
        ("local-dir:/tmp", "timm has no network local-dir"),
    ],
)
def test_unknown_names_are_refused(model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Timm(model)


def test_published_weights_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, model = "timm.models._builder.load_state_dict_from_hf", bilinear("resnet10t.c3_in1k")
    state = timm.create_model("resnet10t").state_dict()
    monkeypatch.setattr(hub, lambda *_, **__: dict(state))
    initialise_backbone(model, "pretrained")
    torch.testing.assert_close(model.backbone.network.conv1[0].weight, state["conv1.0.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "resize"), [("resnet10t", "keep"), ("tf_mobilenetv3_small_minimal_100", "whole")]
)
def test_an_onnx_file_agrees(name: str, resize: Resize, tmp_path: Path) -> None:
    """Also where TensorFlow's padding depends on sides that the file leaves open."""
    model = bilinear(name, resize=resize)
    nn.init.normal_(model.head.weight)
    difference, largest, _ = export_model(model.eval(), tmp_path / "model.onnx", softmax=True)
    assert difference < 1e-3 * largest


@pytest.mark.parametrize(("model", "can"), [("resnet18", True), ("vgg11", False)])
def test_a_network_knows_whether_it_can_checkpoint_gradients(model: str, can: bool) -> None:
    with torch.device("meta"):
        assert make_backbone("timm", model=model).supports_grad_checkpointing == can


def test_the_networks_that_the_docs_and_configurations_name_are_timms() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    table = page.partition("| images | `model.backbone.model=`")[2].partition("\n\n")[0]
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    stated = {name: row[-1].strip(" |") for row in rows for name in re.findall(r"`(\w+\.\w+)`", row[1])}
    names = {"Apache 2.0": "apache-2.0", "DINOv3's own": "dinov3-license"}
    assert len(stated) > 8
    for name, licence in stated.items():
        assert timm.get_pretrained_cfg(name).license == names[licence]
    for file in (ROOT / "conf").rglob("*.yaml"):
        for name in re.findall(r" model: (\w+\.\w+)", file.read_text()):
            assert timm.list_pretrained(name) == [name], file
