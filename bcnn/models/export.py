"""The files of other formats that a model is written to, opened again and compared with."""

import importlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bcnn.data.image_io import load_image
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import describe, load_model, write_model
from bcnn.utils.errors import UserError
from bcnn.utils.progress import track

OPSET = 20  # of ONNX; ONNX Runtime 1.17 (January 2024) and later run it
TOLERANCE = 1e-2  # of the largest output; rounding makes 1e-5, padding in `to_original` 2e-4

Network = Callable[[Tensor], Tensor]  # uint8 images → logits or probabilities


def network(model: nn.Module, softmax: bool) -> nn.Module:
    """The model as it is, or with probabilities in place of logits."""
    return nn.Sequential(model, nn.Softmax(dim=1)) if softmax else model


def comparison_images(model: BCNN, paths: Sequence[str]) -> Iterator[Tensor]:
    """Batches to compare networks on: photographs one by one, or where there are none random images."""
    if not paths:
        generator = torch.Generator().manual_seed(0)
        shape = (3, 3, model.preprocessing.size, model.preprocessing.size)
        yield torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    transform = model.preprocessing.evaluation()
    for path in track(paths, "comparing", show=bool(paths)):
        yield transform(load_image(path, model.preprocessing.side))[None].as_subclass(Tensor)


@torch.no_grad()
def compare(a: Network, b: Network, batches: Iterator[Tensor]) -> tuple[float, float]:
    """The largest difference between two networks' outputs, and the largest output."""
    pairs = [(a(images), b(images)) for images in batches]
    # torch's max keeps a nan, wherever it is; Python's does not
    return (
        float(torch.stack([(x - y).abs().max() for x, y in pairs]).max()),
        float(torch.stack([x.abs().max() for x, _ in pairs]).max()),
    )


def write_onnx(model: BCNN, path: Path, softmax: bool) -> None:
    """ONNX in float32 with a free batch size; input "images", output "logits" or "probabilities".

    Raises:
        UserError: the packages for it are not installed, or ONNX has no form of the pooling.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    optimizer = importlib.import_module("onnxscript.optimizer")
    passes = importlib.import_module("onnx_ir.passes.common")
    for exporter in ("torch.onnx", "onnxscript.optimizer"):  # which tell of their own insides
        logging.getLogger(exporter).setLevel(logging.ERROR)
    output = "probabilities" if softmax else "logits"
    parts = nn.Sequential(model.backbone, model.pooling.exportable(), model.head)
    program = torch.onnx.export(
        _exported(parts, model.preprocessing.size, softmax),
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
    content = io.BytesIO()  # torch's own writing to a full disk ends the process
    torch.export.save(_exported(model, model.preprocessing.size, softmax), content, extra_files=extra)
    path.write_bytes(content.getbuffer())


def read_pt2(path: Path) -> Network:
    """The network in a file of torch.export's."""
    return torch.export.load(path).module()


def write_weights(model: BCNN, path: Path, softmax: bool) -> None:
    """A state dict, in the layout that the suffix of `path` names: see `write_model`.

    Raises:
        UserError: `softmax`, which weights cannot say.
    """
    if softmax:
        raise UserError("softmax=true is for format=onnx and format=pt2: a state dict holds no layers")
    write_model(model, path)


def read_weights(path: Path) -> Network:
    """The model that `load_model` makes of a state dict."""
    return load_model(path)


FORMATS: dict[str, tuple[Callable[[BCNN, Path, bool], None], Callable[[Path], Network]]] = {
    "onnx": (write_onnx, read_onnx),
    "pt2": (write_pt2, read_pt2),
    "pth": (write_weights, read_weights),
    "safetensors": (write_weights, read_weights),
}


def _exported(model: nn.Module, size: int, softmax: bool) -> ExportedProgram:
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    batch = ({0: Dim("batch")},)
    return torch.export.export(network(model, softmax), (example,), dynamic_shapes=batch)


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"format=onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
