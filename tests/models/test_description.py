"""What files say of their network: junk of every kind is a sentence, and takes no memory."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import junk
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.models.description import LARGEST
from bcnn.utils.errors import UserError

PLACES = [
    *(
        "classes",
        "preprocessing",
        "preprocessing.size",
        "preprocessing.resize",
        "preprocessing.crop_pct",
    ),
    *("preprocessing.interpolation", "preprocessing.more"),
    *("backbone", "backbone.name", "backbone.channels", "pooling", "pooling.name", "pooling.root"),
    *("split", "split.recipe", "split.train", "split.val", "backbone.more", "more"),
]


def described(model: BCNN, changes: dict[str, Any]) -> dict[str, Any]:
    """The model's description with other values at the places given."""
    about: dict[str, Any] = json.loads(json.dumps(model.description()))
    about["split"] = {"recipe": {"seed": 0}, "train": ["a"], "val": [], "test": []}
    for place, value in changes.items():
        first, _, second = place.partition(".")
        if second and isinstance(about.get(first), dict):
            about[first][second] = value
        elif not second:
            about[first] = value
    return about


def save(model: BCNN, about: dict[str, Any], path: Path) -> Path:
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": about}, path)
    return path


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("classes", "abc"),
        ("classes", ["a", "a", "b"]),
        ("classes", [1, 2, 3]),
        ("classes", []),
        ("classes", ["a", "b"]),
        ("preprocessing", 3),
        ("preprocessing.side", 3),
        ("preprocessing.size", 10**9),
        ("preprocessing.size", -32),
        ("preprocessing.size", 7),
        ("preprocessing.size", True),
        ("preprocessing.size", "32"),
        ("preprocessing.resize", "foo"),
        ("preprocessing.resize", ["keep"]),
        ("preprocessing.crop_pct", math.nan),
        ("preprocessing.crop_pct", 1e-9),
        ("preprocessing.crop_pct", 10**400),
        ("preprocessing.crop_pct", 0),
        ("preprocessing.interpolation", "random"),
        ("backbone", "tiny"),
        ("backbone.name", "../tiny"),
        ("backbone.name", "os"),
        ("backbone.name", ["tiny"]),
        ("backbone.channels", -4),
        ("backbone.channels", 10**9),
        ("backbone.package", 1),
        ("pooling.power", 3),
        ("pooling.root", "cubic"),
        ("pooling.root", ["signed"]),
        ("split", {"train": 3}),
        ("split.train", 3),
        ("split.recipe", {"seed": [[[]]]}),
    ],
)
def test_a_description_that_makes_no_sense_is_a_sentence(
    tiny: BCNN, tmp_path: Path, place: str, value: object
) -> None:
    path = save(tiny, described(tiny, {place: value}), tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=r"odd\.ckpt cannot be understood: ") as refusal:
        load_model(path)
    assert len(str(refusal.value)) < 500


def test_the_largest_framing_loads_and_what_it_leaves_out_is_as_before(
    tiny: BCNN, tmp_path: Path
) -> None:
    about = described(tiny, {"preprocessing": {"size": LARGEST // 2, "crop_pct": 0.5}})
    preprocessing = load_model(save(tiny, about, tmp_path / "large.ckpt")).preprocessing
    assert (preprocessing.side, preprocessing.resize, preprocessing.interpolation) == (
        LARGEST,
        "keep",
        "bilinear",
    )


@pytest.mark.fuzz
@given(changes=st.dictionaries(st.sampled_from(PLACES), junk(), min_size=1, max_size=3))
def test_any_description_is_loaded_or_refused(
    tiny: BCNN, tmp_path: Path, changes: dict[str, Any]
) -> None:
    about = described(tiny, changes)
    state = {key: value.contiguous() for key, value in tiny.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors", {"bcnn": json.dumps(about)})
    for path in (save(tiny, about, tmp_path / "m.ckpt"), tmp_path / "m.safetensors"):
        try:
            loaded = load_model(path)
        except UserError as refusal:
            assert str(path) in str(refusal)
        else:
            preprocessing = loaded.preprocessing
            assert (
                len(set(loaded.classes)) == 3
                and 8 <= preprocessing.size <= preprocessing.side <= LARGEST
            )
            assert loaded.predict(torch.zeros(1, 3, 32, 32)).isfinite().all()
            loaded.description()
