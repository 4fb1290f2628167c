"""timm's networks as backbones."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import configure, toy
from torch import Tensor, nn

from bcnn.data.transforms import Preprocessing
from bcnn.models.backbones.timm import Timm
from bcnn.models.bilinear_cnn import BCNN, make_backbone
from bcnn.models.checkpoint import initialise_backbone, load_model, save_model
from bcnn.models.export import read_onnx, write_onnx
from bcnn.training.module import BCNNModule
from bcnn.training.run import run
from bcnn.utils.errors import UserError

POOLING = {"name": "compact", "width": 64}
timm = pytest.importorskip("timm")

# A dozen families: their name, and the stride of their last maps.
FAMILIES = {
    "resnet10t": 32,
    "tf_efficientnet_lite0": 32,
    "mobilenetv3_small_050": 32,
    "convnext_atto": 32,
    "regnety_002": 32,
    "densenet121": 32,
    "ghostnet_050": 32,
    "repvit_m0_9": 32,
    "edgenext_xx_small": 32,
    "vit_tiny_patch16_224": 16,
    "deit_tiny_distilled_patch16_224": 16,
    "vit_small_patch14_reg4_dinov2": 14,
    "swin_tiny_patch4_window7_224": 32,
}


def network(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(name, **options)
    return made


@pytest.mark.parametrize(("name", "stride"), FAMILIES.items())
def test_families_train_and_come_back(name: str, stride: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = 4 * stride
    model = BCNN(
        ["a", "b"],
        Preprocessing(size),
        {"name": "timm", "model": name},
        {"name": "compact", "width": 64},
    )
    assert (model.backbone.stride, model.backbone.size_divisor) == (stride, stride)
    nn.init.normal_(model.head.weight)
    module = BCNNModule(model, "finetune").train()
    buffers = {key: value.clone() for key, value in model.backbone.named_buffers()}
    images = torch.randint(256, (2, 3, size, size + stride), dtype=torch.uint8)
    assert model.backbone(images).shape == (2, model.backbone.channels, 4, 5)
    module(images)[:, 0].sum().backward()
    trained = [p.grad is not None for p in model.backbone.parameters()]
    assert sum(trained) > 0.9 * len(trained)
    for key, value in model.backbone.named_buffers():  # BatchNorm's statistics
        torch.testing.assert_close(value, buffers[key])
    save_model(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "model.safetensors")(images),
            model.eval()(images),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("name", ["densenet121", "vit_tiny_patch16_224"])
def test_files_with_timms_names_give_timms_maps(name: str, tmp_path: Path) -> None:
    theirs = network(name, num_classes=7).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = BCNN(
        ["a", "b"],
        Preprocessing(224),
        {"name": "timm", "model": name},
        {"name": "compact", "width": 64},
    )
    initialise_backbone(model, str(tmp_path / "theirs.pth"))
    about = theirs.pretrained_cfg
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        x = (images - torch.tensor(about["mean"]).view(3, 1, 1)) / torch.tensor(about["std"]).view(
            3, 1, 1
        )
        expected: Tensor = theirs.forward_features(x)
        if name.startswith("vit"):
            expected = expected[:, 1:].mT.unflatten(2, (14, 14))
        torch.testing.assert_close(model.eval().backbone(images), expected, rtol=1e-4, atol=1e-4)


def test_the_level_before_is_twice_as_fine() -> None:
    maps = Timm("resnet10t", level=-2)(torch.rand(1, 3, 64, 64))
    assert maps.shape == (1, 256, 4, 4)


def test_layers_are_blocks() -> None:
    assert Timm("vit_tiny_patch16_224").layers[2:5] == ("patch_embed", "blocks.0", "blocks.1")
    assert Timm("resnet10t").layers[-1] == "layer4.0"


def test_what_timm_says_of_its_weights_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = Timm("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    torch.testing.assert_close(vit.mean.flatten(), torch.full((3,), 0.5))
    model = BCNN(
        ["a"], Preprocessing(32), {"name": "timm", "model": "vit_tiny_patch16_224.augreg_in21k"}
    )
    initialise_backbone(model, "random")
    torch.testing.assert_close(model.backbone.std.flatten(), torch.full((3,), 0.5))
    dla = "dla46_c.in1k"
    assert (Timm(dla).interpolation, model.backbone.interpolation) == ("bilinear", "bicubic")
    known = timm.models._registry._model_pretrained_cfgs
    monkeypatch.setattr(known[dla], "interpolation", "random")
    assert Timm(dla).interpolation == "bicubic"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("resnet5O", "timm has no network resnet5O: it has"),
        ("resnet50.a9_in1k", "timm has no weights a9_in1k of resnet50: choose from a1_in1k"),
        ("hf-hub:stranger/resnet50", "timm has no network hf-hub:stranger"),
        ("local-dir:/tmp", "timm has no network local-dir"),
        ("mixer_s32_224", "timm's mixer_s32_224 takes images of 224 px only"),
    ],
)
def test_mistakes_are_sentences(model: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Timm(model)


def test_a_level_that_there_is_not() -> None:
    with pytest.raises(UserError, match="timm's resnet10t gives no maps of level 9"):
        Timm("resnet10t", level=9)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        Timm("resnet50")


def test_weights_of_another_network(tmp_path: Path) -> None:
    torch.save(network("resnet18").state_dict(), tmp_path / "theirs.pth")
    model = BCNN(["a"], Preprocessing(64), {"name": "timm", "model": "resnet10t"})
    with pytest.raises(UserError, match="these are no weights of timm's resnet10t"):
        initialise_backbone(model, str(tmp_path / "theirs.pth"))


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    model = BCNN(["a"], Preprocessing(64), {"name": "timm", "model": "resnet10t.c3_in1k"})
    with pytest.raises(UserError, match=r"no route.*timm/resnet10t.c3_in1k by hand.*model.weights"):
        initialise_backbone(model, "pretrained")


def test_the_licence_of_published_weights_is_said(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = network("resnet10t").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: state)
    chosen = ["model/backbone=timm", "model.backbone.model=resnet10t.c3_in1k", "data.size=64"]
    options = ["stage=last", "model/pooling=compact", f"output={tmp_path / 'out'}", *chosen]
    run(configure(*toy(images, *options, "model.weights=pretrained")))
    assert "weights as published: licence apache-2.0" in capsys.readouterr().out
    assert Timm("convnextv2_atto.fcmae").licence == "cc-by-nc-4.0"


@pytest.mark.slow
def test_both_stages(images: Path, tmp_path: Path) -> None:
    torch.save(network("resnet10t").state_dict(), tmp_path / "theirs.pth")
    chosen = ["model/backbone=timm", "model.backbone.model=resnet10t", "data.size=64"]
    options = [*chosen, "finetune.epochs=1", f"output={tmp_path / 'out'}"]
    words = toy(images, *options, f"model.weights={tmp_path / 'theirs.pth'}")
    run(configure(*(word for word in words if word != "model.weights=random")))
    model = load_model(tmp_path / "out" / "finetune" / "best.ckpt")
    assert model.chosen["backbone"]["model"] == "resnet10t"
    write_onnx(model, tmp_path / "model.onnx", softmax=True)
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    found = read_onnx(tmp_path / "model.onnx")(pixels)
    torch.testing.assert_close(found, model.predict(pixels), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("model", "can"), [("resnet18", True), ("vgg11", False)])
def test_a_network_says_whether_it_can_do_with_less_memory(model: str, can: bool) -> None:
    with torch.device("meta"):
        assert make_backbone("timm", model=model).supports_grad_checkpointing == can
    assert make_backbone("vgg16").supports_grad_checkpointing
