"""A trained model in a file for other programs: the command."""

import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from bcnn.data.paths import find_images
from bcnn.utils.errors import UserError
from bcnn.utils.files import PART, atomic_write, refuse_unwritable
from bcnn.utils.options import command
from bcnn.utils.progress import progress
from bcnn.utils.terminal import say

USAGE = """
A trained model in a file for other programs, compared with PyTorch before you use it.

python -m bcnn.cli.export ckpt=FILE [OPTION=VALUE ...] [PATH ...]

  ckpt=FILE       a checkpoint of this project's, or a .pth / .safetensors state dict
  format=onnx     onnx         for ONNX Runtime and its like, any batch size
                  pt2          torch.export's program, any batch size: runs without this project
                  pth          state dict for the two-script original: its key names, 262,144 wide
                  safetensors  the model, its classes and preprocessing: for bcnn.load_model
  output=FILE     default: beside the checkpoint, under its name
  softmax=false   true: probabilities in place of logits (onnx, pt2)
  PATH ...        photographs to compare both on: files, folders, patterns, - for a list on standard
                  input; none: random images

ONNX and pt2 take uint8 RGB images (batch, 3, size, size) and normalise them inside. Class names and
preprocessing are in the metadata of all but pth: classes, size, resize, crop_pct, interpolation,
preprocessing.
"""


@dataclass
class Options:
    """See the usage."""

    ckpt: Path
    format: str = "onnx"
    output: Path | None = None
    softmax: bool = False
    paths: list[str] = field(default_factory=list)


def main(options: Options) -> int:
    """Write the file, open it again, and compare the two: only a file that agrees gets its name."""
    with progress("loading PyTorch"):  # takes seconds that --help need not wait for
        from bcnn.evaluation.inference import open_model
        from bcnn.models.export import FORMATS, TOLERANCE, compare, comparison_images, network

    if options.format not in FORMATS:
        raise UserError(f"format={options.format}: choose from {', '.join(FORMATS)}")
    write, read = FORMATS[options.format]
    path = _output(options)
    photographs = find_images(options.paths) if options.paths else []
    model = open_model(options.ckpt)
    with (
        atomic_write(path) as part,  # which is what `written` becomes once it agrees
        tempfile.TemporaryDirectory(prefix=PART, dir=path.parent) as scratch,
    ):
        written = Path(scratch) / path.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters', about their own insides
            write(model, written, options.softmax)
        ours, theirs = network(model, options.softmax), read(written)
        difference, largest = compare(ours, theirs, comparison_images(model, photographs))
        if not difference <= TOLERANCE * largest:
            raise UserError(
                f"{path} would not compute what {options.ckpt} does (they differ by {difference:.1e}, "
                f"outputs are up to {largest:.3g}): not kept"
            )
        if _weights(written).exists():
            with atomic_write(_weights(path)) as other:
                _weights(written).replace(other)
        written.replace(part)
    what = f"{len(photographs)} photographs" if photographs else "random images"
    outputs = "probabilities" if options.softmax else "logits"
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(model.classes)} classes")
    print(f"largest difference to PyTorch on {what}: {difference:.1e} ({outputs} up to {largest:.3g})")
    return 0


def _output(options: Options) -> Path:
    suffix = f".{options.format}"
    path = options.output or options.ckpt.with_suffix(suffix)
    if path.suffix != suffix:
        raise UserError(f"output={path}: with format={options.format} its name has to end in {suffix}")
    for file in (path, _weights(path)):
        if file.exists():
            raise UserError(f"{file} exists: remove it, or name another file with output=…")
    refuse_unwritable(path.parent)
    return path


def _weights(path: Path) -> Path:
    """Where an ONNX file above 2 GB has its weights."""
    return path.with_name(f"{path.name}.data")


if __name__ == "__main__":
    sys.exit(command(Options, main, USAGE))
