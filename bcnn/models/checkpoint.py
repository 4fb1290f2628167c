"""Files of whole models: load and save. No file runs code when it is opened."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.description import build, is_description, understanding
from bcnn.models.state_dict import load_state, read_state_dict, validate_state
from bcnn.models.third_party import from_original, is_original, to_original
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, checkpoint_of

COVERAGES = (0.8, 0.9, 0.95, 0.99)  # of the prediction sets whose thresholds metadata holds


def load_model(
    path: str | Path, classes: list[str] | None = None, normalization: str | None = None
) -> BCNN:
    """Load a model, on the CPU and in evaluation mode.

    Args:
        path: a checkpoint, the folder of a run, hf://user/name on the Hugging Face Hub, or a state dict
            of the original or of HaoMood's bilinear-cnn.
        classes: names for the classes of a state dict of theirs; by default "0", "1", ….
        normalization: of a state dict of theirs, "imagenet" (the default) or "imagenet_features".
    """
    path = checkpoint_of(path)
    tensors, about = read_state_dict(path)
    if is_original(tensors):
        tensors, about = from_original(tensors, path, classes, normalization)
    elif not is_description(about):
        raise UserError(f"{path} does not describe a bilinear CNN: features alone go to model.weights")
    # No memory before the whole network is known to be in the file.
    with understanding(path), torch.device("meta"):
        expected = build(about).state_dict()
    validate_state(expected, tensors, path)
    model = build(about)
    load_state(model, tensors, path)
    model.assumed = about.get("assumed", "")
    return model.eval()


def save_model(model: BCNN, path: str | Path) -> None:
    """Save the model to a file that `load_model` loads.

    `.safetensors` holds the whole model, with its description as metadata; `.pth` is a state dict for
    the original's network (see `to_original`), without the names of the classes.
    """
    with atomic_write(Path(path)) as part:
        if part.suffix == ".safetensors":
            state = {key: value.contiguous() for key, value in model.state_dict().items()}
            metadata = describe(model) | {"bcnn": json.dumps(model.description())}
            part.write_bytes(save(state, metadata))  # `save_file` makes it readable by its owner alone
        else:
            content = io.BytesIO()  # torch's own writing to a full disk ends the process
            torch.save(to_original(model), content)
            part.write_bytes(content.getbuffer())


def describe(model: BCNN) -> dict[str, str]:
    """Return metadata of strings: classes as a JSON list, preprocessing as fields and in words.

    A calibrated model adds its temperature and, by coverage, the thresholds of prediction sets.
    """
    preprocessing = model.preprocessing
    size, side = preprocessing.size, preprocessing.side
    multiples = f"multiples of {preprocessing.divisor} px from {preprocessing.min_size} px up"
    resized = {
        "keep": f"short side to {side} px",
        "squash": f"to {side} × {side} px",
        "whole": f"to an area of {size} × {size} px at its aspect, sides being {multiples}",
    }[preprocessing.resize]
    crop = "" if preprocessing.resize == "whole" else f", centre crop of {size} × {size} px"
    calibration: dict[str, str] = {}
    if model.calibration:
        thresholds = {coverage: model.calibration.threshold(coverage) for coverage in COVERAGES}
        calibration["thresholds"] = json.dumps(thresholds)
        calibration["temperature"] = str(float(model.calibration.temperature))
    return {
        **calibration,
        "classes": json.dumps(model.classes),
        **{name: str(value) for name, value in asdict(preprocessing).items()},
        "preprocessing": f"upright (EXIF), RGB, resized {resized} ({preprocessing.interpolation}, "
        f"antialiased){crop}, uint8 in 0..255; the model normalises",
    }
