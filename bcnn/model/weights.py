"""Every file of weights, in and out: nothing else in the project opens one.

Files are read without running code from them (`torch.load(weights_only=True)`, safetensors).
"""

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import VGG16_Weights

from bcnn.data.transforms import Framing
from bcnn.errors import UserError
from bcnn.model.network import BCNN, DEFAULT, build
from bcnn.model.original import from_original, is_original, to_original

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


def initialise_backbone(model: BCNN, weights: str, normalization: str | None = None) -> None:
    """Fill the backbone of a new model and set the normalisation that belongs to its weights.

    Args:
        model: changed in place.
        weights: "imagenet" (torchvision's IMAGENET1K_V1), "imagenet_features" (its
            IMAGENET1K_FEATURES), "random" (keeps the He initialisation), or a file.
        normalization: "imagenet" or "imagenet_features", for a file that does not say.

    Raises:
        UserError: no such file or download, a file of another network, an unknown normalisation.
    """
    if weights == "random":
        _normalize_like(model, "imagenet")
        return
    if weights in TORCHVISION and model.chosen["backbone"] != {"name": "vgg16"}:
        raise UserError(f"model.weights={weights} is of VGG-16: give a file, or random")
    if weights in TORCHVISION:
        tensors, about = _renamed(_download(weights)), {"weights": TORCHVISION[weights].name}
    else:
        tensors, about = _read(Path(weights))
    _load(model, {key: v for key, v in tensors.items() if key.startswith("backbone.")}, weights)
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
    tensors, about = _read(Path(path))
    weight, bias = tensors.get("head.weight"), tensors.get("head.bias")
    if weight is None or bias is None or weight.ndim != 2 or len(weight) != len(bias):
        found = "none" if weight is None else f"one of shape {tuple(weight.shape)}"
        raise UserError(
            f"{path} holds no bilinear CNN: expected a classifier of shape (classes, width), "
            f"found {found}; features alone go to model.weights={path}"
        )
    names = about.get("classes") or classes or [str(k) for k in range(len(bias))]
    if len(names) != len(bias):
        raise UserError(
            f"{path} was trained on {len(bias)} classes, the images have {len(names)}: "
            "train stage=last on these images first"
        )
    try:
        model = build({**DEFAULT, "framing": {}, **about, "classes": names})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"what {path} says of its network cannot be understood ({error})") from error
    if model.pooling.width != weight.shape[1]:
        raise UserError(
            f"{path} holds no bilinear CNN: expected a classifier of shape (classes, "
            f"{model.pooling.width}), found one of shape {tuple(weight.shape)}"
        )
    _load(model, tensors, path)
    _set_normalization(model, tensors, about, normalization, path)
    return model.eval()


def save_model(model: BCNN, path: str | Path) -> None:
    """Write the model to a file that `load_model` opens.

    Args:
        path: `.safetensors` holds the whole model, with its description as metadata; `.pth` is a state
            dict for the original's network (`to_original`), without the classes' names.
    """
    if Path(path).suffix == ".safetensors":
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, path, describe(model) | {"bcnn": json.dumps(model.description())})
    else:
        torch.save(to_original(model), path)


def describe(model: BCNN) -> dict[str, str]:
    """What a user of the weights has to know, for files whose metadata are strings.

    `classes` is a JSON list in the order of the logits; `size` in pixels, `resize` and `crop_pct` are
    those of its framing, and `preprocessing` says in words what they ask for.
    """
    framing = model.framing
    size, side = framing.size, framing.side
    resized = f"short side to {side} px" if framing.resize == "keep" else f"to {side} × {side} px"
    return {
        "classes": json.dumps(model.classes),
        **{name: str(value) for name, value in asdict(framing).items()},
        "preprocessing": f"upright (EXIF), RGB, resized {resized} (bilinear, antialiased), centre crop "
        f"of {size} × {size} px, uint8 in 0..255; the model normalises",
    }


def _load(model: BCNN, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Take over the tensors of the model's names; those of the backbone have to be there."""
    own = model.state_dict()
    wrong = [
        name
        for name, tensor in own.items()
        if (name.startswith("backbone.") and name not in NORMALIZATION and name not in tensors)
        or (name in tensors and tensors[name].shape != tensor.shape)
    ]
    if wrong:
        raise UserError(
            f"{source} does not hold the features of {model.chosen['backbone']['name']}: "
            f"{wrong[0]} is missing, or of another shape"
        )
    model.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)


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
    said = " ".join(str(value) for value in about.values())
    named = [
        key
        for key, enum in TORCHVISION.items()
        if enum.name in said or _file_name(enum) == Path(source).name
    ]
    choice = normalization or (named[0] if named else None)
    if choice not in TORCHVISION:
        raise UserError(
            f"{source} does not say how its images were normalised, as imagenet (mean 0.485…, std "
            "0.229…) or as imagenet_features (mean 0.482…, std 1/255): tell train.py by "
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
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"no such file of weights: {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return _understood(tensors, file.metadata() or {}, path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes lead the unpickler into whatever there is
        raise UserError(
            f"{path} is not a readable file of weights: it is damaged, or holds more than tensors"
        ) from error
    tensors = _state_dict(content)
    if not tensors:
        raise UserError(f"{path} is not a state dict: expected tensors by name")
    return _understood(tensors, content.get("hyper_parameters", {}), path)


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The tensors by name in what a file holds, without what wrappers put before every name.

    Lightning keeps them under "state_dict", other loops under "model" or the like; DataParallel puts
    "module." before the names, and a module that holds the network, "model.".
    """
    if not isinstance(content, dict):
        return {}
    if not all(isinstance(key, str) and torch.is_tensor(value) for key, value in content.items()):
        wrapped = map(content.get, ("state_dict", "model_state_dict", "model", "net"))
        return next(filter(None, map(_state_dict, wrapped)), {})
    for prefix in ("module.", "model."):
        inside = {key.removeprefix(prefix): v for key, v in content.items() if key.startswith(prefix)}
        if inside:  # beside the network, a module may hold the weights of a loss
            return _state_dict(inside)
    return dict(content)


def _understood(
    tensors: dict[str, Tensor], metadata: dict[str, Any], path: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under today's names, and what the file says of itself as `BCNN.description` does."""
    about = dict(metadata)
    if "bcnn" in metadata:
        about = json.loads(metadata["bcnn"])
    elif {"classes", "size"} <= metadata.keys():  # of before, where all of it was flat
        classes, split = (metadata.get(name) for name in ("classes", "split"))
        size, crop_pct = int(metadata["size"]), float(metadata.get("crop_pct", 1.0))
        about["framing"] = asdict(Framing(size, metadata.get("resize", "keep"), crop_pct))
        about["classes"] = json.loads(classes) if isinstance(classes, str) else classes
        about["split"] = json.loads(split) if isinstance(split, str) else split
    if is_original(tensors):
        tensors, said = from_original(tensors, path)
        about = {**said, **about}
    return _renamed(tensors), about


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of before as today's."""
    return {
        next((new + key[len(old) :] for old, new in RENAMED.items() if key.startswith(old)), key): value
        for key, value in tensors.items()
    }
