"""`bcnn explain`: which locations of an image speak for its class, and against another."""

from difflib import get_close_matches
from itertools import chain, count
from pathlib import Path
from typing import Annotated

import typer

from bcnn.cli.arguments import Checkpoint, Images, OutputFolder
from bcnn.utils.console import console, error_console, logger, printable, progress, track
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, new_output, validate_writable

TARGET = typer.Option(metavar="CLASS", help="Class to explain. Default: the likeliest.")
VERSUS = typer.Option(metavar="CLASS", help="Class to compare with. Default: the likeliest other one.")


def explain(
    ckpt: Checkpoint,
    images: Images,
    target: Annotated[str | None, TARGET] = None,
    versus: Annotated[str | None, VERSUS] = None,
    output: OutputFolder = None,
) -> int:
    """Draw which locations of images speak for a class, as a PNG each.

    Left: the image, with the crop that the network sees. Middle: what each location adds to the logit
    of the class (orange) or takes from it (purple). Right: the same for the difference to the other
    class. The locations sum to the number over each map.
    """
    from bcnn.data.image_files import find_images

    paths = find_images(images)
    folder = output or new_output("explain")
    validate_writable(folder)
    with progress("loading PyTorch"):
        from bcnn.data.image_io import load_image
        from bcnn.evaluation.explain import draw
        from bcnn.evaluation.explain import explain as explain_image
        from bcnn.evaluation.inference import open_model, validate_finite
        from bcnn.utils.device import best_device

    model = open_model(ckpt).to(best_device())
    for_class = _label(model.classes, target, "--target")
    against = _label(model.classes, versus, "--versus")
    if for_class is not None and for_class == against:
        raise UserError(f"--versus {versus}: choose another class than --target")
    failed = 0
    for path in track(paths, "explaining"):
        try:
            image = load_image(path, model.preprocessing.side)
            found = explain_image(model, image, for_class, against)
            for numbers in (found.probabilities, found.evidence, found.contrast):
                validate_finite(numbers.reshape(1, -1), [path])
        except UserError as error:  # the other images are explained all the same
            logger.error(error)
            failed += 1
            continue
        figure = _free_name(folder, Path(path).stem)
        with atomic_write(figure) as part:
            draw(found, model.classes, Path(path).name).savefig(part, dpi=150)
        this, that = (
            f"{model.classes[label]} {found.probabilities[label]:.1%}"
            for label in (found.target, found.against)
        )
        console.print(printable(f"{path}: {this} versus {that}: {figure}"))
    if failed:
        error_console.print(f"{failed} of {len(paths)} images could not be explained")
    return int(failed > 0)


def _label(classes: list[str], name: str | None, option: str) -> int | None:
    """Return the label of a class, or None where no class is given."""
    if len(classes) < 2:
        raise UserError(f"the model has one class ({classes[0]}): there is nothing to compare")
    if name is None:
        return None
    if name not in classes:
        near = get_close_matches(name, classes, cutoff=0)
        raise UserError(f"{option} {name}: no such class; did you mean {' or '.join(near)}?")
    return classes.index(name)


def _free_name(folder: Path, stem: str) -> Path:
    """Return `stem.png`, or the first of `stem-2.png`, `stem-3.png`, … that does not exist."""
    names = chain([f"{stem}.png"], (f"{stem}-{number}.png" for number in count(2)))
    return next(folder / name for name in names if not (folder / name).exists())
