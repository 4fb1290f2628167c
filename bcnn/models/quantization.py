"""Smaller ONNX files: convolutions in 8 bits, or in float16. Pooling and head stay in float32.

The matrix root and the signed root of a pooling enlarge rounding errors of small values.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bcnn.utils.errors import UserError

Precision = Literal["float32", "float16", "int8"]


def quantize(file: Path, precision: Precision, images: Iterable[Tensor]) -> None:
    """Have the convolutions of an ONNX file compute in a precision.

    Args:
        images: uint8 batches (batch, 3, height, width), of which int8 takes the ranges of activations.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(file)
    nodes = model.graph.node
    convolutions = [index for index, node in enumerate(nodes) if node.op_type == "Conv"]
    if len(convolutions) < 2:  # a transformer has one, of its patches
        raise UserError(f"--precision {precision} is for convolutional backbones: leave it out")
    if precision == "int8":
        _to_int8(model, file, [nodes[convolutions[0]].name, nodes[convolutions[-1]].name], images)
    else:
        above = [node.name for node in nodes[convolutions[-1] + 1 :]]
        onnx.save(convert_float_to_float16(model, keep_io_types=True, node_block_list=above), file)


def _to_int8(model: Any, file: Path, kept: list[str], images: Iterable[Tensor]) -> None:
    """Write a model with convolutions in int8, but for those that are kept in float32."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static

    batches = list(images)

    class Reader(CalibrationDataReader):
        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.part = iter(batches[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.part, None)
            return None if batch is None else {"images": batch.numpy()}

    logging.disable(logging.WARNING)  # it advises on what the exporter has done already
    try:
        quantize_static(
            model,
            file,
            Reader(),
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=kept,
            calibrate_method=CalibrationMethod.Entropy,
            per_channel=True,
            # Processors without 8-bit dot products (AVX2) overflow at 8 bits.
            reduce_range=True,
            # Into histograms batch by batch: the activations of all would not fit in memory.
            extra_options={"CalibStridedMinMax": 1},
        )
    finally:
        logging.disable(logging.NOTSET)
