"""Tensors by name from a file, without running code from it."""

import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bcnn.utils.errors import UserError

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # under which training loops save tensors
PREFIXES = ("module.", "model.")  # put before the names by DataParallel, and by a LightningModule


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file by name, and the description or the metadata beside them."""
    path = Path(path).expanduser()
    path.open("rb").close()
    try:
        return (_safetensors if path.suffix == ".safetensors" else _pickle)(path)
    except Exception as error:  # damaged bytes lead an unpickler to every kind of exception
        raise UserError(
            f"{path} is not a readable file of weights: it is damaged, or holds more than tensors"
        ) from error


def validate_state(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str | Path
) -> None:
    """Raise UserError unless all tensors expected are there, of their shape and kind of number."""
    for name, tensor in expected.items():
        dtypes = FLOATS if tensor.is_floating_point() else {tensor.dtype}
        found = tensors.get(name)
        if found is None or found.shape != tensor.shape or found.dtype not in dtypes:
            raise UserError(
                f"{path} is of another network: it has no {name} of shape {tuple(tensor.shape)} and "
                f"{'floating point' if tensor.is_floating_point() else tensor.dtype}"
            )


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load tensors that `validate_state` has checked; raise UserError if a value is not finite."""
    module.load_state_dict(tensors, strict=False)
    for name, tensor in module.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{path} is damaged or its training diverged: {name} is not finite")


def below(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors whose names begin with a prefix, without it; where there are none, all."""
    inside = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    return inside or tensors


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = file.metadata() or {}
    return tensors, dict(json.loads(about["bcnn"]) if "bcnn" in about else about)


def _pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:  # by torch without compression: else it may take any amount of memory
        with zipfile.ZipFile(path) as members:
            if sum(member.file_size for member in members.infolist()) > path.stat().st_size:
                raise ValueError("compressed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about files that are refused anyway
        content = torch.load(path, map_location="cpu", weights_only=True)
    about = content.get("hyper_parameters", {})
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    for prefix in PREFIXES:
        content = below(prefix, content)  # beside the network, a module may hold the weights of a loss
    tensors = {key: value for key, value in content.items() if torch.is_tensor(value)}
    for name, tensor in tensors.items():
        # A view can repeat one number without end. A sparse tensor has no storage, and raises.
        if tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise ValueError(f"{name} is larger than what is stored of it")
    return tensors, dict(about)
