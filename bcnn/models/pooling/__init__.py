"""Poolings: the feature maps of an image → its descriptor."""

import inspect
from collections.abc import Callable
from typing import Any

from bcnn.models.pooling.average import Average
from bcnn.models.pooling.base import Pooling
from bcnn.models.pooling.bilinear import Bilinear
from bcnn.models.pooling.compact import Compact
from bcnn.models.pooling.democratic import Democratic
from bcnn.models.pooling.newton_schulz import NewtonSchulz
from bcnn.models.pooling.sqrt import Sqrt
from bcnn.utils.errors import UserError

# By the name in a configuration and in a checkpoint. Add your own before you train or load a model.
POOLINGS: dict[str, Callable[..., Pooling]] = {
    "average": Average,
    "bilinear": Bilinear,
    "compact": Compact,
    "democratic": Democratic,
    "newton_schulz": NewtonSchulz,
    "sqrt": Sqrt,
}


def make_pooling(channels: int, name: str, **options: Any) -> Pooling:
    """Return a pooling of maps of `channels` by a key of `POOLINGS` and its class's options."""
    all_arguments(channels, name, **options)
    return POOLINGS[name](channels, **options)


def all_arguments(channels: int, name: str, **options: Any) -> dict[str, Any]:
    """Return the arguments that make a pooling, also those at their defaults; refuse what it lacks."""
    if name not in POOLINGS:
        raise UserError(f"there is no pooling {name}: choose from {', '.join(POOLINGS)}")
    try:
        bound = inspect.signature(POOLINGS[name]).bind(channels, **options)
    except TypeError as error:
        raise UserError(
            f"model.pooling.name={name}: {error}; model/pooling={name} changes name and options"
        ) from error
    bound.apply_defaults()
    return bound.arguments
