"""Files of weights, in and out."""

import hashlib
import io
import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import Damage, damage, junk
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VGG16_Weights

from bcnn.data.transforms import Preprocessing
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import (
    TORCHVISION,
    initialise_backbone,
    load_model,
    save_model,
    to_original,
)
from bcnn.utils.errors import UserError


@pytest.fixture(scope="module")
def model() -> BCNN:
    torch.manual_seed(0)
    model = BCNN(["x", "y"], Preprocessing(64, "squash"))
    preset = VGG16_Weights.IMAGENET1K_V1.transforms()
    model.backbone.set_normalization(preset.mean, preset.std)
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    return model


def same(a: BCNN, b: BCNN) -> bool:
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    return torch.allclose(a(images), b(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bcnn_alllayer.pth", "model.safetensors"])
def test_the_to_original_comes_back_as_the_same_network(model: BCNN, tmp_path: Path, name: str) -> None:
    state = {key: value.contiguous() for key, value in to_original(model).items()}
    assert state["classifiers.0.weight"].shape == (2, 512**2)
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    loaded = load_model(tmp_path / name)
    assert same(loaded, model)
    assert loaded.classes == ["0", "1"]
    assert load_model(tmp_path / name, classes=["x", "y"]).classes == ["x", "y"]


def test_a_full_width_classifier_that_is_not_symmetric_keeps_its_logits(
    model: BCNN, tmp_path: Path
) -> None:
    state = to_original(model)
    matrix = torch.randn(2, 512, 512)
    state["classifiers.0.weight"] = matrix.flatten(1)
    torch.save(state, tmp_path / "bcnn_lastlayer.pth")
    loaded = load_model(tmp_path / "bcnn_lastlayer.pth")
    symmetric = to_original(loaded)["classifiers.0.weight"].view(2, 512, 512)
    torch.testing.assert_close(symmetric, (matrix + matrix.mT) / 2)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_checkpoints_of_haomood_s_bilinear_cnn(
    model: BCNN, tmp_path: Path, wrapper: str | None
) -> None:
    state = to_original(model)
    for kind in ("weight", "bias"):
        state[f"fc.{kind}"] = state.pop(f"classifiers.0.{kind}")
    state = {f"module.{key}": value for key, value in state.items()}  # trained on several GPUs
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "vgg_16_epoch_24.pth")
    loaded = load_model(tmp_path / "vgg_16_epoch_24.pth")
    images = torch.rand(2, 3, 48, 64)
    with torch.no_grad():  # its forward pass, which adds 1e-5 under the root
        maps = model.backbone(images).flatten(2)
        matrix = (maps @ maps.mT / maps.shape[2]).flatten(1)
        rows = nn.functional.normalize((matrix + 1e-5).sqrt())
        expected = rows @ state["module.fc.weight"].mT + state["module.fc.bias"]
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(images), expected, rtol=1e-2, atol=1e-2)
    save_model(loaded, tmp_path / "own.safetensors")
    assert load_model(tmp_path / "own.safetensors").chosen["pooling"] == {
        "name": "bilinear",
        "root": "plain",
    }


