"""What the page of `bcnn demo` shows of a photograph: classes, evidence, the nearest photographs."""

import io
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bcnn.data.formats import FORMATS, open_image
from bcnn.data.image_io import decode, load_image
from bcnn.evaluation.heatmap import overlay, scaled
from bcnn.evaluation.inference import refuse_overflow, see
from bcnn.evaluation.neighbours import nearest, rows
from bcnn.evaluation.report import THUMBNAIL, template, thumbnail
from bcnn.models.attribution import shares
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.errors import UserError
from bcnn.utils.progress import progress

CLASSES = 6  # shown, each with a picture
NEAREST = 6
SIDE = 640  # px of a picture, the long side


class Gallery:
    """Photographs to look up the nearest of, in the space of descriptors.

    Args:
        model: on any device.
        samples: (path, label) of the photographs.
        batches: of (images, labels), in the same order.

    Raises:
        UserError: their rows do not fit into memory, or are not finite.
    """

    def __init__(
        self,
        model: BCNN,
        samples: Sequence[tuple[str, int]],
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        width = model.pooling.width
        self.samples = samples
        try:
            self.rows = torch.empty(len(samples), width, dtype=torch.float16)
        except RuntimeError as error:
            size = f"{len(samples)} photographs, {2e-9 * len(samples) * width:.0f} GB"
            raise UserError(f"no memory for the rows of {size}: name a folder of fewer") from error
        done = 0
        with progress("computing descriptors", len(samples)) as task:
            for found in rows(model, batches):
                refuse_overflow(found, [path for path, _ in samples[done : done + len(found)]])
                self.rows[done : done + len(found)] = found
                done += len(found)
                task.advance(len(found))

    def nearest(self, row: Tensor, count: int) -> list[tuple[str, int, float]]:
        """Path, label and distance of the nearest photographs, the nearest first.

        Args:
            row: (width,), of unit length: distances go from 0, the same, to √2, nothing shared.
            count: how many, at most all.
        """
        distances, places = nearest(row[None].cpu().float(), self.rows.split(64), count)
        found = zip(places[0].tolist(), distances[0].tolist(), strict=True)
        return [(*self.samples[index], distance) for index, distance in found]


class Answers:
    """Looks at photographs, one at a time: it has the memory and the cores.

    Args:
        model: as `load_model` returns it, on any device.
        gallery: of the photographs that the model was trained on.
    """

    def __init__(self, model: BCNN, gallery: Gallery | None = None) -> None:
        self.model = model
        self.gallery = gallery
        self._lock = threading.Lock()

    def page(self, name: str, nonce: str, megabytes: int) -> str:
        """The page that shows answers, as HTML.

        Args:
            name: of the model.
            nonce: that styles and scripts are to bear.
            megabytes: that a photograph may have.
        """
        return template("demo.html").render(
            name=name,
            nonce=nonce,
            megabytes=megabytes,
            classes=len(self.model.classes),
            size=self.model.preprocessing.size,
            photographs=len(self.gallery.samples) if self.gallery else 0,
        )

    def answer(self, content: bytes) -> dict[str, Any]:
        """What to show of a photograph, in plain values, pictures being data URIs.

        Args:
            content: of its file.

        Raises:
            UserError: it cannot be decoded, or the network's answer is not finite.
        """
        with self._lock:
            return self._answer(_decoded(content, self.model.preprocessing.side))

    def stop(self) -> None:
        """Wait for what is under way, and begin no other: torch must not be left midway."""
        self._lock.acquire()

    def _answer(self, photograph: Image.Image) -> dict[str, Any]:
        seen = see(self.model, photograph)
        top = seen.probabilities.topk(min(CLASSES, len(self.model.classes)))
        labels = top.indices.to(seen.logits.device)
        maps = torch.cat([shares(self.model, seen.maps, label[None]) for label in labels]).cpu()
        # What spoke for the likeliest class; then for it and not for each of the others.
        maps = torch.cat([maps[:1], maps[:1] - maps[1:]])
        logits = maps.sum(dim=(1, 2))
        refuse_overflow(torch.cat([seen.probabilities, logits])[None], ["the photograph"])
        crop = [edge / side for edge, side in zip(seen.crop, photograph.size * 2, strict=True)]
        width = photograph.width
        photograph.thumbnail((SIDE, SIDE))
        box = scaled(seen.box, photograph.width / width)
        pictures = [
            overlay(photograph, box, shared, float(abs(shared).max()) or 1.0) for shared in maps.numpy()
        ]
        return {
            "photograph": thumbnail(photograph, SIDE),
            "ratio": photograph.width / photograph.height,
            "crop": crop,
            "classes": [
                {
                    "name": self.model.classes[label],
                    "probability": probability,
                    "logits": logit,
                    "picture": thumbnail(picture, SIDE),
                }
                for label, probability, logit, picture in zip(
                    top.indices.tolist(), top.values.tolist(), logits.tolist(), pictures, strict=True
                )
            ],
            "nearest": self._nearest(seen.row[0]) if self.gallery else [],
        }

    def _nearest(self, row: Tensor) -> list[dict[str, Any]]:
        assert self.gallery
        return [
            {
                "name": self.model.classes[label],
                "file": Path(path).name,
                "apart": distance,
                "picture": thumbnail(load_image(path, THUMBNAIL)),
            }
            for path, label, distance in self.gallery.nearest(row, NEAREST)
        ]


def _decoded(content: bytes, side: int) -> Image.Image:
    """Raises UserError, which names the kinds of files that are opened."""
    try:
        with open_image(io.BytesIO(content)) as file:
            return decode(file, side)
    except Exception as error:  # decoders raise whatever the bytes lead them into
        kinds = ", ".join(sorted(FORMATS & {*Image.OPEN}))
        raise UserError(f"cannot read this file ({error}): choose a photograph ({kinds})") from error
