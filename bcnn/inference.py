"""What a trained model makes of photographs: their likeliest classes, and what spoke for them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bcnn.data.transforms import evaluation_crop, load_image
from bcnn.model.evidence import shares
from bcnn.model.network import BCNN
from bcnn.model.pooling.bilinear import bilinear_descriptor
from bcnn.precision import AUTOCAST, fastest_precision
from bcnn.report.heatmap import Box, evidence_figure
from bcnn.report.predictions import Predictions
from bcnn.report.rows import Prediction

CELL = 16  # px of the crop to a location of relu5_3


def predict_paths(
    model: BCNN, paths: Sequence[str], top: int = 5, batch: int = 16, workers: int | None = None
) -> Iterator[Prediction]:
    """Predictions of photographs in their order, in the fastest precision of the model's device.

    Holds a few batches at a time, however long the list is.

    Args:
        model: as `load_model` returns it, on any device.
        top: number of classes a photograph, at most all.
        batch: photographs that pass the network together.
        workers: processes that decode; None: one a core, 8 at most.
    """
    if workers is None:
        workers = min(8, os.cpu_count() or 1)
    device = model.mean.device
    dtype = AUTOCAST.get(fastest_precision(device.type))
    loader = DataLoader(
        _Photographs(paths, model.transforms(), model.resized_side),
        batch_size=batch,
        num_workers=workers if len(paths) > batch else 0,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    for names, errors, images in loader:
        if images is not None:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                probabilities = model.predict(images)
            likeliest = probabilities.topk(min(top, len(model.classes)))
            found = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        for path, error in zip(names, errors, strict=True):
            if error:
                yield Prediction(path, error=error)
            else:
                indices, values = next(found)
                yield Prediction(path, [model.classes[k] for k in indices], values)


@torch.no_grad()
def predict_split(
    model: BCNN,
    samples: Sequence[tuple[str, int]],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    precision: str,
) -> Predictions:
    """The model's class probabilities for labelled images, with a progress bar.

    Args:
        model: moved to `device`, and left there in evaluation mode.
        samples: (path, label) of the images, in the order of `batches`.
        batches: of (inputs, labels); inputs are images, or descriptors (batch, 131328) that
            skip the features.
        precision: Lightning's name, as `fastest_precision` returns it.
    """
    model.to(device).eval()
    dtype = AUTOCAST.get(precision)

    def probabilities(inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model.logits(inputs) if inputs.ndim == 2 else model(inputs)
        return logits.float().softmax(dim=1).cpu()

    shown = track(batches, "predicting", console=Console(stderr=True), transient=True)
    parts = [probabilities(inputs.to(device)) for inputs, _ in shown]
    paths, labels = zip(*samples, strict=True)
    return Predictions(model.classes, list(paths), torch.tensor(labels), torch.cat(parts))


@dataclass(frozen=True)
class Explanation:
    """What spoke for a class on one photograph.

    Args:
        photograph: upright, RGB.
        probabilities: (classes,).
        target: the class explained.
        against: the class that it is compared with.
        evidence: (h, w), shares of the target's logit; see `bcnn.model.evidence`.
        contrast: (h, w), shares of the target's logit less the other's.
        crop: what the network saw of the photograph, in its pixels.
        box: what the shares cover: the crop, but for the pixels that its size has over whole locations.
    """

    photograph: Image.Image
    probabilities: Tensor
    target: int
    against: int
    evidence: Tensor
    contrast: Tensor
    crop: Box
    box: Box


@torch.no_grad()
def explain(
    model: BCNN, photograph: Image.Image, target: int | None = None, against: int | None = None
) -> Explanation:
    """Explain the answer to a photograph, in the fastest precision of the model's device.

    Args:
        model: as `load_model` returns it, on any device.
        photograph: upright, RGB, as `load_image` returns it.
        target: the class to explain; None: the likeliest.
        against: the class to compare it with; None: the likeliest other one.
    """
    device = model.mean.device
    dtype = AUTOCAST.get(fastest_precision(device.type))
    images = model.transforms()(photograph)[None].to(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        maps = model.feature_maps(images)
        logits = model.logits(bilinear_descriptor(maps, model.root))[0]
    likeliest = logits.argsort(descending=True).tolist()
    target = likeliest[0] if target is None else target
    if against is None:
        against = next(label for label in likeliest if label != target)
    this, that = (torch.tensor([label], device=device) for label in (target, against))
    left, top, right, bottom = crop = evaluation_crop(*photograph.size, model.resize, model.crop_pct)
    across, down = (CELL * count / model.size for count in (maps.shape[3], maps.shape[2]))
    return Explanation(
        photograph=photograph,
        probabilities=logits.softmax(dim=0).cpu(),
        target=target,
        against=against,
        evidence=shares(model, maps, this)[0].cpu(),
        contrast=shares(model, maps, this, that)[0].cpu(),
        crop=crop,
        box=(left, top, left + (right - left) * across, top + (bottom - top) * down),
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


class _Photographs(Dataset[tuple[str, str, Tensor | None]]):
    """(path, error, image): a photograph that cannot be read has an error and no image."""

    def __init__(
        self, paths: Sequence[str], transform: Callable[[Image.Image], Tensor], side: int
    ) -> None:
        self.paths = paths
        self.transform = transform
        self.side = side

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
