"""Build a network from the description in a checkpoint."""

from collections.abc import Mapping
from typing import Any, get_args

from bcnn.data.splits import SplitRecord
from bcnn.data.transforms import Interpolation, Preprocessing, Resize
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.errors import UserError

LARGEST = 8192  # px, of the short side of a resized image: a larger one takes gigabytes


def build(description: Mapping[str, Any]) -> BCNN:
    """Build the network that `BCNN.description` describes, with new weights.

    A value that would silently give another network, or take any amount of memory, is a UserError.
    """
    classes, split = description["classes"], description["split"]
    preprocessing = Preprocessing(**description["preprocessing"])
    size, crop_pct = preprocessing.size, preprocessing.crop_pct
    valid = {
        "classes": _is_texts(classes) and 0 < len({*classes}) == len(classes),
        "size": type(size) is int and size > 0,
        "crop_pct": type(crop_pct) in (int, float) and 0 < crop_pct <= 1 and size <= LARGEST * crop_pct,
        "resize": preprocessing.resize in get_args(Resize),
        "interpolation": preprocessing.interpolation in get_args(Interpolation),
        "split": not split or all(_is_texts(split[name]) for name in ("train", "val", "test")),
    }
    if wrong := [name for name, is_valid in valid.items() if not is_valid]:
        raise UserError(f"its description has no valid {', '.join(wrong)}")
    network = {name: description[name] for name in ("backbone", "pooling", "project")}
    return BCNN(
        classes, preprocessing, **network, split=SplitRecord.from_plain(split) if split else None
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