def test_own_state_dict_keeps_its_normalisation(model: BCNN, tmp_path: Path) -> None:
    other = BCNN(["x", "y"])
    other.load_state_dict(model.state_dict())
    other.backbone.set_normalization([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    torch.save(other.state_dict(), tmp_path / "own.pth")
    torch.testing.assert_close(load_model(tmp_path / "own.pth").backbone.mean, other.backbone.mean)


def features_of(model: BCNN) -> dict[str, torch.Tensor]:
    return {
        f"features.{k}": v.contiguous().clone() for k, v in model.backbone.features.state_dict().items()
    }


def test_normalisation_comes_with_the_weights(model: BCNN, tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    save_file(features_of(model), path, metadata={"convention": "as IMAGENET1K_FEATURES"})
    named = BCNN(["x", "y"])
    initialise_backbone(named, str(path))
    torch.testing.assert_close(named.backbone.std, torch.full((3, 1, 1), 1 / 255))
    torch.testing.assert_close(named.backbone.features[0].weight, model.backbone.features[0].weight)
    save_file(features_of(model), path)
    with pytest.raises(UserError, match=r"model\.normalization"):
        initialise_backbone(BCNN(["x", "y"]), str(path))
    initialise_backbone(named, str(path), normalization="imagenet")
    torch.testing.assert_close(named.backbone.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))


def test_torchvision_file_under_its_own_name_is_known(model: BCNN, tmp_path: Path) -> None:
    path = tmp_path / "vgg16-397923af.pth"
    # torchvision's is in the format from before zip files
    torch.save(features_of(model), path, _use_new_zipfile_serialization=False)
    loaded = BCNN(["x", "y"])
    initialise_backbone(loaded, str(path))
    torch.testing.assert_close(loaded.backbone.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))


def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> Path:
    """Point torchvision's enum at `url`, and torch.hub's folder at an empty one."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(TORCHVISION["imagenet"].value, "url", url)
    return tmp_path / "hub" / "checkpoints"


def test_download_is_checked_and_kept(
    model: BCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(features_of(model), tmp_path / "plain.pth")
    digest = hashlib.sha256((tmp_path / "plain.pth").read_bytes()).hexdigest()[:8]
    served = (tmp_path / "plain.pth").rename(tmp_path / f"vgg16-{digest}.pth")
    kept = serve(monkeypatch, tmp_path, served.as_uri())
    loaded = BCNN(["x", "y"])
    initialise_backbone(loaded, "imagenet")
    torch.testing.assert_close(loaded.backbone.features[28].weight, model.backbone.features[28].weight)
    served.unlink()
    initialise_backbone(BCNN(["x", "y"]), "imagenet")  # from the copy that was kept
    assert [file.name for file in kept.iterdir()] == [served.name]


def test_a_download_that_fails_its_hash_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "vgg16-00000000.pth"
    served.write_bytes(b"half a file")
    kept = serve(monkeypatch, tmp_path, served.as_uri())
    with pytest.raises(UserError, match="put it at") as refusal:
        initialise_backbone(BCNN(["x", "y"]), "imagenet")
    assert str(kept / served.name) in str(refusal.value)
    assert list(kept.iterdir()) == []


def test_without_internet_the_file_and_its_place_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = (tmp_path / "offline" / "vgg16-397923af.pth").as_uri()
    kept = serve(monkeypatch, tmp_path, missing)
    with pytest.raises(UserError) as refusal:
        initialise_backbone(BCNN(["x", "y"]), "imagenet")
    assert missing in str(refusal.value) and str(kept / "vgg16-397923af.pth") in str(refusal.value)


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"features.0.weight": Exploit(tmp_path / "owned")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth"):
        load_model(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["cut.pth", "cut.ckpt", "cut.safetensors"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02 damaged")
    with pytest.raises(UserError, match=name):
        load_model(tmp_path / name)


def test_files_of_other_networks_are_refused(model: BCNN, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_model(tmp_path / "missing.pth")
    torch.save(features_of(model), tmp_path / "features.pth")
    with pytest.raises(UserError, match="found none"):
        load_model(tmp_path / "features.pth")
    state = to_original(model)
    state["classifiers.0.weight"] = torch.zeros(2, 4096)
    torch.save(state, tmp_path / "pooling.pth")
    with pytest.raises(UserError, match="another pooling"):
        load_model(tmp_path / "pooling.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "small.pth")
    with pytest.raises(UserError, match="does not hold the features of vgg16"):
        initialise_backbone(BCNN(["x", "y"]), str(tmp_path / "small.pth"))
    torch.save(to_original(model), tmp_path / "two.pth")
    with pytest.raises(UserError, match="2 classes, the images have 3"):
        load_model(tmp_path / "two.pth", classes=["a", "b", "c"])


def state_of(model: BCNN) -> dict[str, torch.Tensor]:
    return {key: value.contiguous().clone() for key, value in model.state_dict().items()}


ODD = {
    "nan": lambda t: torch.full_like(t, torch.nan),
    "one inf": lambda t: torch.cat([t.flatten()[1:], torch.tensor([torch.inf])]).view(t.shape),
    "beyond float32": lambda t: torch.full_like(t, 1e300, dtype=torch.float64),
    "int8": lambda t: t.to(torch.int8),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "another shape": lambda t: t[None],
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.parametrize(
    "name", ["backbone.features.weight", "backbone.mean", "head.weight", "head.bias"]
)
@pytest.mark.parametrize("odd", ODD)
def test_weights_that_are_no_finite_numbers_of_the_right_shape_are_refused(
    tiny: BCNN, tmp_path: Path, name: str, odd: str
) -> None:
    state = state_of(tiny)
    state[name] = ODD[odd](state[name])
    about = tiny.description()
    torch.save({"state_dict": state, "hyper_parameters": about}, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=r"odd\.ckpt"):
        load_model(tmp_path / "odd.ckpt")
    if odd in ("sparse", "quantized", "meta"):
        return
    save_file(state, tmp_path / "odd.safetensors", {"bcnn": json.dumps(about)})
    with pytest.raises(UserError, match=r"odd\.safetensors"):
        load_model(tmp_path / "odd.safetensors")


def test_a_model_in_half_precision_loads(tiny: BCNN, tmp_path: Path) -> None:
    state = {key: value.bfloat16() for key, value in tiny.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": tiny.description()}, tmp_path / "half.ckpt")
    loaded = load_model(tmp_path / "half.ckpt")
    torch.testing.assert_close(loaded.head.weight, tiny.head.weight, rtol=1e-2, atol=0)
    assert loaded.head.weight.dtype == torch.float32


def test_the_wide_layout_of_integers_or_nan_is_refused(model: BCNN, tmp_path: Path) -> None:
    state = to_original(model)
    for weight in (torch.ones(2, 512**2, dtype=torch.int8), torch.full((2, 512**2), torch.nan)):
        state["classifiers.0.weight"] = weight
        torch.save(state, tmp_path / "odd.pth")
        with pytest.raises(UserError, match=r"odd\.pth"):
            load_model(tmp_path / "odd.pth")


def test_a_small_file_does_not_ask_for_much_memory(tiny: BCNN, tmp_path: Path) -> None:
    state = state_of(tiny)
    state["head.weight"] = torch.ones(1).expand(10**9, tiny.pooling.width)
    state["head.bias"] = torch.ones(1).expand(10**9)
    about = {**tiny.description(), "classes": None}
    torch.save({"state_dict": state, "hyper_parameters": about}, tmp_path / "views.ckpt")
    torch.save({"head.weight": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    for name in ("views.ckpt", "bomb.pth"):
        with pytest.raises(UserError, match=f"{name} is not a readable"):
            load_model(tmp_path / name)


def test_wrappers_without_end_are_refused(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    for name in ("state_dict", "model", "net"):
        content[name] = content
    torch.save(content, tmp_path / "loop.pth")
    shared: dict[str, object] = {}
    for _ in range(30):  # four ways down from each, to nothing
        shared = {name: shared for name in ("state_dict", "model_state_dict", "model", "net")}
    torch.save(shared, tmp_path / "ways.pth")
    torch.save({"module." * 5000 + "x": torch.zeros(1)}, tmp_path / "deep.pth")
    for name in ("loop.pth", "ways.pth", "deep.pth"):
        with pytest.raises(UserError, match=name):
            load_model(tmp_path / name)


@pytest.fixture
def valid(tiny: BCNN, tmp_path: Path) -> dict[str, bytes]:
    """Files of the same model in every format, by their names' endings."""
    state, about = state_of(tiny), tiny.description()
    content = {"state_dict": state, "hyper_parameters": about}
    torch.save(content, tmp_path / "m.ckpt")
    torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "m.safetensors", {"bcnn": json.dumps(about)})
    return {path.suffix: path.read_bytes() for path in tmp_path.glob("m.*")}


