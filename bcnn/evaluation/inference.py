"""Probabilities that a trained model gives to images: of files, or of a labelled split."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter, length_hint
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bcnn.data.batches import Images, stack_images
from bcnn.data.image_io import load_image
from bcnn.data.transforms import Preprocessing
from bcnn.evaluation.answers import answer
from bcnn.evaluation.predictions import COVERAGE, Predictions
from bcnn.evaluation.writers import Prediction
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.calibration import prediction_sets
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


class Output(NamedTuple):
    """What a model makes of a batch of images, in float32 on the CPU."""

    probabilities: Tensor  # (batch, classes); nan where a logit is not finite
    novelty: Tensor | None  # (batch,), see `Calibration.novelty`; None: not calibrated
    logits: Tensor  # (batch, classes)

    def image(self, index: int) -> "Output":
        """Return the output for one image, as a batch."""
        row = slice(index, index + 1)
        novelty = None if self.novelty is None else self.novelty[row]
        return Output(self.probabilities[row], novelty, self.logits[row])


@torch.no_grad()
def infer(model: BCNN, inputs: Images, precision: str | None = None, mirror: bool = False) -> Output:
    """Return what a model makes of images, or of stored descriptors.

    Args:
        inputs: images (batch, 3, height, width), or descriptors (batch, width).
        precision: Lightning's name; None: the fastest of the model's device.
        mirror: average the descriptors of each image and its mirror image, and so their logits.
    """
    device = model.head.bias.device
    with autocast(device, precision):
        x = inputs.to(device)
        descriptors = x if isinstance(x, Tensor) and x.ndim == 2 else model.descriptor(x)
        if mirror:
            descriptors = (descriptors + model.descriptor(x.flip(-1))) / 2
        logits = model.head(descriptors)
    return output_of(model, logits, descriptors)


def output_of(model: BCNN, logits: Tensor, descriptors: Tensor) -> Output:
    """Return the output for logits (batch, classes) and descriptors (batch, width)."""
    novelty = None
    if model.calibration:
        novelty = model.calibration.novelty(logits, descriptors).cpu()
    logits = logits.float()
    return Output(model.probabilities(logits).cpu(), novelty, logits.cpu())


def what_sets_promise(model: BCNN, coverage: float) -> str:
    """Return what a prediction set of this coverage can promise, in a sentence."""
    if not model.calibration:
        return "this model is not calibrated: no prediction sets, and images of no class are not marked"
    images = len(model.calibration.scores)
    largest = images / (images + 1)
    if coverage <= largest:
        return (
            f"the set holds the true class for {100 * coverage:g} % of the images, if these are like "
            f"the {images} held-out images that calibrated the model"
        )
    return (
        f"{images} held-out images calibrated the model, too few for --coverage {coverage:g}: all "
        f"classes are in the sets; use {math.floor(1000 * largest) / 1000:g} or less"
    )


def validate_finite(outputs: Tensor, paths: Sequence[str]) -> None:
    """Raise UserError, naming the first image whose outputs (images, …) are not all finite."""
    finite = outputs.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        raise UserError(f"{paths[int(finite.int().argmin())]}: {NOT_FINITE}")


def predict_paths(
    model: BCNN,
    paths: Iterable[str],
    top: int = 5,
    coverage: float = COVERAGE,
    batch: int | None = None,
    workers: int | None = None,
    mirror: bool = False,
    groups: Sequence[str] = (),
    sure: float | None = None,
) -> Iterator[Prediction]:
    """Yield the `top` classes of image files in their order, holding a few batches in memory at a time.

    The paths are read a few batches ahead of the predictions.

    A calibrated model adds the prediction set of a `coverage`, and whether the image is unlike the
    training images; a model with a taxonomy adds its `answer`. An image that cannot be read yields a
    `Prediction` with an error, and the others follow. None for `batch` and `workers` is what suits the
    machine.

    `groups` names the group of each image, those of a group being neighbours: a group has one answer,
    by the mean of its images' logits, and no prediction set, as single images calibrate these.
    """
    device = model.head.bias.device.type
    workers = default_workers() if workers is None else workers
    if batch is None:
        # Maps of many images slow down a CPU in float32, which allocates their memory page by page.
        batch = 2 if device == "cpu" and fastest_precision(device) == "32-true" else 16
    loader: DataLoader[str] = DataLoader(
        _Itself(),
        batch_size=batch,
        sampler=paths,  # read in this process, as far as it is needed
        collate_fn=partial(_load, model.preprocessing),
        num_workers=workers if length_hint(paths, batch + 1) > batch else 0,
        pin_memory=device == "cuda",
    )
    threshold = model.calibration.threshold(coverage) if model.calibration and not groups else None
    outputs = _outputs(model, loader, mirror)
    for name, error, output in _by_group(model, groups, outputs) if groups else outputs:
        if error or output.probabilities.isnan().any():
            yield Prediction(name, error=error or NOT_FINITE)
        else:
            yield _prediction(name, model, output, top, threshold, sure)


class _Itself(Dataset[str]):
    """The data set of all paths: each is its own index."""

    def __getitem__(self, path: str) -> str:
        return path


def _prediction(
    path: str, model: BCNN, output: Output, top: int, threshold: float | None, sure: float | None
) -> Prediction:
    """Return the prediction of an image from the output for a batch of it; no threshold: no set."""
    classes, taxonomy, members = model.classes, model.taxonomy, []
    shares, labels = output.probabilities[0].sort(descending=True, stable=True)
    pairs = [(classes[k], p) for p, k in zip(shares[:top].tolist(), labels[:top].tolist(), strict=True)]
    if threshold is not None:
        members = labels[: int(prediction_sets(output.probabilities, threshold).sum())].tolist()
    return Prediction(
        path,
        pairs,
        set=[classes[label] for label in members] or None,
        unlike_training=None if output.novelty is None else bool(output.novelty[0] > 0),
        answer=answer(output.probabilities[0], members, taxonomy, sure) if taxonomy else {},
    )


_Outputs = Iterator[tuple[str, str, Output]]  # path or group, error, and the output for a batch of it


def _outputs(model: BCNN, loader: DataLoader, mirror: bool) -> _Outputs:
    """Yield the output for each image in batches of `_load`."""
    for paths, errors, images in loader:
        batch = infer(model, images, mirror=mirror)
        for row, (path, error) in enumerate(zip(paths, errors, strict=True)):
            yield path, error, batch.image(row)


def _by_group(model: BCNN, groups: Sequence[str], images: _Outputs) -> _Outputs:
    """Yield the mean output of each group, and those of its images that have an error."""
    for group, members in groupby(zip(groups, images, strict=True), key=itemgetter(0)):
        known: list[Output] = []
        for _, (path, error, output) in members:
            if error or not output.logits.isfinite().all():
                yield path, error, output
            else:
                known.append(output)
        if known:
            logits = torch.cat([each.logits for each in known]).mean(dim=0, keepdim=True)
            scores = [each.novelty for each in known if each.novelty is not None]
            novelty = torch.cat(scores).mean(dim=0, keepdim=True) if scores else None
            shares = model.probabilities(logits.to(model.head.bias.device)).cpu()
            yield group, "", Output(shares, novelty, logits)


def predict_split(
    model: BCNN,
    samples: Sequence[tuple[str, int]],
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: str | None = None,
    mirror: bool = False,
) -> Predictions:
    """Return the predictions of labelled images; the model is left in evaluation mode.

    Samples are (path, label), in the order of the batches (inputs, labels); see `infer`.
    """
    model.eval()
    parts: list[Output] = []
    with progress("predicting", len(samples)) as task:
        for inputs, _ in batches:
            parts.append(infer(model, inputs, precision, mirror))
            task.advance(len(inputs))
    paths, labels = zip(*samples, strict=True)
    found = torch.cat([part.probabilities for part in parts])
    validate_finite(found, paths)
    sets = novelty = None
    if model.calibration:
        sets = prediction_sets(found, model.calibration.threshold(COVERAGE))
        novelty = torch.cat([part.novelty for part in parts if part.novelty is not None])
    known = model.classes, [*paths], torch.tensor(labels)
    return Predictions(*known, found, sets=sets, novelty=novelty)


def _load(preprocessing: Preprocessing, paths: list[str]) -> tuple[list[str], list[str], Images]:
    """Return paths, errors and images; one that cannot be read has an error, and is black."""
    transform, errors, images = preprocessing.evaluation(), [""] * len(paths), []
    for index, path in enumerate(paths):
        try:
            images.append(transform(load_image(path, preprocessing.side)).as_subclass(Tensor))
        except Exception as error:  # decoders raise anything, and one file must not stop the others
            errors[index] = str(error) or repr(error)
            images.append(transform(Image.new("RGB", (1, 1))).as_subclass(Tensor))
    return paths, errors, stack_images(images)
