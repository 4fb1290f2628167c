"""`bcnn explain`: which locations of an image speak for its class, and against another."""

from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from bcnn.cli.arguments import Checkpoint, Images, OutputFolder
from bcnn.utils.console import console, error_console, logger, printable, progress, track
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, new_output

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
    with progress("loading PyTorch"):
        from bcnn.data.image_files import find_images
        from bcnn.data.image_io import load_image
        from bcnn.evaluation import explain as attribution
        from bcnn.evaluation.inference import open_model, validate_finite
        from bcnn.utils.device import best_device

    paths, folder = find_images(images), output or new_output("explain")
    model = open_model(ckpt).to(best_device())
    if target and target == versus:
        raise UserError(f"--versus {versus}: choose another class than --target")
    labels = [name if name is None else _class_index(name, model.classes) for name in (target, versus)]
    failed = 0
    for path in track(paths, "explaining"):
        try:
            image = load_image(path, model.preprocessing.side)
            found = attribution.explain(model, image, *labels)
            for numbers in (found.probabilities, found.evidence, found.contrast):
                validate_finite(numbers.reshape(1, -1), [path])
        except UserError as error:  # the other images are explained all the same
            logger.error(error)
            failed += 1
            continue
        figure, suffixes = folder / f"{Path(path).stem}.png", count(2)
        while figure.exists():
            figure = folder / f"{Path(path).stem}-{next(suffixes)}.png"
        with atomic_write(figure) as part:
            attribution.draw(found, model.classes, Path(path).name).savefig(part, dpi=150)
        this, that = model.classes[found.target], model.classes[found.against]
        unlike = "unlike the training images; " * bool(found.unlike_training)
        console.print(printable(f"{path}: {unlike}{this} versus {that}: {figure}"))
    error_console.print(f"{len(paths)} images, of which {failed} failed")
    return int(failed > 0)


def _class_index(name: str, classes: list[str]) -> int:
    """Return the index of a class. Raises a UserError that names similar classes, or all."""
    from bcnn.data.image_files import listed

    if name in classes:
        return classes.index(name)
    near = get_close_matches(name, classes)
    known = f"there are {listed(classes)}"
    raise UserError(f"no class {name}: {f'did you mean {listed(near)}?' if near else known}")