def loads_or_is_refused(path: Path) -> None:
    try:
        model = load_model(path)
    except UserError as refusal:
        assert str(path) in str(refusal)
    else:
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        assert not (path.parent / "owned").exists()


@pytest.mark.fuzz
@given(suffix=st.sampled_from([".ckpt", ".pth", ".safetensors"]), changes=damage())
def test_a_file_with_bytes_changed_is_loaded_or_refused(
    valid: dict[str, bytes], tmp_path: Path, suffix: str, changes: Damage
) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(changes(valid[suffix]))
    loads_or_is_refused(path)


@pytest.mark.fuzz
@given(which=st.integers(0, 30), changes=damage())
def test_a_file_with_a_member_changed_is_loaded_or_refused(
    valid: dict[str, bytes], tmp_path: Path, which: int, changes: Damage
) -> None:
    with (
        zipfile.ZipFile(io.BytesIO(valid[".ckpt"])) as before,
        zipfile.ZipFile(tmp_path / "member.ckpt", "w") as after,
    ):
        names = before.namelist()
        # the pickle, every second time
        chosen = names[which % len(names)] if which % 2 else f"{names[0].partition('/')[0]}/data.pkl"
        for name in names:
            content = before.read(name)
            after.writestr(name, changes(content) if name == chosen else content)
    loads_or_is_refused(tmp_path / "member.ckpt")


