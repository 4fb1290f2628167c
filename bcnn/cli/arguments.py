"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from bcnn.utils.errors import UserError
from bcnn.utils.files import checkpoint_of

STATE_DICT = "Checkpoint, folder of a run, .pth or .safetensors state dict, or hf://user/name."


def _checkpoint(text: str) -> Path:
    from bcnn.data.image_files import is_image  # imports Pillow

    path = checkpoint_of(text)
    if is_image(str(path)):
        raise UserError(f"{path} is an image: name the checkpoint first, then the images")
    path.stat()  # raises OSError now, not once PyTorch is loaded
    return path


CHECKPOINT = typer.Argument(metavar="CKPT", parser=_checkpoint, help=STATE_DICT)
Checkpoint = Annotated[Path, CHECKPOINT]

PATHS = (
    "Files, folders, lists (.csv, .parquet), quoted patterns like '**/*.jpg', URLs of these, or - for "
    "standard input."
)
Images = Annotated[list[str], typer.Argument(metavar="IMAGES", help=PATHS)]

LABELS = "Image folder as for training, or list of path,label[,split]; a header line may add group."
LabelledImages = Annotated[Path, typer.Argument(metavar="IMAGES", exists=True, help=LABELS)]

GROUP = "Regular expression: its first group, or its match, in a path names the image's group."
Group = Annotated[str | None, typer.Option("--group", metavar="REGEX", help=GROUP)]

MIRROR = "Average each image with its mirror image, in twice the time."
Mirror = Annotated[bool, typer.Option("--mirror", help=MIRROR)]

OUTPUT = typer.Option("--output", file_okay=False, help="Default: a new folder in outputs/.")
OutputFolder = Annotated[Path | None, OUTPUT]
