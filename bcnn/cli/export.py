"""`bcnn export`: a trained model as a file for other programs."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from bcnn.cli.arguments import Checkpoint
from bcnn.utils.console import console, progress, track
from bcnn.utils.errors import UserError
from bcnn.utils.files import validate_writable
from bcnn.utils.hub import is_cached

FORMAT = typer.Option(help="pth: a state dict with the original scripts' names (classifiers.0.weight).")
OUTPUT = typer.Option(
    dir_okay=False, help="New file. Default: beside the checkpoint; of hf:// in this folder."
)
SOFTMAX = typer.Option("--softmax", help="Output probabilities, not logits (onnx, pt2, pte).")
PRECISION = typer.Option(help="Of the convolutions of an ONNX file; int8 needs --images.")
IMAGES = typer.Option(help="Compare on these, not on random images; may be given several times.")


def export(
    ckpt: Checkpoint,
    format: Annotated[Literal["onnx", "pt2", "pte", "pth", "safetensors"], FORMAT] = "onnx",
    output: Annotated[Path | None, OUTPUT] = None,
    softmax: Annotated[bool, SOFTMAX] = False,
    precision: Annotated[Literal["float32", "float16", "int8"], PRECISION] = "float32",
    images: Annotated[list[str] | None, IMAGES] = None,
) -> None:
    """Write a model for other programs, and compare the file with PyTorch.

    onnx (ONNX Runtime and its like), pt2 (torch.export) and pte (ExecuTorch, one image at a time) take
    uint8 RGB images (batch, 3, height, width) and normalise them. safetensors is for bcnn.load_model.
    All but pte and pth hold class names and preprocessing as metadata.
    """
    if precision != "float32" and format != "onnx":
        raise UserError(f"--precision {precision} is for --format onnx")
    if precision == "int8" and not images:
        raise UserError("--precision int8 needs typical images: add --images IMAGES, a hundred or more")
    folder = Path() if is_cached(ckpt) else ckpt.parent
    path = output or folder / f"{ckpt.stem}.{format}"
    if path.suffix != f".{format}":
        raise UserError(f"--output {path}: its name has to end in .{format}")
    for file in (path, path.with_name(f"{path.name}.data")):  # ONNX's weights above 2 GB
        if file.exists():
            raise UserError(f"{file} exists: remove it, or name another file with --output")
    validate_writable(path.parent)
    with progress("loading PyTorch"):
        from bcnn.data.image_files import find_images
        from bcnn.evaluation.inference import open_model
        from bcnn.models.export import export_model

    paths = find_images(images) if images else []
    model = open_model(ckpt)
    path.parent.mkdir(parents=True, exist_ok=True)
    compared = partial(track, what="comparing", total=max(1, len(paths)))
    found = export_model(model, path, format, softmax, paths, compared, precision)
    what = f"{len(paths)} images" if paths else "random images"
    console.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(model.classes)} classes")
    console.print(
        f"largest difference to PyTorch on {what}: {found.difference:.1e} of {found.largest:.3g}; "
        f"{found.agreement:.1%} have the same likeliest class"
    )
