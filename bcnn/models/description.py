"""Checks of what a checkpoint says about its network."""

from collections.abc import Mapping
from typing import Any, get_args

from bcnn.data.transforms import Interpolation, Preprocessing, Resize
from bcnn.utils.errors import UserError

LARGEST = 8192  # px, of the short side of a resized image: a larger one takes gigabytes


def validate_description(description: Mapping[str, Any]) -> None:
    """Raise UserError for what would silently give another network, or ask for any amount of memory.

    Other wrong values fail loudly: missing parts, unknown names, options that a class does not have.
    """
    classes, split = description["classes"], description["split"]
    preprocessing = Preprocessing(**description["preprocessing"])
    size, crop_pct = preprocessing.size, preprocessing.crop_pct
    if not _is_texts(classes) or not 0 < len({*classes}) == len(classes):
        raise UserError("its classes should be distinct texts")
    if type(size) is not int or type(crop_pct) not in (int, float):
        raise UserError("its preprocessing.size and crop_pct should be numbers")
    if not (size >= 1 and 0 < crop_pct <= 1 and size <= LARGEST * crop_pct):
        raise UserError(f"its preprocessing should crop a share of at most {LARGEST} px")
    for name, kind in (("resize", Resize), ("interpolation", Interpolation)):
        if getattr(preprocessing, name) not in get_args(kind):
            raise UserError(f"its preprocessing.{name} should be one of {', '.join(get_args(kind))}")
    if split and not all(_is_texts(split[name]) for name in ("train", "val", "test")):
        raise UserError("its split should be lists of digests")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
