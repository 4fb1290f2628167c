"""Fine-grained image recognition with bilinear CNNs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bcnn.models.checkpoint import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """`load_model` when it is asked for: torch takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bcnn.models.checkpoint import load_model

    return load_model
