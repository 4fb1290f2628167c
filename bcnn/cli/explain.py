"""Which places of a photograph spoke for the answer, and why it is this class and not that."""

import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from bcnn.data.paths import find_images
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, new_output, refuse_unwritable
from bcnn.utils.options import command
from bcnn.utils.progress import progress, track
from bcnn.utils.terminal import say

if TYPE_CHECKING:
    from bcnn.evaluation.inference import Explanation
    from bcnn.models.bilinear_cnn import BCNN

USAGE = """
Which places of photographs spoke for the answer: a figure each, as PNG.

python -m bcnn.cli.explain ckpt=FILE PATH ... [OPTION=VALUE ...]

  ckpt=FILE             a checkpoint of this project's, or a .pth / .safetensors state dict
  PATH                  a file; a folder, searched to the bottom; a pattern in quotes ("**/*.jpg");
                        - for a list on standard input, a file a line
  target=CLASS          the class to explain; default: the likeliest, but for against
  against=CLASS         the class that it is compared with; default: the likeliest other one
  output=FOLDER         default: a new folder under outputs/; figures that it holds already are kept

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
    output: Path | None = None


def main(options: Options) -> int:
    """Draw a figure for every photograph that can be explained."""
    paths = find_images(options.paths)
    folder = options.output or new_output("explain")
    refuse_unwritable(folder)
    with progress("loading PyTorch"):  # takes seconds that --help and mistakes need not wait for
        from bcnn.data.image_io import load_image
        from bcnn.evaluation.inference import draw, explain, open_model, refuse_overflow
        from bcnn.utils.device import best_device

    model = open_model(options.ckpt).to(best_device())
    target, against = (_label(model, getattr(options, side), side) for side in ("target", "against"))
    if target is not None and target == against:
        raise UserError(f"against={options.against}: choose another class than target")
    failed = 0
    for path in track(paths, "explaining"):
        try:
            explanation = explain(model, load_image(path, model.preprocessing.side), target, against)
            for numbers in (explanation.probabilities, explanation.evidence, explanation.contrast):
                refuse_overflow(numbers.reshape(1, -1), [path])
        except UserError as error:
            say(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        figure = folder / _free_name(folder, Path(path).stem)
        with atomic_write(figure) as part:
            draw(explanation, model.classes, Path(path).name).savefig(part, dpi=150)
        say(f"{path}: {_answer(explanation, model.classes)}: {figure}")
    if failed:
        print(f"{failed} of {len(paths)} photographs could not be explained", file=sys.stderr)
    return int(failed > 0)


def _label(model: "BCNN", name: str, option: str) -> int | None:
    if len(model.classes) < 2:
        raise UserError(f"the model knows one class only ({model.classes[0]}): nothing to explain")
    if not name:
        return None
    if name not in model.classes:
        near = get_close_matches(name, model.classes, cutoff=0) or model.classes[:3]
        raise UserError(f"{option}={name}: no such class; did you mean {' or '.join(near)}?")
    return model.classes.index(name)


def _answer(explanation: "Explanation", classes: list[str]) -> str:
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
