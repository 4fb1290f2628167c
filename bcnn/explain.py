"""Which places of a photograph spoke for the answer, and why it is this class and not that."""

import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from bcnn.data.decoding import load_image
from bcnn.data.paths import find_images
from bcnn.errors import UserError
from bcnn.model.evidence import shares
from bcnn.model.network import BCNN
from bcnn.model.weights import load_model
from bcnn.options import command
from bcnn.precision import AUTOCAST, fastest_precision
from bcnn.report.heatmap import Box, evidence_figure

USAGE = """
Which places of photographs spoke for the answer: a figure each, as PNG.

python -m bcnn.explain ckpt=FILE PATH ... [OPTION=VALUE ...]

  ckpt=FILE             a checkpoint of this project's, or a .pth / .safetensors state dict
  PATH                  a file; a folder, searched to the bottom; a pattern in quotes ("**/*.jpg");
                        - for a list on standard input, a file a line
  target=CLASS          the class to explain; default: the likeliest
  against=CLASS         the class that it is compared with; default: the likeliest other one
  output=explanations   a folder; figures that it holds already are kept

Left the photograph, with the crop that the network saw; then what each place added to the logit of
the class (orange) or took from it (purple); then the same for the difference to the other class. The
places add up to the number over the map, exactly.
"""


@dataclass
class Options:
    """See the usage."""

    ckpt: Path
    paths: list[str] = field(default_factory=list)
    target: str = ""
    against: str = ""
    output: Path = Path("explanations")


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
    device = model.head.bias.device
    dtype = AUTOCAST.get(fastest_precision(device.type))
    images = model.framing.evaluation()(photograph)[None].to(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        maps = model.backbone(images)
        logits = model.head(model.pooling(maps))[0]
    likeliest = logits.argsort(descending=True).tolist()
    target = likeliest[0] if target is None else target
    if against is None:
        against = next(label for label in likeliest if label != target)
    this, that = (torch.tensor([label], device=device) for label in (target, against))
    left, top, right, bottom = crop = model.framing.crop(*photograph.size)
    stride, size = model.backbone.stride, model.framing.size
    across, down = (stride * count / size for count in (maps.shape[3], maps.shape[2]))
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


def main(options: Options) -> int:
    """Draw a figure for every photograph that can be read."""
    paths = find_images(options.paths)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(options.ckpt).to(device)
    target, against = (_label(model, getattr(options, side), side) for side in ("target", "against"))
    if target is not None and target == against:
        raise UserError(f"against={options.against}: choose another class than target")
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    console = Console(stderr=True)
    for path in track(paths, "explaining", console=console, transient=True):
        try:
            photograph = load_image(path, model.framing.side)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        explanation = explain(model, photograph, target, against)
        figure = folder / _free_name(folder, Path(path).stem)
        draw(explanation, model.classes, Path(path).name).savefig(figure, dpi=150)
        print(f"{path}: {_answer(explanation, model.classes)}: {figure}")
    if failed:
        print(f"{failed} of {len(paths)} photographs could not be read", file=sys.stderr)
    return int(failed > 0)


def _label(model: BCNN, name: str, option: str) -> int | None:
    if len(model.classes) < 2:
        raise UserError(f"the model knows one class only ({model.classes[0]}): nothing to explain")
    if not name:
        return None
    if name not in model.classes:
        near = get_close_matches(name, model.classes, cutoff=0) or model.classes[:3]
        raise UserError(f"{option}={name}: no such class; did you mean {' or '.join(near)}?")
    return model.classes.index(name)


def _answer(explanation: Explanation, classes: list[str]) -> str:
    this, that = (
        f"{classes[label]} {explanation.probabilities[label]:.1%}"
        for label in (explanation.target, explanation.against)
    )
    return f"{this} against {that}"


def _free_name(folder: Path, stem: str) -> str:
    """`stem.png`, or the first of `stem-2.png`, `stem-3.png`, … that is not there yet."""
    number, name = 1, f"{stem}.png"
    while (folder / name).exists():
        number += 1
        name = f"{stem}-{number}.png"
    return name


if __name__ == "__main__":
    sys.exit(command(Options, main, USAGE))
