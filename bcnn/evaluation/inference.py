"""What a trained model makes of photographs: their likeliest classes, and what spoke for them."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bcnn.data.image_io import load_image
from bcnn.data.transforms import Preprocessing
from bcnn.evaluation.heatmap import Box, evidence_figure
from bcnn.evaluation.predictions import Predictions
from bcnn.evaluation.writers import Prediction
from bcnn.models.attribution import shares
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.utils.device import autocast, fastest_precision
from bcnn.utils.environment import default_workers
from bcnn.utils.errors import UserError
from bcnn.utils.progress import progress
from bcnn.utils.terminal import say


def open_model(path: Path, classes: list[str] | None = None) -> BCNN:
    """As `load_model`; says on standard error what the file leaves open."""
    model = load_model(path, classes)
    if model.assumed:
        say(f"warning: {model.assumed}", file=sys.stderr)
    return model


@torch.no_grad()
def probabilities(
    model: BCNN, inputs: Tensor, precision: str | None = None, mirror: bool = False
) -> Tensor:
    """Class probabilities of images or stored rows: the one place where a trained model sees any.

    Args:
        model: on any device.
        inputs: images as a backbone takes them, or rows (batch, width).
        precision: Lightning's name; None: the fastest of the model's device.
        mirror: take the mean of the logits of an image and of its mirror image. As the head is linear,
            they are those of the two's mean row.

    Returns:
        (batch, classes), in float32, on the CPU; nan where logits are not finite.
    """
    device = _device(model)
    with autocast(device, precision):
        x = inputs.to(device)
        logits: Tensor = model.head(x) if x.ndim == 2 else model(x)
        if mirror:
            logits = (logits + model(x.flip(-1))) / 2
    return _softmax(logits).cpu()


OVERFLOW = (
    "the network's answer has values that are not finite numbers: its weights are damaged, or too "
    "large for the precision of this device"
)


def refuse_overflow(outputs: Tensor, paths: Sequence[str]) -> None:
    """Raises UserError, naming the first path whose row of (images, numbers) is not finite."""
    finite = outputs.isfinite().all(dim=1)
    if not finite.all():
        raise UserError(f"{paths[int(finite.int().argmin())]}: {OVERFLOW}")


def predict_paths(
    model: BCNN,
    paths: Sequence[str],
    top: int = 5,
    batch: int | None = None,
    workers: int | None = None,
    mirror: bool = False,
) -> Iterator[Prediction]:
    """Predictions of photographs in their order, in the fastest precision of the model's device.

    Holds a few batches at a time, however long the list is.

    Args:
        model: as `load_model` returns it, on any device.
        top: number of classes a photograph, at most all.
        batch: photographs that pass the network together; None: as many as is fastest.
        workers: processes that decode; None: see `default_workers`.
        mirror: see `probabilities`.
    """
    if workers is None:
        workers = default_workers()
    if batch is None:
        # A CPU in float32 takes longer for maps of many at once, whose memory it gets page by page.
        kind = _device(model).type
        batch = 2 if kind == "cpu" and fastest_precision(kind) == "32-true" else 16
    loader = DataLoader(
        _Photographs(paths, model.preprocessing),
        batch_size=batch,
        num_workers=workers if len(paths) > batch else 0,
        collate_fn=_collate,
        pin_memory=_device(model).type == "cuda",
    )
    for names, errors, images in loader:
        if images is not None:
            said = probabilities(model, images, mirror=mirror)
            likeliest = said.topk(min(top, len(model.classes)))
            found = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        for path, error in zip(names, errors, strict=True):
            if error:
                yield Prediction(path, error=error)
            else:
                indices, values = next(found)
                if all(map(math.isfinite, values)):
                    yield Prediction(path, [model.classes[k] for k in indices], values)
                else:
                    yield Prediction(path, error=OVERFLOW)


def predict_split(
    model: BCNN,
    samples: Sequence[tuple[str, int]],
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: str | None = None,
    mirror: bool = False,
) -> Predictions:
    """The model's class probabilities for labelled images, with a progress bar.

    Args:
        model: on any device; left in evaluation mode.
        samples: (path, label) of the images, in the order of `batches`.
        batches: of (inputs, labels); inputs are images, or stored rows, which skip the backbone.
        precision: Lightning's name; None: the fastest of the device.
        mirror: of images, see `probabilities`.

    Raises:
        UserError: the model's answer to an image is not finite.
    """
    model.eval()
    parts = []
    with progress("predicting", len(samples)) as task:
        for inputs, _ in batches:
            parts.append(probabilities(model, inputs, precision, mirror))
            task.advance(len(inputs))
    paths, labels = zip(*samples, strict=True)
    found = torch.cat(parts)
    refuse_overflow(found, paths)
    return Predictions(model.classes, list(paths), torch.tensor(labels), found)


@dataclass(frozen=True)
class Seen:
    """A photograph as the network sees it.

    Args:
        maps: (1, channels, h, w), of the backbone.
        row: (1, width), the descriptor, of unit length.
        logits: (classes,).
        crop: what the network saw of the photograph, in its pixels.
        box: what the maps cover: the crop, but for the pixels that its size has over whole locations.
    """

    maps: Tensor
    row: Tensor
    logits: Tensor
    crop: Box
    box: Box

    @property
    def probabilities(self) -> Tensor:
        """(classes,), in float32, on the CPU; nan where logits are not finite."""
        return _softmax(self.logits).cpu()


@torch.no_grad()
def see(model: BCNN, photograph: Image.Image) -> Seen:
    """Pass a photograph through the network, in the fastest precision of the model's device.

    Args:
        model: as `load_model` returns it, on any device.
        photograph: upright, RGB, as `load_image` returns it.
    """
    device = _device(model)
    with autocast(device):
        maps = model.backbone(model.preprocessing.evaluation()(photograph)[None].to(device))
        row = model.pooling(maps)
        logits = model.head(row)[0]
    left, top, right, bottom = crop = model.preprocessing.crop(*photograph.size)
    stride, size = model.backbone.stride, model.preprocessing.size
    across, down = (stride * count / size for count in (maps.shape[3], maps.shape[2]))
    box = (left, top, left + (right - left) * across, top + (bottom - top) * down)
    return Seen(maps, row, logits, crop, box)


@dataclass(frozen=True)
class Explanation:
    """What spoke for a class on one photograph.

    Args:
        photograph: upright, RGB.
        probabilities: (classes,).
        target: the class explained.
        against: the class that it is compared with.
        evidence: (h, w), shares of the target's logit; see `bcnn.models.attribution`.
        contrast: (h, w), shares of the target's logit less the other's.
        crop, box: of `Seen`.
    """

    photograph: Image.Image
    probabilities: Tensor
    target: int
    against: int
    evidence: Tensor
    contrast: Tensor
    crop: Box
    box: Box


def explain(
    model: BCNN, photograph: Image.Image, target: int | None = None, against: int | None = None
) -> Explanation:
    """Explain the answer to a photograph, in the fastest precision of the model's device.

    Args:
        model, photograph: as for `see`.
        target: the class to explain; None: the likeliest that is not `against`.
        against: the class to compare it with; None: the likeliest other one.
    """
    seen = see(model, photograph)
    likeliest = seen.logits.argsort(descending=True).tolist()
    if target is None:
        target = next(label for label in likeliest if label != against)
    if against is None:
        against = next(label for label in likeliest if label != target)
    this, that = (torch.tensor([label], device=_device(model)) for label in (target, against))
    return Explanation(
        photograph=photograph,
        probabilities=seen.probabilities,
        target=target,
        against=against,
        evidence=shares(model, seen.maps, this)[0].cpu(),
        contrast=shares(model, seen.maps, this, that)[0].cpu(),
        crop=seen.crop,
        box=seen.box,
    )


def draw(explanation: Explanation, classes: list[str], name: str) -> Figure:
    """The figure of an explanation; `name` stands over it, with the likeliest classes."""
    this, that = classes[explanation.target], classes[explanation.against]
    top = explanation.probabilities.topk(min(3, len(classes)))
    likeliest = ", ".join(
        f"{classes[label]} {share:.1%}"
        for label, share in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
    maps = [
        (f"for {this}\n{explanation.evidence.sum():+.2f} logits", explanation.evidence.numpy()),
        (
            f"for {this},\nagainst {that}: {explanation.contrast.sum():+.2f} logits",
            explanation.contrast.numpy(),
        ),
    ]
    return evidence_figure(
        explanation.photograph, explanation.crop, explanation.box, f"{name}\n{likeliest}", maps
    )


def _softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, in float32; nan where any logit overflowed, of whatever sign."""
    return logits.float().nan_to_num(math.nan, math.nan, math.nan).softmax(dim=-1)


def _device(model: BCNN) -> torch.device:
    return model.head.bias.device


class _Photographs(Dataset[tuple[str, str, Tensor | None]]):
    """(path, error, image): a photograph that cannot be read has an error and no image."""

    def __init__(self, paths: Sequence[str], preprocessing: Preprocessing) -> None:
        self.paths = paths
        self.transform = preprocessing.evaluation()
        self.side = preprocessing.side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, str, Tensor | None]:
        path = self.paths[index]
        try:
            return path, "", self.transform(load_image(path, self.side)).as_subclass(Tensor)
        except Exception as error:  # whatever a decoder raises, the other photographs go on
            return path, str(error) or repr(error), None


def _collate(
    items: list[tuple[str, str, Tensor | None]],
) -> tuple[list[str], list[str], Tensor | None]:
    """Images that could be read as one tensor (batch, 3, size, size); None if there are none."""
    images = [image for _, _, image in items if image is not None]
    names, errors = [name for name, _, _ in items], [error for _, error, _ in items]
    return names, errors, torch.stack(images) if images else None
