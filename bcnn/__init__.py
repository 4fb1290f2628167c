"""Fine-grained image recognition with bilinear CNNs."""

from importlib import import_module, metadata
from typing import Any

# What is public here, and the module that has it: importing torch takes seconds.
_PUBLIC = {
    "BCNN": "bcnn.models.bilinear_cnn",
    "BCNNModule": "bcnn.training.module",
    "FineGrainedDataModule": "bcnn.data.datamodule",
    "load_model": "bcnn.models.checkpoint",
    "predict_paths": "bcnn.evaluation.inference",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for."""
    if name == "__version__":
        return metadata.version("bcnn")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
