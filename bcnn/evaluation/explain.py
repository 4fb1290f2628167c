"""Attribution of an image: which locations add to the logit of a class, and how that is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from bcnn.data.image_io import load_image
from bcnn.evaluation.heatmap import COLOURS, Box, framed, overlay, printable_lines, scaled
from bcnn.evaluation.predictions import Predictions, softmax
from bcnn.models.attribution import shares
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.console import track
from bcnn.utils.device import autocast

SIDE = 640  # px of a panel, the image's long side


@dataclass(frozen=True)
class Seen:
    """An image as the network sees it.

    Args:
        image: upright, RGB.
        maps: (1, channels, h, w), of the backbone.
        descriptor: (1, width), of unit length.
        logits: (classes,).
        crop: part of the image that the network sees, in its pixels.
        box: part that the maps cover: the crop without the pixels beyond the last whole location.
    """

    image: Image.Image
    maps: Tensor
    descriptor: Tensor
    logits: Tensor
    crop: Box
    box: Box

    @property
    def probabilities(self) -> Tensor:
        """(classes,), in float32, on the CPU; nan where a logit is not finite."""
        return softmax(self.logits)

    def drawn(self, side: int, shares: Tensor | None = None, limit: float = 1.0) -> Image.Image:
        """Return the image with the crop framed, its long side at `side` pixels.

        Args:
            shares: (h, w) to lay over it, the full colour at `limit`; see `overlay`.
        """
        scale = side / max(self.image.size)
        width, height = (max(1, round(edge * scale)) for edge in self.image.size)
        image = self.image.resize((width, height), Image.Resampling.LANCZOS)
        if shares is not None:
            image = overlay(image, scaled(self.box, scale), shares.numpy(), limit)
        return framed(image, scaled(self.crop, scale))


@dataclass(frozen=True)
class Explanation(Seen):
    """Attribution of a class on one image.

    Args:
        target: label of the class explained.
        against: label of the class that it is compared with.
        evidence: (h, w), shares of the target's logit; see `bcnn.models.attribution`.
        contrast: (h, w), shares of the target's logit less the other's.
    """

    target: int
    against: int
    evidence: Tensor
    contrast: Tensor


@torch.no_grad()
def see(model: BCNN, image: Image.Image) -> Seen:
    """Pass an upright RGB image through the network, in the fastest precision of the model's device."""
    device = model.head.bias.device
    with autocast(device):
        maps = model.backbone(model.preprocessing.evaluation()(image)[None].to(device))
        descriptor = model.pooling(maps)
        logits = model.head(descriptor)[0]
    left, top, right, bottom = crop = model.preprocessing.crop(*image.size)
    stride, size = model.backbone.stride, model.preprocessing.size
    across, down = (stride * count / size for count in (maps.shape[3], maps.shape[2]))
    box = (left, top, left + (right - left) * across, top + (bottom - top) * down)
    return Seen(image, maps, descriptor, logits, crop, box)


def explain(
    model: BCNN, image: Image.Image, target: int | None = None, against: int | None = None
) -> Explanation:
    """Return the attribution of a class on an image; see `see`.

    Args:
        target: label to explain; None: the most probable class that is not `against`.
        against: label to compare it with; None: the most probable other class.
    """
    seen = see(model, image)
    likeliest = seen.logits.argsort(descending=True).tolist()
    if target is None:
        target = next(label for label in likeliest if label != against)
    if against is None:
        against = next(label for label in likeliest if label != target)
    one, other = torch.tensor([[target], [against]], device=seen.logits.device)
    evidence = shares(model, seen.maps, one)[0].cpu()
    contrast = shares(model, seen.maps, one, other)[0].cpu()
    return Explanation(
        **vars(seen), target=target, against=against, evidence=evidence, contrast=contrast
    )


def draw(explanation: Explanation, classes: list[str], name: str) -> Figure:
    """Draw the image with the network's crop framed, and both attribution maps beside it.

    The title is the name of the image, above its most probable classes.
    """
    found, top = explanation, explanation.probabilities.topk(min(3, len(classes)))
    likeliest = ", ".join(f"{classes[k]} {share:.1%}" for share, k in zip(*top, strict=True))
    target, against = classes[found.target], classes[found.against]
    maps = [
        (f"{target}\n{found.evidence.sum():+.2f} logits", found.evidence),
        (f"{target}\nrather than {against}: {found.contrast.sum():+.2f} logits", found.contrast),
    ]
    crop = found.drawn(SIDE)
    figure = Figure(figsize=(crop.width / 50 + 1.5, crop.height / 150 + 1.2), layout="constrained")
    figure.suptitle(printable_lines(f"{name}\n{likeliest}"), fontsize=11, parse_math=False)
    axes = figure.subplots(1, 3)
    axes[0].imshow(crop)
    axes[0].set_title("input crop", fontsize=10)
    for panel, (title, values) in zip(axes[1:], maps, strict=True):
        limit = float(values.abs().max()) or 1.0
        panel.imshow(found.drawn(SIDE, values, limit))
        panel.set_title(printable_lines(title), fontsize=10, parse_math=False)
        scale = ScalarMappable(Normalize(-limit, limit), COLOURS)
        figure.colorbar(scale, ax=panel, label="logits per location", shrink=0.9, format="%+.2g")
    for panel in axes:
        panel.set_axis_off()
    return figure


def explain_mistakes(
    model: BCNN, predictions: Predictions, mistakes: Sequence[int], side: int
) -> dict[int, tuple[Image.Image, Image.Image]]:
    """Draw the attributions of the predicted and of the true class, on one colour scale per image.

    Args:
        mistakes: indices of the misclassified images to draw, which are the keys of the result.
        side: the long side of the pictures in pixels.
    """
    pictures = {}
    for index in track(mistakes, "explaining mistakes"):
        image = load_image(predictions.paths[index], model.preprocessing.side)
        predicted, truth = int(predictions.predicted[index]), int(predictions.labels[index])
        found = explain(model, image, predicted, against=truth)
        wrong, right = found.evidence, found.evidence - found.contrast
        limit = float(torch.stack([wrong, right]).abs().max()) or 1.0
        pictures[index] = (found.drawn(side, wrong, limit), found.drawn(side, right, limit))
    return pictures
