"""Fine-grained image recognition with bilinear CNNs."""

from typing import Any

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Import `load_model` when it is asked for: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bcnn.models.checkpoint import load_model

    return load_model
