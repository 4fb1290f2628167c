"""Every file of weights, in and out: nothing else in the project opens one.

Files are read without running code from them (`torch.load(weights_only=True)`, safetensors).
"""

import json
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import VGG16_Weights

from bcnn.data.splits import Split
from bcnn.errors import UserError
from bcnn.model.network import BCNN, CHANNELS
from bcnn.model.pooling.bilinear import pack, unpack

TORCHVISION = {
    "imagenet": VGG16_Weights.IMAGENET1K_V1,
    "imagenet_features": VGG16_Weights.IMAGENET1K_FEATURES,
}


# Names that others give to a classifier on the whole matrix, and the square root that they train it on.
WIDE = {"classifiers.0": "signed", "fc": "plain"}


def initialise_features(model: BCNN, weights: str, normalization: str | None = None) -> None:
    """Fill the features of a new model and set the normalisation that belongs to them.

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
    if weights in TORCHVISION:
        tensors, metadata = _download(weights), {"weights": TORCHVISION[weights].name}
    else:
        tensors, metadata = _read(Path(weights))
    _load_features(model, tensors, weights)
    _set_normalization(model, tensors, metadata, normalization, weights)


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
        normalization: as for `initialise_features`; files with the names of others mean "imagenet".

    Raises:
        UserError: the file is missing, unreadable, or does not hold a bilinear CNN.
    """
    tensors, metadata = _read(Path(path))
    for name, root in WIDE.items():
        if f"{name}.weight" in tensors and "centering.mean" not in tensors:
            tensors = _pack_classifier(tensors, name, path)  # they start from torchvision's V1
            metadata = {"weights": VGG16_Weights.IMAGENET1K_V1.name, "root": root, **metadata}
    weight, bias = tensors.get("classifier.weight"), tensors.get("classifier.bias")
    size = CHANNELS * (CHANNELS + 1) // 2
    if weight is None or bias is None or weight.shape != (len(bias), size):
        found = "no classifier" if weight is None else f"one of shape {tuple(weight.shape)}"
        raise UserError(
            f"{path} holds no bilinear CNN: expected a classifier of shape (classes, {size}), "
            f"found {found}; features alone go to model.weights={path}"
        )
    names = metadata.get("classes") or classes or [str(k) for k in range(len(bias))]
    if len(names) != len(bias):
        raise UserError(
            f"{path} was trained on {len(bias)} classes, the images have {len(names)}: "
            "train stage=last on these images first"
        )
    model = BCNN(
        names,
        metadata.get("size", 448),
        metadata.get("resize", "keep"),
        metadata.get("crop_pct", 1.0),
        Split.from_plain(metadata["split"]) if metadata.get("split") else None,
        metadata.get("root", "signed"),
    )
    _load_features(model, tensors, path)
    _set_normalization(model, tensors, metadata, normalization, path)
    model.centering.mean.copy_(tensors.get("centering.mean", torch.zeros(size)))
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(bias)
    return model.eval()


def save_model(model: BCNN, path: str | Path) -> None:
    """Write the model to a file that `load_model` opens.

    Args:
        path: `.safetensors` holds the whole model, its description (`describe`) as metadata; `.pth` is
            a state dict for the source's network (`source_state_dict`), without the classes' names.
    """
    if Path(path).suffix == ".safetensors":
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        record = {"split": json.dumps(model.split.plain())} if model.split else {}
        save_file(state, path, describe(model) | record)
    else:
        torch.save(source_state_dict(model), path)


def describe(model: BCNN) -> dict[str, str]:
    """What a user of the weights has to know, for files whose metadata are strings.

    `classes` is a JSON list in the order of the logits; `size` in pixels, `resize`, `crop_pct` and
    `root` are `BCNN`'s, and `preprocessing` says in words what they ask for.
    """
    size, side = model.size, model.resized_side
    resized = f"short side to {side} px" if model.resize == "keep" else f"to {side} × {side} px"
    return {
        "classes": json.dumps(model.classes),
        "size": str(size),
        "resize": model.resize,
        "crop_pct": str(model.crop_pct),
        "root": model.root,
        "preprocessing": f"upright (EXIF), RGB, resized {resized} (bilinear, antialiased), centre crop "
        f"of {size} × {size} px, uint8 in 0..255; the model normalises",
    }


