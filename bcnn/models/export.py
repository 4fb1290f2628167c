"""Export a model to a file for other programs, and compare the file with PyTorch."""

import copy
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bcnn.data.image_io import load_image
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import describe, load_model, save_model
from bcnn.models.quantization import Precision, quantize
from bcnn.utils.errors import UserError
from bcnn.utils.files import PART, atomic_write

OPSET = 20  # of ONNX, for ONNX Runtime 1.17 (January 2024) and later
TOLERANCE = 1e-2  # of the largest output; rounding makes 1e-5, padding in `to_original` 2e-4

Network = Callable[[Tensor], Any]  # uint8 images → logits or probabilities, and maybe novelty


class Comparison(NamedTuple):
    """A file beside the model that it was made of, on the same images."""

    difference: float  # the largest of an output
    largest: float  # output
    agreement: float  # share of the images that both classify alike


class Outputs(nn.Module):
    """uint8 images → logits or probabilities (batch, classes), and novelty (batch,) if asked for.

    A model that is not calibrated has no novelty.
    """

    def __init__(
        self, model: BCNN, softmax: bool, novelty: bool, pooling: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.pooling, self.head = model.backbone, pooling or model.pooling, model.head
        self.calibration, self.softmax = model.calibration, softmax
        self.novelty = novelty and model.calibration is not None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        descriptors = self.pooling(self.backbone(images))
        output = logits = self.head(descriptors)
        if self.softmax:
            output = (logits / self.calibration.temperature if self.calibration else logits).softmax(1)
        if not self.novelty:
            return output
        assert self.calibration is not None
        return output, self.calibration.novelty(logits, descriptors)


def _joined(outputs: Any) -> Tensor:
    """Return all outputs of a batch side by side."""
    parts = outputs if isinstance(outputs, tuple | list) else [outputs]
    return torch.cat([torch.as_tensor(part).reshape(len(part), -1) for part in parts], dim=1)


def export_model(
    model: BCNN,
    path: str | Path,
    format: str = "onnx",
    softmax: bool = False,
    images: Sequence[str | Path] = (),
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    precision: Precision = "float32",
) -> Comparison:
    """Write a model to a file, load it again, and compare the outputs of both.

    A file in float32 that does not agree with the model never gets the name `path`.

    Args:
        model: on the CPU, in evaluation mode.
        softmax: give probabilities instead of logits (onnx, pt2 and pte).
        images: files to compare the outputs on; none: random images.
        progress: wraps the batches of the comparison, as to show a bar.
        precision: of the convolutions (onnx); int8 needs images, whose activations give the ranges.
    """
    write, read = FORMATS[format]
    path = Path(path)
    if softmax and read is load_model:
        raise UserError("softmax is for format onnx, pt2 and pte: a state dict holds no layers")
    with tempfile.TemporaryDirectory(prefix=PART, dir=path.parent) as folder:
        file = Path(folder, path.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters', about their own code
            write(model, file, softmax)
            if precision != "float32":
                quantize(file, precision, _comparison_images(model, images))
        network = Outputs(model, softmax, novelty=format == "onnx")
        pairs = _pairs(network, read(file), progress(_comparison_images(model, images)))
        classes, novelty = pairs.tensor_split([len(model.classes)], dim=2)
        if precision == "float32":
            _validate_close(classes, path)
            _validate_close(novelty, path, least=1.0)  # standard deviations
        for written in sorted(Path(folder).iterdir(), reverse=True):  # ONNX's weights over 2 GB first
            with atomic_write(path.with_name(written.name)) as part:
                written.replace(part)
    expected, found = classes.argmax(dim=2).unbind(dim=1)
    return Comparison(*_apart(classes), agreement=float((expected == found).float().mean()))


@torch.no_grad()
def _pairs(network: Network, loaded: Network, batches: Iterable[Tensor]) -> Tensor:
    """Return the outputs (images, 2, outputs) of a model and of its file."""
    return torch.cat([torch.stack([_joined(network(x)), _joined(loaded(x))], dim=1) for x in batches])


def _validate_close(pairs: Tensor, path: Path, least: float = 0.0) -> None:
    """Raise a UserError if outputs differ by more than rounding, at a scale of at least `least`."""
    difference, largest = _apart(pairs) if pairs.numel() else (0.0, 0.0)
    if not difference <= TOLERANCE * max(largest, least):  # nor nan
        raise UserError(
            f"{path} would differ from the model by {difference:.1e}, where outputs are up to "
            f"{max(largest, least):.3g}: not kept"
        )


def _apart(pairs: Tensor) -> tuple[float, float]:
    """Return how far outputs (images, 2, …) are apart, and how large the first ones are."""
    # torch's max keeps a nan
    return float(pairs.diff(dim=1).abs().max()), float(pairs[:, 0].abs().max())


def _comparison_images(model: BCNN, paths: Sequence[str | Path]) -> Iterator[Tensor]:
    """Yield the images one by one, or, if there are none, batches of random pixels."""
    generator = torch.Generator().manual_seed(0)
    for count, width, height in () if paths else _input_sides(model):
        shape = (count, 3, height, width)
        yield torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    transform = model.preprocessing.evaluation()
    for path in paths:
        yield transform(load_image(path, model.preprocessing.side))[None].as_subclass(Tensor)


def _input_sides(model: BCNN) -> list[tuple[int, int, int]]:
    """Return batches to try an exported model on: number, width and height of the images."""
    preprocessing = model.preprocessing
    if preprocessing.resize != "whole":
        return [(3, preprocessing.size, preprocessing.size)]
    shapes = {1: (3, 2), 2: (1, 1), 3: (1, 4)}
    return [(count, *preprocessing.whole_sides(*shape)) for count, shape in shapes.items()]


def _write_onnx(model: BCNN, path: Path, softmax: bool) -> None:
    """Write ONNX in float32, for any batch size.

    Input "images"; outputs "logits" or "probabilities", and "novelty" of a calibrated model.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import optimizer

    for exporter in ("torch.onnx", "onnxscript.optimizer"):  # they log their own insides
        logging.getLogger(exporter).setLevel(logging.ERROR)
    outputs = ["probabilities" if softmax else "logits"]
    network = Outputs(model, softmax, novelty=True, pooling=model.pooling.exportable())
    if network.novelty:
        outputs.append("novelty")
    program = torch.onnx.export(
        _exported(network, model),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=outputs,
        verbose=False,
    )
    assert program is not None
    # The indices of the upper triangle follow from shapes alone: constants, above the usual size.
    optimizer.optimize(program.model, input_size_limit=2**24, output_size_limit=2**24)
    ClearMetadataAndDocStringPass()(program.model)  # traces of the exporter, with paths
    program.model.metadata_props.update(describe(model), output=outputs[0])
    program.save(path)


def _read_onnx(path: Path) -> Network:
    from onnxruntime import InferenceSession

    session = InferenceSession(path)
    return lambda images: _joined(session.run(None, {"images": images.numpy()}))


def _write_pt2(model: BCNN, path: Path, softmax: bool) -> None:
    """Write torch.export's file; its extra file metadata.json holds what `describe` returns."""
    extra = {"metadata.json": json.dumps(describe(model))}
    content = io.BytesIO()  # torch's own writing to a full disk ends the process
    network = Outputs(model, softmax, novelty=False)
    torch.export.save(_exported(network, model), content, extra_files=extra)
    path.write_bytes(content.getbuffer())


def _write_pte(model: BCNN, path: Path, softmax: bool) -> None:
    """Write an ExecuTorch program of one image, by the kernels of XNNPACK."""
    if not find_spec("executorch"):
        raise UserError("--format pte needs ExecuTorch: pip install executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    if model.preprocessing.resize == "whole":
        raise UserError("--format pte takes images of one size: train with data.resize=keep or squash")
    network = Outputs(model, softmax, novelty=False, pooling=model.pooling.exportable())
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    size = model.preprocessing.size
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    program = torch.export.export(network, (image,))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)


def _read_pte(path: Path) -> Network:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None
    run = lambda image: method.execute([image.contiguous()])[0].clone()  # noqa: E731
    return lambda images: torch.cat([*map(run, images.split(1))])


def _exported(network: nn.Module, model: BCNN) -> ExportedProgram:
    """Return the program for any number of images and, of whole ones, for any sides."""
    dynamic, preprocessing = {0: Dim("batch")}, model.preprocessing
    (_, width, height), *_ = _input_sides(model)
    if preprocessing.resize == "whole":
        divisor, least = preprocessing.divisor, -(-preprocessing.min_size // preprocessing.divisor)
        dynamic |= {2: divisor * Dim("rows", min=least), 3: divisor * Dim("columns", min=least)}
    example = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    return torch.export.export(network, (example,), dynamic_shapes=(dynamic,))


# How to write each format, and how to load it as a network.
FORMATS: dict[str, tuple[Callable[[BCNN, Path, bool], None], Callable[[Path], Network]]] = {
    "onnx": (_write_onnx, _read_onnx),
    "pt2": (_write_pt2, lambda path: torch.export.load(path).module()),
    "pte": (_write_pte, _read_pte),
    "pth": (lambda model, path, softmax: save_model(model, path), load_model),
    "safetensors": (lambda model, path, softmax: save_model(model, path), load_model),
}
