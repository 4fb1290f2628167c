"""Files of whole models: what they keep, and that a damaged or strange one is refused."""

import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint
from fuzz import Damage, damage, junk
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bcnn.data.splits import SplitRecord
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.models.description import LARGEST
from bcnn.utils.errors import UserError


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_checkpoint_keeps_the_network_and_its_description(
    tiny: BCNN, tmp_path: Path, suffix: str
) -> None:
    tiny.split = SplitRecord({"seed": 0}, frozenset({"a"}), frozenset({"b"}), frozenset(), {"b": 7})
    tiny.taxonomy = {"class": tiny.classes, "kind": ["cold", "cold", "warm"]}
    tiny.head.mean.normal_()
    tiny.backbone.set_normalization([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    loaded = load_model(save_checkpoint(tiny, tmp_path / f"m{suffix}"))
    assert loaded.description() == tiny.description() and not loaded.assumed
    images = torch.rand(2, 3, 32, 48)
    assert torch.equal(loaded(images), tiny(images)) and not loaded.training


def test_a_model_in_half_precision_loads(tiny: BCNN, tmp_path: Path) -> None:
    half = {key: value.bfloat16() for key, value in tiny.state_dict().items()}
    loaded = load_model(save_checkpoint(tiny, tmp_path / "half.ckpt", **half))
    torch.testing.assert_close(loaded.head.weight, tiny.head.weight, rtol=1e-2, atol=0)
    assert loaded.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("classes", "abc"),
        ("classes", ["a", "a", "b"]),
        ("classes", ["a", "b"]),
        ("preprocessing.size", 10**9),
        ("preprocessing.resize", "crop"),
        ("preprocessing.crop_pct", 1e-9),
        ("preprocessing.interpolation", "random"),
        ("project", 2),
        ("taxonomy", {"class": ["a", "b"], "kind": ["x", "y"]}),
        ("taxonomy", ["a", "b", "c"]),
        ("split", {"recipe": {}, "train": "a", "val": [], "test": []}),
        ("split", {"recipe": {}, "train": ["a ffff"], "val": [], "test": []}),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    tiny: BCNN, tmp_path: Path, place: str, value: object
) -> None:
    path = save_checkpoint(tiny, tmp_path / "odd.ckpt", described(tiny, {place: value}))
    with pytest.raises(UserError, match=r"odd\.ckpt (cannot be understood|is of another network): "):
        load_model(path)


def described(model: BCNN, changes: dict[str, Any]) -> dict[str, Any]:
    """The model's description with other values, by names with a dot for what is inside."""
    about: dict[str, Any] = json.loads(json.dumps(model.description()))
    about["split"] = {"recipe": {"seed": 0}, "train": ["a"], "val": [], "test": []}
    for place, value in changes.items():
        first, _, second = place.partition(".")
        inside = about[first] if second else about
        if isinstance(inside, dict):  # not changed before
            inside[second or first] = value
    return about


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda t: torch.full_like(t, torch.nan),
    "beyond float32": lambda t: torch.full_like(t, 1e300, dtype=torch.float64),
    "int8": lambda t: t.to(torch.int8),
    "complex": lambda t: t.to(torch.complex64),
    "another shape": lambda t: t[None],
}


@pytest.mark.parametrize("name", ["backbone.features.weight", "backbone.mean", "head.bias"])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_weights_that_are_no_finite_numbers_of_the_right_shape_are_refused(
    tiny: BCNN, tmp_path: Path, name: str, odd: str, suffix: str
) -> None:
    path = save_checkpoint(tiny, tmp_path / f"odd{suffix}", **{name: ODD[odd](tiny.state_dict()[name])})
    with pytest.raises(UserError, match=rf"odd\{suffix}.*{name}"):
        load_model(path)


def test_a_small_file_takes_little_memory(tiny: BCNN, tmp_path: Path) -> None:
    many = torch.ones(1).expand(10**9, tiny.pooling.width)
    save_checkpoint(tiny, tmp_path / "views.ckpt", **{"head.weight": many})
    save_checkpoint(tiny, tmp_path / "plain.ckpt", **{"head.weight": torch.zeros(10**6)})
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    for name in ("views.ckpt", "bomb.ckpt"):
        with pytest.raises(UserError, match=f"{name} is not a readable"):
            load_model(tmp_path / name)


# What strangers and disks do to files, drawn at random.

NAMES = ["classes", "preprocessing", "preprocessing.size", "preprocessing.resize", "split", "split.val"]
NAMES += ["preprocessing.crop_pct", "preprocessing.interpolation", "backbone", "backbone.name"]
NAMES += ["backbone.channels", "pooling", "pooling.name", "pooling.root", "project", "more"]


@pytest.mark.fuzz
@given(changes=st.dictionaries(st.sampled_from(NAMES), junk(), min_size=1, max_size=3))
def test_any_description_is_loaded_or_refused(
    tiny: BCNN, tmp_path: Path, changes: dict[str, Any]
) -> None:
    for suffix in (".ckpt", ".safetensors"):
        path = save_checkpoint(tiny, tmp_path / f"m{suffix}", described(tiny, changes))
        if (loaded := loaded_or_refused(path)) is None:
            continue
        preprocessing = loaded.preprocessing
        assert len(set(loaded.classes)) == 3 and preprocessing.size <= preprocessing.side <= LARGEST
        assert loaded.predict(torch.zeros(1, 3, 32, 32)).isfinite().all()
        loaded.description()


def loaded_or_refused(path: Path) -> BCNN | None:
    model = None
    with suppress(UserError):
        model = load_model(path)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert not (path.parent / "owned").exists()
    return model


@pytest.mark.fuzz
@given(kind=st.sampled_from(["ckpt", "safetensors", "pickle"]), changes=damage())
def test_a_file_with_bytes_changed_is_loaded_or_refused(
    tiny: BCNN, tmp_path: Path, kind: str, changes: Damage
) -> None:
    path = save_checkpoint(tiny, tmp_path / f"damaged.{kind}")
    if kind == "pickle":  # the one inside the archive
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, changes(content) if name.endswith(".pkl") else content)
    else:
        path.write_bytes(changes(path.read_bytes()))
    loaded_or_refused(path)


class Call:
    """Asks for a call when it is unpickled."""

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
def test_no_call_in_a_file_is_made(tmp_path: Path, data: st.DataObject, place: str) -> None:
    call = data.draw(calls(str(tmp_path / "owned")))
    content: dict[str, Any] = {"state_dict": {"head.bias": torch.zeros(3)}, "hyper_parameters": {}}
    (content["state_dict"] if place == "head.bias" else content)[place] = call
    torch.save(content if place else call, tmp_path / "call.pth")
    assert loaded_or_refused(tmp_path / "call.pth") is None
