"""Every file of weights, in and out: nothing else in the project opens one.

Files are read without running code from them (`torch.load(weights_only=True)`, safetensors).
"""

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.models import VGG16_Weights

from bcnn.models.bilinear_cnn import BCNN, build
from bcnn.models.third_party import from_original, is_original, to_original
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write

TORCHVISION = {
    "imagenet": VGG16_Weights.IMAGENET1K_V1,
    "imagenet_features": VGG16_Weights.IMAGENET1K_FEATURES,
}

# What the parts of the network were called in files of before they were three.
RENAMED = {
    "features.": "backbone.features.",
    "centering.mean": "head.mean",
    "classifier.": "head.",
    "mean": "backbone.mean",
    "std": "backbone.std",
}

NORMALIZATION = {"backbone.mean", "backbone.std"}
DEFAULTED = NORMALIZATION | {"head.mean"}  # what others' files, and those of before, leave out

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # other loops' names for the tensors
PREPROCESSING = ("size", "resize", "crop_pct")  # and classes and split, in files of before all flat


def initialise_backbone(model: BCNN, weights: str, normalization: str | None = None) -> None:
    """Fill the backbone of a new model and set the normalisation that belongs to its weights.

    Args:
        model: changed in place.
        weights: "imagenet" (torchvision's IMAGENET1K_V1), "imagenet_features" (its
            IMAGENET1K_FEATURES), "pretrained" (those that the backbone knows a place of), "random"
            (keeps the initialisation), or a file, in the backbone's names or in its authors'.
        normalization: "imagenet" or "imagenet_features", for a file that does not say.

    Raises:
        UserError: no such file or download, a file of another network, an unknown normalisation.
    """
    if weights == "random":
        if not model.backbone.mean.any():  # else it knows its own
            _normalize_like(model, "imagenet")
        return
    if weights in TORCHVISION and model.chosen["backbone"] != {"name": "vgg16"}:
        raise UserError(f"model.weights={weights} is of VGG-16: give a file, pretrained or random")
    own = {
        key: v
        for key, v in model.state_dict().items()
        if key.startswith("backbone.") and not key.startswith("backbone.projection.")
    }
    about: dict[str, Any] = {}
    if weights in TORCHVISION:
        tensors, about = _renamed(_download(weights)), {"weights": TORCHVISION[weights].name}
    elif weights == "pretrained":
        tensors = _of_backbone(model.backbone.published())
    else:
        theirs, about = _read(Path(weights))
        tensors = _renamed(theirs)
        if own.keys().isdisjoint(tensors):
            tensors = _of_backbone(model.backbone.published(theirs))
    try:
        _refuse_others(own, tensors)
    except UserError as error:
        name = model.chosen["backbone"]["name"]
        raise UserError(f"{weights} does not hold the features of {name}: {error}") from error
    _load(model, own, tensors, weights)
    _set_normalization(model, tensors, about, normalization, weights)


def load_model(
    path: str | Path, classes: list[str] | None = None, normalization: str | None = None
) -> BCNN:
    """The model in a checkpoint of this project's, or in a `.pth` / `.safetensors` state dict.

    It is ready for use (`model.predict(images)`): on the CPU, in evaluation mode.

    State dicts may use this project's names, the two-script original's (`classifiers.0.weight`), or
    those of HaoMood's bilinear-cnn (`fc.weight`): their classifier (classes, 262144) is packed without
    changing a logit. "module." before all names, and a dictionary around them, are taken off.

    Args:
        path: the file.
        classes: names for the classes of a file that holds none (default: "0", "1", …).
        normalization: as for `initialise_backbone`; files with the names of others mean "imagenet".

    Raises:
        UserError: the file is missing, unreadable, or does not hold a bilinear CNN.
    """
    tensors, about, own = _understood(path, classes)
    try:
        model = build(about)
    except Exception as error:  # a backbone or a pooling may raise anything, given others' options
        raise _no_sense(path, error) from error
    if "preprocessing" not in about:
        named = "" if classes else ", nor what its classes are called"
        model.assumed = (
            f"{path} does not say at which size it was trained: {model.preprocessing} is taken{named}"
        )
    _load(model, own.state_dict(), tensors, path)
    _set_normalization(model, tensors, about, normalization, path)
    return model.eval()


