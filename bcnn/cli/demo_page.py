"""What the page of `bcnn demo` shows of an image: classes, evidence, the nearest training images."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bcnn.data.image_io import decode, load_image, open_image
from bcnn.evaluation.explain import see
from bcnn.evaluation.heatmap import overlay, scaled
from bcnn.evaluation.inference import validate_finite
from bcnn.evaluation.neighbours import descriptors, nearest
from bcnn.evaluation.report import THUMBNAIL, template, thumbnail
from bcnn.models.attribution import shares
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.console import progress
from bcnn.utils.errors import UserError

CLASSES = 6  # shown, each with a picture
NEAREST = 6
SIDE = 640  # px of a picture, the long side
PIXELS = 50e6  # of an image; a JPEG, which is decoded at a fraction of its size, may have more


class Gallery:
    """Images to look up the nearest of, in the space of descriptors.

    Args:
        model: in evaluation mode, on any device.
        samples: (path, label) of the images.
        batches: of (images, labels), in the same order.

    Raises:
        UserError: an image's descriptor is not finite.
    """

    def __init__(
        self,
        model: BCNN,
        samples: Sequence[tuple[str, int]],
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        self.samples = samples
        self.descriptors: list[Tensor] = []
        done = 0
        with progress("computing descriptors", len(samples)) as task:
            for found in descriptors(model, batches):
                validate_finite(found, [path for path, _ in samples[done : done + len(found)]])
                self.descriptors.append(found.half().cpu())
                done += len(found)
                task.advance(len(found))

    def nearest(self, descriptor: Tensor, count: int) -> list[tuple[str, int, float]]:
        """Return path, label and distance of the nearest images, the nearest first.

        Args:
            descriptor: (width,), of unit length: distances go from 0, the same, to √2, nothing shared.
            count: at most all.
        """
        distances, indices = nearest(descriptor[None].cpu().float(), self.descriptors, count)
        found = zip(indices[0].tolist(), distances[0].tolist(), strict=True)
        return [(*self.samples[index], distance) for index, distance in found]


def render(model: BCNN, gallery: Gallery | None, **shown: object) -> str:
    """Return the page of a model as HTML.

    Args:
        model: in evaluation mode, on any device.
        gallery: to look up the nearest images in.
        shown: name, nonce (of style and script) and megabytes (of an image, at most).
    """
    classes, size = len(model.classes), model.preprocessing.size
    images = len(gallery.samples) if gallery else 0
    return template("demo.html").render(classes=classes, size=size, images=images, **shown)


def answer(model: BCNN, gallery: Gallery | None, content: bytes) -> dict[str, Any]:
    """Return what the page shows of an image, in plain values; pictures are data URIs.

    Args:
        model, gallery: as for `render`.
        content: of the image file.

    Raises:
        UserError: the file cannot be decoded, or the network's answer is not finite.
    """
    image = _decoded(content, model.preprocessing.side)
    seen = see(model, image)
    top = seen.probabilities.topk(min(CLASSES, len(model.classes)))
    labels = top.indices.to(seen.logits.device)
    maps = torch.cat([shares(model, seen.maps, label[None]) for label in labels]).cpu()
    # What speaks for the likeliest class; then for it and against each of the others.
    maps = torch.cat([maps[:1], maps[:1] - maps[1:]])
    logits = maps.sum(dim=(1, 2))
    validate_finite(torch.cat([seen.probabilities, logits])[None], ["the image"])
    crop = [edge / side for edge, side in zip(seen.crop, image.size * 2, strict=True)]
    width = image.width
    image.thumbnail((SIDE, SIDE))
    box = scaled(seen.box, image.width / width)
    classes = [
        {
            "name": model.classes[label],
            "probability": probability,
            "logits": float(evidence.sum()),
            "picture": thumbnail(overlay(image, box, evidence, abs(evidence).max() or 1.0), SIDE),
        }
        for label, probability, evidence in zip(
            top.indices.tolist(), top.values.tolist(), maps.numpy(), strict=True
        )
    ]
    neighbours = [
        {
            "name": model.classes[label],
            "file": Path(path).name,
            "distance": distance,
            "picture": thumbnail(load_image(path, THUMBNAIL)),
        }
        for path, label, distance in (gallery.nearest(seen.descriptor[0], NEAREST) if gallery else [])
    ]
    picture, ratio = thumbnail(image, SIDE), image.width / image.height
    return {"image": picture, "ratio": ratio, "crop": crop, "classes": classes, "nearest": neighbours}


def _decoded(content: bytes, side: int) -> Image.Image:
    """Decode an image file at least at `side`.

    Raises:
        UserError: it is no image, damaged, or has too many pixels.
    """
    try:
        with open_image(io.BytesIO(content)) as file:
            if file.format not in ("JPEG", "MPO") and file.width * file.height > PIXELS:
                raise ValueError(f"it has more than {PIXELS / 1e6:.0f} megapixels")
            return decode(file, side)
    except Exception as error:  # decoders raise whatever the bytes lead them into
        raise UserError(f"cannot read this file: {error}; choose another image") from error
