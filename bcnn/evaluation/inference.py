"""Probabilities that a trained model gives to images: of files, or of a labelled split."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bcnn.data.image_io import load_image
from bcnn.data.transforms import Preprocessing
from bcnn.evaluation.predictions import Predictions, softmax
from bcnn.evaluation.writers import Prediction
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.utils.console import logger, progress
from bcnn.utils.device import autocast, fastest_precision
from bcnn.utils.environment import default_workers
from bcnn.utils.errors import UserError

NOT_FINITE = (
    "the network's answer has values that are not finite numbers: its weights are damaged, or too "
    "large for the precision of this device"
)


def open_model(path: Path, classes: list[str] | None = None) -> BCNN:
    """Load a model by `load_model`, with a warning about what its file leaves open."""
    model = load_model(path, classes)
    if model.assumed:
        logger.warning(model.assumed)
    return model


@torch.no_grad()
def probabilities(
    model: BCNN, inputs: Tensor, precision: str | None = None, mirror: bool = False
) -> Tensor:
    """Return class probabilities (batch, classes) by `softmax`, of images or stored descriptors.

    Args:
        inputs: images (batch, 3, height, width), or descriptors (batch, width).
        precision: Lightning's name; None: the fastest of the model's device.
        mirror: average the logits of each image and its mirror image.
    """
    device = model.head.bias.device
    with autocast(device, precision):
        x = inputs.to(device)
        logits = model.head(x) if x.ndim == 2 else model(x)
        if mirror:
            logits = (logits + model(x.flip(-1))) / 2
    return softmax(logits)


def validate_finite(outputs: Tensor, paths: Sequence[str]) -> None:
    """Raise UserError, naming the first image whose outputs (images, …) are not all finite."""
    finite = outputs.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        raise UserError(f"{paths[int(finite.int().argmin())]}: {NOT_FINITE}")


def predict_paths(
    model: BCNN,
    paths: Sequence[str],
    top: int = 5,
    batch: int | None = None,
    workers: int | None = None,
    mirror: bool = False,
) -> Iterator[Prediction]:
    """Yield the `top` classes of image files in their order, holding a few batches in memory at a time.

    An image that cannot be read yields a `Prediction` with an error, and the others follow. None for
    `batch` and `workers` is what suits the machine.
    """
    device = model.head.bias.device.type
    workers = default_workers() if workers is None else workers
    if batch is None:
        # Maps of many images slow down a CPU in float32, which allocates their memory page by page.
        batch = 2 if device == "cpu" and fastest_precision(device) == "32-true" else 16
    loader: DataLoader[str] = DataLoader(
        paths,  # type: ignore[arg-type]  # a sequence is a dataset
        batch_size=batch,
        collate_fn=partial(_load, model.preprocessing),
        num_workers=workers if len(paths) > batch else 0,
        pin_memory=device == "cuda",
    )
    for names, errors, images in loader:
        found = probabilities(model, images, mirror=mirror).topk(min(top, len(model.classes)))
        for path, error, shares, labels in zip(names, errors, *map(Tensor.tolist, found), strict=True):
            if error or math.isnan(shares[0]):
                yield Prediction(path, error=error or NOT_FINITE)
            else:
                names = [model.classes[label] for label in labels]
                yield Prediction(path, list(zip(names, shares, strict=True)))


def predict_split(
    model: BCNN,
    samples: Sequence[tuple[str, int]],
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: str | None = None,
    mirror: bool = False,
) -> Predictions:
    """Return the class probabilities of labelled images; the model is left in evaluation mode.

    Samples are (path, label), in the order of the batches (inputs, labels); see `probabilities`.
    """
    model.eval()
    parts = []
    with progress("predicting", len(samples)) as task:
        for inputs, _ in batches:
            parts.append(probabilities(model, inputs, precision, mirror))
            task.advance(len(inputs))
    paths, labels = zip(*samples, strict=True)
    found = torch.cat(parts)
    validate_finite(found, paths)
    return Predictions(model.classes, list(paths), torch.tensor(labels), found)


def _load(preprocessing: Preprocessing, paths: list[str]) -> tuple[list[str], list[str], Tensor]:
    """Return paths, errors and images; one that cannot be read has an error, and is black."""
    transform, errors, images = preprocessing.evaluation(), [""] * len(paths), []
    for index, path in enumerate(paths):
        try:
            images.append(transform(load_image(path, preprocessing.side)).as_subclass(Tensor))
        except Exception as error:  # decoders raise anything, and one file must not stop the others
            errors[index] = str(error) or repr(error)
            images.append(torch.zeros(3, preprocessing.size, preprocessing.size, dtype=torch.uint8))
    return paths, errors, torch.stack(images)
