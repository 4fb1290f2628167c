"""Build a network from the description in a checkpoint."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from bcnn.data.splits import SPLITS, SplitRecord
from bcnn.data.transforms import Interpolation, Preprocessing, Resize
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.errors import UserError

LARGEST = 8192  # px, of the short side of a resized image: a larger one takes gigabytes
RECORDED = re.compile("[0-9a-f]+( [0-9a-f]{16})?")  # digest and perceptual hash of an image


def is_description(about: Mapping[str, Any]) -> bool:
    """Return whether what is beside the tensors of a file describes a network of this project."""
    return {"classes", "preprocessing"} <= about.keys()


@contextmanager
def understanding(path: str | Path) -> Iterator[None]:
    """Make every error in the block a UserError: the description in `path` may be a stranger's."""
    try:
        yield
    except Exception as error:  # a class may raise anything, given a stranger's options
        reason = error if isinstance(error, UserError) else f"its description is wrong ({error!r})"
        raise UserError(f"{path} cannot be understood: {reason}") from error


def record_of(description: Mapping[str, Any]) -> SplitRecord | None:
    """Return the record of the images that a network was trained on; raise UserError at a wrong one."""
    if not (split := description.get("split")):
        return None
    if not all(_is_texts(split[s]) and all(map(RECORDED.fullmatch, split[s])) for s in SPLITS):
        raise UserError("its description has no valid split")
    return SplitRecord.from_plain(split)


def build(description: Mapping[str, Any]) -> BCNN:
    """Build the network that `BCNN.description` describes, with new weights.

    A value that would silently give another network, or take any amount of memory, is a UserError.
    """
    classes, split = description["classes"], record_of(description)
    taxonomy = description["taxonomy"]
    preprocessing = Preprocessing(**description["preprocessing"])
    size, crop_pct = preprocessing.size, preprocessing.crop_pct
    valid = {
        "classes": _is_texts(classes) and 0 < len({*classes}) == len(classes),
        "size": type(size) is int and size > 0,
        "crop_pct": type(crop_pct) in (int, float) and 0 < crop_pct <= 1 and size <= LARGEST * crop_pct,
        "taxonomy": not taxonomy
        or all(_is_texts(names) and len(names) == len(classes) for names in taxonomy.values()),
        "resize": preprocessing.resize in get_args(Resize),
        "interpolation": preprocessing.interpolation in get_args(Interpolation),
    }
    if wrong := [name for name, is_valid in valid.items() if not is_valid]:
        raise UserError(f"its description has no valid {', '.join(wrong)}")
    network = {name: description[name] for name in ("backbone", "pooling", "project", "calibration")}
    return BCNN(classes, preprocessing, **network, split=split, taxonomy=taxonomy)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
