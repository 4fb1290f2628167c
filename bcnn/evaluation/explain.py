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
from bcnn.evaluation.inference import Output, output_of
from bcnn.evaluation.predictions import Predictions
from bcnn.models.attribution import shares
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.console import track
from bcnn.utils.device import autocast

SIDE = 640  # px of a panel, the image's long side


@dataclass(frozen=True)
class Seen:
    """An image as the network sees it."""

    image: Image.Image  # upright, RGB
    maps: Tensor  # (1, channels, h, w), of the backbone
    descriptor: Tensor  # (1, width), of unit length
    logits: Tensor  # (classes,)
    output: Output  # of a batch of this image
    crop: Box  # what the network sees, in pixels of the image
    box: Box  # what the locations cover, each a square of a stride around its middle

    @property
    def probabilities(self) -> Tensor:
        """(classes,), in float32, on the CPU; nan where a logit is not finite."""
        return self.output.probabilities[0]

    @property
    def unlike_training(self) -> bool | None:
        """Whether the image is unlike the training images; None if the model is not calibrated."""
        novelty = self.output.novelty
        return None if novelty is None else bool(novelty[0] > 0)

    def drawn(self, side: int, shares: Tensor | None = None, limit: float = 1.0) -> Image.Image:
        """Return the image with its crop framed, under shares (h, w); its long side has `side` px."""
        scale = side / max(self.image.size)
        width, height = (max(1, round(edge * scale)) for edge in self.image.size)
        image = self.image.resize((width, height), Image.Resampling.LANCZOS)
        if shares is not None:
            image = overlay(image, scaled(self.box, scale), shares.numpy(), limit)
        return framed(image, scaled(self.crop, scale))


@dataclass(frozen=True)
class Explanation(Seen):
    """Attribution of a class on one image."""

    target: int  # label of the class explained
    against: int  # label of the class that it is compared with
    evidence: Tensor  # (h, w), shares of the target's logit; see `bcnn.models.attribution`
    contrast: Tensor  # (h, w), shares of the target's logit less the other's


@torch.no_grad()
def see(model: BCNN, image: Image.Image) -> Seen:
    """Pass an upright RGB image through the network, in the fastest precision of the model's device."""
    device = model.head.bias.device
    with autocast(device):
        x = model.preprocessing.evaluation()(image)[None].to(device)
        maps = model.backbone(x)
        descriptor = model.pooling(maps)
        logits = model.head(descriptor)
    left, top, right, bottom = crop = model.preprocessing.crop(*image.size)
    # Where the locations begin and end in the network's input, and its pixels in those of the image.
    stride = model.backbone.stride
    start = model.backbone.offset - stride / 2
    height, width = (start + stride * count for count in maps.shape[2:])
    down, across = (bottom - top) / x.shape[2], (right - left) / x.shape[3]
    box = left + across * start, top + down * start, left + across * width, top + down * height
    output = output_of(model, logits, descriptor)
    return Seen(image, maps, descriptor, logits[0], output, crop, box)


def explain(
    model: BCNN, image: Image.Image, target: int | None = None, against: int | None = None
) -> Explanation:
    """Return the attribution of class `target`, also against another; default: the most probable."""
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
    """Draw both attribution maps beside the image, under its name and its most probable classes."""
    top = explanation.probabilities.topk(min(3, len(classes)))
    likeliest = ", ".join(f"{classes[k]} {share:.1%}" for share, k in zip(*top, strict=True))
    likeliest += "; unlike the training images" if explanation.unlike_training else ""
    target, against = classes[explanation.target], f"rather than {classes[explanation.against]}: "
    crop = explanation.drawn(SIDE)
    figure = Figure(figsize=(crop.width / 50 + 1.5, crop.height / 150 + 1.2), layout="constrained")
    figure.suptitle(printable_lines(f"{name}\n{likeliest}"), fontsize=11, parse_math=False)
    axes = figure.subplots(1, 3)
    axes[0].imshow(crop)
    axes[0].set_title("input", fontsize=10)
    maps = (explanation.evidence, explanation.contrast)
    for panel, words, values in zip(axes[1:], ("", against), maps, strict=True):
        limit = float(values.abs().max()) or 1.0
        panel.imshow(explanation.drawn(SIDE, values, limit))
        title = printable_lines(f"{target}\n{words}{values.sum():+.2f} logits")
        panel.set_title(title, fontsize=10, parse_math=False)
        scale = ScalarMappable(Normalize(-limit, limit), COLOURS)
        figure.colorbar(scale, ax=panel, label="logits per location", shrink=0.9, format="%+.2g")
    for panel in axes:
        panel.set_axis_off()
    return figure


def explain_mistakes(
    model: BCNN, predictions: Predictions, mistakes: Sequence[int], side: int
) -> dict[int, tuple[Image.Image, Image.Image]]:
    """Draw the attributions of the predicted and of the true class, in one colour scale per image."""
    pictures = {}
    for index in track(mistakes, "explaining mistakes"):
        image = load_image(predictions.paths[index], model.preprocessing.side)
        predicted, truth = int(predictions.predicted[index]), int(predictions.labels[index])
        found = explain(model, image, predicted, against=truth)
        wrong, right = found.evidence, found.evidence - found.contrast
        limit = float(torch.stack([wrong, right]).abs().max()) or 1.0
        pictures[index] = (found.drawn(side, wrong, limit), found.drawn(side, right, limit))
    return pictures
