"""Prediction: the command's loop beside a plain one, and how long one image takes."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from torch import Tensor

from bcnn.data.paths import find_images
from bcnn.data.public import Butterflies
from bcnn.data.transforms import Preprocessing
from bcnn.evaluation.inference import predict_paths
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.export import read_onnx, write_onnx
from bcnn.utils.device import autocast, fastest_precision
from benchmarks.harness import Contender, measure, now, title, torch_device
from benchmarks.options import Options

REPEATS = 10  # of one image


def plain_loop(options: Options) -> dict[str, float]:
    """Photographs one after the other, decoded in this process, in float32."""
    model, paths = _model(options), _paths(options)
    model.predict(paths[0])  # the first allocates
    start = now(torch_device(options))
    for path in paths:
        model.predict(path).cpu()
    return {"seconds": (now(torch_device(options)) - start) / len(paths)}


def command_loop(options: Options) -> dict[str, float]:
    """That of `python -m bcnn.cli.predict`: batches, processes that decode, the fastest precision."""
    model, paths = _model(options), _paths(options)
    list(predict_paths(model, paths[: options.batch], workers=0))
    start = now(torch_device(options))
    list(predict_paths(model, paths))
    return {"seconds": (now(torch_device(options)) - start) / len(paths)}


def one_image(options: Options) -> dict[str, float]:
    """PyTorch in float32, on one decoded image."""
    return _latency(_model(options).predict, options)


def one_image_fastest(options: Options) -> dict[str, float]:
    """PyTorch in the fastest precision of the device."""
    with autocast(torch_device(options)):
        return _latency(_model(options).predict, options)


def one_image_onnx(options: Options) -> dict[str, float]:
    """ONNX Runtime in float32, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(_model(options).cpu(), Path(folder) / "model.onnx", softmax=True)
        network = read_onnx(Path(folder) / "model.onnx")
    return _latency(network, options)


def table(options: Options) -> Table:
    """The loops side by side, then the runtimes for one image."""
    table = Table("predict", "s an image", "images/s", "faster", "memory", title=title(options))
    runtimes: list[tuple[str, Contender]] = [
        ("one image, float32", one_image),
        (f"one image, {fastest_precision(torch_device(options).type)}", one_image_fastest),
    ]
    if find_spec("onnxruntime"):
        runtimes.append(("one image, ONNX Runtime", one_image_onnx))
    else:
        table.caption = "ONNX Runtime is not installed: pip install onnxruntime"
    for part in ([("a plain loop", plain_loop), ("bcnn.cli.predict", command_loop)], runtimes):
        rows = [(label, measure(contender, options)) for label, contender in part]
        for label, row in rows:
            table.add_row(
                label,
                f"{row['seconds']:.3f}",
                f"{1 / row['seconds']:.2f}",
                f"{rows[0][1]['seconds'] / row['seconds']:.2f} ×",
                f"{row['peak'] / 1e9:.2f} GB" if part is not runtimes else "",
            )
        table.add_section()
    return table


def _latency(predict: Callable[[Tensor], Tensor], options: Options) -> dict[str, float]:
    """Median over repetitions; from and to the CPU's memory."""
    image = torch.randint(256, (1, 3, options.size, options.size), dtype=torch.uint8)
    predict(image)
    seconds = []
    for _ in range(REPEATS):
        start = now(torch_device(options))
        predict(image).cpu()
        seconds.append(now(torch_device(options)) - start)
    return {"seconds": median(seconds)}


def _model(options: Options) -> BCNN:
    model = BCNN([str(k) for k in range(options.classes)], Preprocessing(options.size)).eval()
    return model.to(torch_device(options))


def _paths(options: Options) -> list[str]:
    if not options.root:
        Butterflies("data/butterflies").prepare_data()
    found = find_images([str(options.root or "data/butterflies")])
    return list(islice(cycle(found), options.images))