def source_state_dict(model: BCNN) -> dict[str, Tensor]:
    """The model under the source's key names, its classifier in the 262,144-wide layout.

    The source normalises images as torchvision's IMAGENET1K_V1 does. For a model that wants them
    otherwise the first convolution makes up the difference, which is exact but at the outermost
    pixels: there it reads padding, which is zero under either.
    """
    state = {f"features.{key}": value for key, value in model.features.state_dict().items()}
    preset = VGG16_Weights.IMAGENET1K_V1.transforms()
    mean, std = (torch.tensor(v).to(model.mean).view(3, 1, 1) for v in (preset.mean, preset.std))
    first = state["features.0.weight"]
    shift = (first * (mean - model.mean) / model.std).sum((1, 2, 3))
    state["features.0.weight"] = first * (std / model.std)
    state["features.0.bias"] = state["features.0.bias"] + shift
    weight, bias = model.classifier.weight.detach(), model.classifier.bias.detach()
    state["classifiers.0.weight"] = unpack(weight).flatten(1)
    state["classifiers.0.bias"] = bias - weight @ model.centering.mean
    return state


def _pack_classifier(tensors: dict[str, Tensor], name: str, path: str | Path) -> dict[str, Tensor]:
    """The tensors with the classifier `name` on the whole matrix under this project's name, packed."""
    weight = tensors.pop(f"{name}.weight")
    if weight.ndim != 2 or weight.shape[1] != CHANNELS**2:
        raise UserError(
            f"{path}: {name}.weight has shape {tuple(weight.shape)}, expected "
            f"(classes, {CHANNELS**2}): it was trained with another pooling"
        )
    tensors["classifier.weight"] = pack(weight.float().view(-1, CHANNELS, CHANNELS))
    tensors["classifier.bias"] = tensors.pop(f"{name}.bias", torch.zeros(len(weight)))
    return tensors


def _load_features(model: BCNN, tensors: dict[str, Tensor], source: str | Path) -> None:
    prefix = "features."
    wanted = {
        key: tensors[prefix + key] for key in model.features.state_dict() if prefix + key in tensors
    }
    try:
        model.features.load_state_dict(wanted)
    except RuntimeError as error:
        raise UserError(
            f"{source} does not hold the features of VGG-16 (features.0.weight … features.28.bias)"
        ) from error


def _set_normalization(
    model: BCNN,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    normalization: str | None,
    source: str | Path,
) -> None:
    """Find the normalisation in the file (mean and std, or the name of torchvision's weights)."""
    if "mean" in tensors and "std" in tensors:
        model.mean.copy_(tensors["mean"])
        model.std.copy_(tensors["std"])
        return
    said = " ".join(str(value) for value in metadata.values())
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
    model.set_normalization(preset.mean, preset.std)


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
                return tensors, _parse(file.metadata() or {})
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes lead the unpickler into whatever there is
        raise UserError(
            f"{path} is not a readable file of weights: it is damaged, or holds more than tensors"
        ) from error
    metadata = content.get("hyper_parameters", {}) if isinstance(content, dict) else {}
    tensors = _state_dict(content)
    if not tensors:
        raise UserError(f"{path} is not a state dict: expected tensors by name")
    return tensors, dict(metadata)


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
        if content and all(key.startswith(prefix) for key in content):
            return _state_dict({key.removeprefix(prefix): v for key, v in content.items()})
    return dict(content)


def _parse(metadata: dict[str, str]) -> dict[str, Any]:
    """Undo `describe` where the metadata are its own."""
    if not {"classes", "size", "resize", "crop_pct"} <= metadata.keys():
        return dict(metadata)
    numbers = {"size": int(metadata["size"]), "crop_pct": float(metadata["crop_pct"])}
    split = {"split": json.loads(metadata["split"])} if "split" in metadata else {}
    return {**metadata, **numbers, **split, "classes": json.loads(metadata["classes"])}