def network_in(path: str | Path) -> BCNN:
    """The network of a file that `load_model` opens, on the meta device: all of it but its weights.

    Raises:
        UserError: as for `load_model`.
    """
    return _understood(path)[2]


def _understood(
    path: str | Path, classes: list[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], BCNN]:
    """Tensors by name, what the file says of itself, and its network on the meta device."""
    tensors, about = _read(Path(path))
    tensors = _renamed(tensors)
    weight, bias = tensors.get("head.weight"), tensors.get("head.bias")
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        found = "none" if weight is None else f"one of shape {tuple(weight.shape)}"
        raise UserError(
            f"{path} holds no bilinear CNN: expected a classifier of shape (classes, width), "
            f"found {found}; features alone go to model.weights={path}"
        )
    if about.get("classes") is None:
        about["classes"] = classes or [str(k) for k in range(len(bias))]
        if len(about["classes"]) != len(bias):
            raise UserError(
                f"{path} was trained on {len(bias)} classes, the images have {len(about['classes'])}: "
                "train stage=last on these images first"
            )
    try:
        with torch.device("meta"):  # no memory is taken before all of it is known to be in the file
            own = build(about)
        _refuse_others(own.state_dict(), tensors)
    except Exception as error:
        raise _no_sense(path, error) from error
    return tensors, about, own


def _no_sense(path: str | Path, error: Exception) -> UserError:
    said = error if isinstance(error, UserError) else f"what it says of its network ({error})"
    return UserError(f"{path} cannot be understood: {said}")


def save_model(model: BCNN, path: str | Path) -> None:
    """Write the model to a file that `load_model` opens.

    Args:
        path: `.safetensors` holds the whole model, with its description as metadata; `.pth` is a state
            dict for the original's network (`to_original`), without the classes' names.

    Raises:
        UserError: the file cannot be written, or the model is none for the original's layout.
    """
    with atomic_write(Path(path)) as part:
        write_model(model, part)


def write_model(model: BCNN, path: Path) -> None:
    """As `save_model`, but that a file is left cut short where its disk is full."""
    if path.suffix == ".safetensors":
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        # A file that safetensors makes is for its owner alone.
        path.write_bytes(save(state, describe(model) | {"bcnn": json.dumps(model.description())}))
    else:
        content = io.BytesIO()  # torch's own writing to a full disk ends the process
        torch.save(to_original(model), content)
        path.write_bytes(content.getbuffer())


def describe(model: BCNN) -> dict[str, str]:
    """What a user of the weights has to know, for files whose metadata are strings.

    `classes` is a JSON list in the order of the logits; `size` in pixels, `resize`, `crop_pct` and
    `interpolation` are those of its preprocessing, and `preprocessing` says in words what they ask for.
    """
    preprocessing = model.preprocessing
    size, side = preprocessing.size, preprocessing.side
    resized = f"short side to {side} px" if preprocessing.resize == "keep" else f"to {side} × {side} px"
    return {
        "classes": json.dumps(model.classes),
        **{name: str(value) for name, value in asdict(preprocessing).items()},
        "preprocessing": f"upright (EXIF), RGB, resized {resized} ({preprocessing.interpolation}, "
        f"antialiased), centre crop of {size} × {size} px, uint8 in 0..255; the model normalises",
    }


