"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

CHECKPOINT = typer.Argument(
    metavar="CKPT",
    exists=True,
    dir_okay=False,
    help="Checkpoint of this project, or a .pth or .safetensors state dict.",
)
Checkpoint = Annotated[Path, CHECKPOINT]

IMAGES = typer.Argument(
    metavar="IMAGES...",
    help="Files, folders, quoted patterns such as '**/*.jpg', or - for a list on standard input.",
)
Images = Annotated[list[str], IMAGES]

LABELLED = typer.Argument(
    metavar="IMAGES", exists=True, help="Image folder as for training, or list of path,label[,split]."
)
LabelledImages = Annotated[Path, LABELLED]

Mirror = Annotated[
    bool, typer.Option("--mirror", help="Average each image with its mirror image, in twice the time.")
]
OutputFolder = Annotated[
    Path | None, typer.Option("--output", file_okay=False, help="Default: a new folder in outputs/.")
]
