"""A trained model in a file for other programs, compared with PyTorch before you use it.

python -m bcnn.export ckpt=FILE [OPTION=VALUE ...] [PATH ...]

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
preprocessing are in the metadata of all but pth: classes, size, resize, crop_pct, preprocessing.
"""

import importlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bcnn.data.decoding import load_image
from bcnn.data.paths import find_images
from bcnn.errors import UserError
from bcnn.model.network import BCNN
from bcnn.model.weights import describe, load_model, save_model
from bcnn.options import command

OPSET = 20  # of ONNX; ONNX Runtime 1.17 (January 2024) and later run it
TOLERANCE = 1e-2  # of the largest output; rounding makes 1e-5, padding in `to_original` 2e-4

Network = Callable[[Tensor], Tensor]  # uint8 images → logits or probabilities


@dataclass
class Options:
    """See the module's docstring."""

    ckpt: Path
    format: str = "onnx"
    output: Path | None = None
    softmax: bool = False
    paths: list[str] = field(default_factory=list)


def main(options: Options) -> int:
    """Write the file, open it again, and compare the two: only a file that agrees gets its name."""
    if options.format not in FORMATS:
        raise UserError(f"format={options.format}: choose from {', '.join(FORMATS)}")
    write, read = FORMATS[options.format]
    path = _output(options)
    photographs = find_images(options.paths) if options.paths else []
    model = load_model(options.ckpt)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        written = Path(scratch) / path.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters', about their own insides
            write(model, written, options.softmax)
        network = _network(model, options.softmax)
        difference, largest = compare(network, read(written), _images(model, photographs))
        if not difference <= TOLERANCE * largest:
            raise UserError(
                f"{path} would not compute what {options.ckpt} does (they differ by {difference:.1e}, "
                f"outputs are up to {largest:.3g}): not kept"
            )
        for file in Path(scratch).iterdir():  # ONNX above 2 GB is more than one
            file.rename(path.parent / file.name)
    what = f"{len(photographs)} photographs" if photographs else "random images"
    outputs = "probabilities" if options.softmax else "logits"
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(model.classes)} classes")
    print(f"largest difference to PyTorch on {what}: {difference:.1e} ({outputs} up to {largest:.3g})")
    return 0


@torch.no_grad()
def compare(a: Network, b: Network, batches: Iterator[Tensor]) -> tuple[float, float]:
    """The largest difference between two networks' outputs, and the largest output."""
    pairs = [(a(images), b(images)) for images in batches]
    return (
        max(float((x - y).abs().max()) for x, y in pairs),
        max(float(x.abs().max()) for x, _ in pairs),
    )


def write_onnx(model: BCNN, path: Path, softmax: bool) -> None:
    """ONNX in float32 with a free batch size; input "images", output "logits" or "probabilities".

    Raises:
        UserError: the packages for it are not installed.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    optimizer = importlib.import_module("onnxscript.optimizer")
    passes = importlib.import_module("onnx_ir.passes.common")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    output = "probabilities" if softmax else "logits"
    program = torch.onnx.export(
        _exported(model, softmax),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=[output],
        verbose=False,
    )
    assert program is not None
    # The indices of the upper triangle follow from shapes alone: constants, above the usual size.
    optimizer.optimize(program.model, input_size_limit=2**24, output_size_limit=2**24)
    passes.ClearMetadataAndDocStringPass()(program.model)  # traces of the exporter, paths among them
    program.model.metadata_props.update(describe(model), output=output)
    program.save(path)


def read_onnx(path: Path) -> Network:
    """The network in an ONNX file, run by ONNX Runtime."""
    session = importlib.import_module("onnxruntime").InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_pt2(model: BCNN, path: Path, softmax: bool) -> None:
    """torch.export's file; its extra file metadata.json holds what `describe` says."""
    extra = {"metadata.json": json.dumps(describe(model))}
    torch.export.save(_exported(model, softmax), path, extra_files=extra)


def read_pt2(path: Path) -> Network:
    """The network in a file of torch.export's."""
    return torch.export.load(path).module()


def write_weights(model: BCNN, path: Path, softmax: bool) -> None:
    """A state dict, in the layout that the suffix of `path` names: see `save_model`.

    Raises:
        UserError: `softmax`, which weights cannot say.
    """
    if softmax:
        raise UserError("softmax=true is for format=onnx and format=pt2: a state dict holds no layers")
    save_model(model, path)


def read_weights(path: Path) -> Network:
    """The model that `load_model` makes of a state dict."""
    return load_model(path)


FORMATS: dict[str, tuple[Callable[[BCNN, Path, bool], None], Callable[[Path], Network]]] = {
    "onnx": (write_onnx, read_onnx),
    "pt2": (write_pt2, read_pt2),
    "pth": (write_weights, read_weights),
    "safetensors": (write_weights, read_weights),
}


def _output(options: Options) -> Path:
    suffix = f".{options.format}"
    path = options.output or options.ckpt.with_suffix(suffix)
    if path.suffix != suffix:
        raise UserError(f"output={path}: with format={options.format} its name has to end in {suffix}")
    if path.exists():
        raise UserError(f"{path} exists: remove it, or name another file with output=…")
    return path


def _network(model: BCNN, softmax: bool) -> nn.Module:
    return nn.Sequential(model, nn.Softmax(dim=1)) if softmax else model


def _exported(model: BCNN, softmax: bool) -> ExportedProgram:
    example = torch.zeros(2, 3, model.framing.size, model.framing.size, dtype=torch.uint8)
    batch = ({0: Dim("batch")},)
    return torch.export.export(_network(model, softmax), (example,), dynamic_shapes=batch)


def _images(model: BCNN, paths: Sequence[str]) -> Iterator[Tensor]:
    if not paths:
        generator = torch.Generator().manual_seed(0)
        shape = (3, 3, model.framing.size, model.framing.size)
        yield torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    transform = model.framing.evaluation()
    for path in track(paths, "comparing", console=Console(stderr=True), disable=not paths):
        yield transform(load_image(path, model.framing.side))[None].as_subclass(Tensor)


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"format=onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


if __name__ == "__main__":
    sys.exit(command(Options, main, str(__doc__)))