def _refuse_others(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError where tensors are not what a network has under its own names."""
    for name, tensor in own.items():
        found = tensors.get(name)
        if found is None and name in DEFAULTED:
            continue
        if found is None:
            raise UserError(f"it has no {name}")
        if found.shape != tensor.shape:
            raise UserError(
                f"its {name} is of shape {tuple(found.shape)}, expected {tuple(tensor.shape)}"
            )
        if found.dtype not in (FLOATS if tensor.is_floating_point() else {tensor.dtype}):
            raise UserError(f"its {name} is of {found.dtype}, expected {tensor.dtype}")


def _load(
    model: BCNN, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str | Path
) -> None:
    """Take over tensors of the names in `own`, which are right but for their values."""
    model.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{source} is damaged, or its training diverged: its {name} has values that are not "
                "finite numbers"
            )


def _set_normalization(
    model: BCNN,
    tensors: dict[str, Tensor],
    about: dict[str, Any],
    normalization: str | None,
    source: str | Path,
) -> None:
    """Find the normalisation in the file (mean and std, or the name of torchvision's weights)."""
    if tensors.keys() >= NORMALIZATION:
        return
    said = " ".join(value for value in about.values() if isinstance(value, str))
    named = [
        key
        for key, enum in TORCHVISION.items()
        if enum.name in said or _file_name(enum) == Path(source).name
    ]
    choice = normalization or (named[0] if named else None)
    if choice not in TORCHVISION:
        raise UserError(
            f"{source} does not say how its images were normalised, as imagenet (mean 0.485…, std "
            "0.229…) or as imagenet_features (mean 0.482…, std 1/255): say which in training by "
            "model.normalization=…, bcnn.load_model by normalization=…"
        )
    _normalize_like(model, choice)


def _normalize_like(model: BCNN, name: str) -> None:
    preset = TORCHVISION[name].transforms()
    model.backbone.set_normalization(preset.mean, preset.std)


def _download(name: str) -> dict[str, Tensor]:
    """torchvision's file, kept in torch.hub's folder; its hash is checked."""
    enum = TORCHVISION[name]
    file = Path(torch.hub.get_dir(), "checkpoints", _file_name(enum))
    try:
        return dict(enum.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except (URLError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            f"cannot get the weights '{name}' ({error}): fetch {enum.url} by hand and put it at "
            f"{file}, or train with model.weights=random"
        ) from error


def _file_name(enum: VGG16_Weights) -> str:
    return Path(urlparse(enum.url).path).name


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and what the file says of itself, from .ckpt, .pth, .pt or .safetensors."""
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise UserError(f"no such file of weights: {path}")
    try:
        tensors, about = (_safetensors if path.suffix == ".safetensors" else _pickled)(path)
        if is_original(tensors):
            tensors, said = from_original(tensors, path)
            about = {**said, **about}
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # damaged bytes lead the unpickler into whatever there is
        raise UserError(
            f"{path} is not a readable file of weights: it is damaged, or holds more than tensors"
        ) from error
    if not tensors:
        raise UserError(f"{path} is not a state dict: expected tensors by name")
    return tensors, about


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = file.metadata() or {}
    if "bcnn" in about:
        return tensors, dict(json.loads(about["bcnn"]))
    texts = {name: json.loads(about[name]) for name in ("classes", "split") if name in about}
    numbers = {name: json.loads(about[name]) for name in ("size", "crop_pct") if name in about}
    return tensors, _nested({**about, **texts, **numbers})


def _pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as members:
                if sum(member.file_size for member in members.infolist()) > path.stat().st_size:
                    raise ValueError("compressed, which may take any memory")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what is refused after all
        content = torch.load(path, map_location="cpu", weights_only=True)
    tensors = _state_dict(content)
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise ValueError(f"{name} is larger than what is stored of it, or not dense")
    return tensors, _nested(dict(content.get("hyper_parameters", {})) if tensors else {})


def _is_plain(tensor: Tensor) -> bool:
    """Dense, and all of it in memory: a view can repeat one number without end."""
    dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (
        dense
        and tensor.device.type == "cpu"
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _state_dict(content: Any, depth: int = 3) -> dict[str, Tensor]:
    """The tensors by name in what a file holds, without what wrappers put before every name.

    Lightning keeps them under "state_dict", other loops under "model" or the like; DataParallel puts
    "module." before the names, and a module that holds the network, "model.".
    """
    if not isinstance(content, dict) or not depth:
        return {}
    if not all(isinstance(key, str) and torch.is_tensor(value) for key, value in content.items()):
        wrapped = (_state_dict(content.get(name), depth - 1) for name in WRAPPERS)
        return next(filter(None, wrapped), {})
    for prefix in ("module.", "model."):
        inside = {key.removeprefix(prefix): v for key, v in content.items() if key.startswith(prefix)}
        if inside:  # beside the network, a module may hold the weights of a loss
            return _state_dict(inside, depth)
    return dict(content)


def _nested(about: dict[str, Any]) -> dict[str, Any]:
    """What a file says of itself as `BCNN.description` does; before, all of it was flat."""
    if "preprocessing" in about or "size" not in about:
        return about
    return {**about, "preprocessing": {name: about[name] for name in PREPROCESSING if name in about}}


def _of_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{name}": tensor for name, tensor in tensors.items()}


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of before as today's."""
    return {
        next((new + key[len(old) :] for old, new in RENAMED.items() if key.startswith(old)), key): value
        for key, value in tensors.items()
    }