NUMBERS = st.lists(st.integers(0, 40) | st.integers(), max_size=3)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "F4", "BOOL", ""]),
        "shape": NUMBERS,
        "data_offsets": NUMBERS,
    }
)
NAMES = st.sampled_from(["head.weight", "head.bias", "fc.weight", "__metadata__"])
HEADERS = st.dictionaries(NAMES, ENTRIES | junk(), max_size=3) | junk()


@pytest.mark.fuzz
@given(header=HEADERS, rest=st.binary())
def test_safetensors_with_any_header_are_refused(tmp_path: Path, header: object, rest: bytes) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "header.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    with pytest.raises(UserError, match=r"header\.safetensors"):
        load_model(path)


class Call:
    """Pickled, it asks for a call."""

    def __init__(self, call: tuple[object, tuple[object, ...]]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


CALLS = [os.mkdir, os.system, eval, exec, print, getattr, bytes, set, OrderedDict, Path, torch.load]
CALLS += [torch.Size, torch.zeros, torch._utils._rebuild_parameter, torch._utils._rebuild_tensor_v2]


def calls(folder: str) -> st.SearchStrategy[Call]:
    code = f"__import__('os').mkdir({folder!r})"
    words = st.sampled_from([folder, f"mkdir {folder}", code]) | junk()
    return st.builds(Call, st.tuples(st.sampled_from(CALLS), st.lists(words, max_size=3).map(tuple)))


@pytest.mark.fuzz
@given(data=st.data(), place=st.sampled_from(["", "state_dict", "hyper_parameters", "head.bias"]))
def test_no_call_in_a_file_is_made(
    valid: dict[str, bytes], tmp_path: Path, data: st.DataObject, place: str
) -> None:
    call = data.draw(calls(str(tmp_path / "owned")))
    content = {"state_dict": {"head.bias": torch.zeros(3)}, "hyper_parameters": {}}
    where = content["state_dict"] if place == "head.bias" else content
    where[place] = call  # type: ignore[assignment]
    torch.save(content if place else call, tmp_path / "call.pth")
    with pytest.raises(UserError, match=r"call\.pth"):
        load_model(tmp_path / "call.pth")
    assert not (tmp_path / "owned").exists()
