"""What a file may say of its network, checked before any of it is believed."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_args

from bcnn.data.splits import SplitRecord
from bcnn.data.transforms import Interpolation, Preprocessing, Resize
from bcnn.utils.errors import UserError

LARGEST = 8192  # px that the short side of an image is resized to; a larger image has no room


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _named(value: Any) -> bool:
    return _options(value) and isinstance(value.get("name"), str)


def _options(value: Any) -> bool:
    return isinstance(value, Mapping) and _texts([*value])


def _recipe(value: Any) -> bool:
    return _options(value) and all(isinstance(v, str | int | float | None) for v in value.values())


def _split(value: Any) -> bool:
    return value is None or (
        _options(value) and {*value} >= {field.name for field in fields(SplitRecord)}
    )


def _preprocessing(value: Any) -> bool:
    return isinstance(value, Mapping) and {*value} <= {field.name for field in fields(Preprocessing)}


def _fits(preprocessing: Mapping[str, Any]) -> bool:
    whole = {**vars(Preprocessing()), **preprocessing}
    return bool(whole["size"] <= LARGEST * whole["crop_pct"])


# In this order, so that each rule can rely on those before it; what is not there has its default.
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("classes", lambda names: _texts(names) and 0 < len({*names}) == len(names), "distinct texts"),
    ("backbone", _named, "a name with options"),
    ("pooling", _named, "a name with options"),
    ("project", lambda count: count is None or type(count) is int, "a number of channels"),
    ("preprocessing", _preprocessing, f"of {', '.join(field.name for field in fields(Preprocessing))}"),
    ("preprocessing.size", lambda size: type(size) is int and size > 0, "a whole number of pixels"),
    ("preprocessing.resize", lambda resize: resize in get_args(Resize), f"one of {get_args(Resize)}"),
    (
        "preprocessing.crop_pct",
        lambda share: type(share) in (int, float) and 0 < share <= 1,
        "a share from over 0 to 1",
    ),
    (
        "preprocessing.interpolation",
        lambda interpolation: interpolation in get_args(Interpolation),
        f"one of {get_args(Interpolation)}",
    ),
    ("preprocessing", _fits, f"of images resized to {LARGEST} px at most"),
    ("split", _split, "a record of the images"),
    ("split.recipe", _recipe, "what they were drawn with"),
    *((f"split.{name}", _texts, "a list of texts") for name in ("train", "val", "test")),
)


def refuse_nonsense(description: Mapping[str, Any]) -> None:
    """Check what another of a network is made from, as `BCNN.description` gives it.

    Raises:
        UserError: a value is not of its kind, or asks for more than any machine has.
    """
    for name, right, expected in RULES:
        first, _, second = name.partition(".")
        part = (description.get(first) or {}) if second else description
        key = second or first
        if key in part and not right(part[key]):
            raise UserError(f"its {name} should be {expected}")
