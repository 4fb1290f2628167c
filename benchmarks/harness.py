"""Shared by the benchmarks: options, processes, clocks, a table, the two-script original's network."""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from bcnn.utils.console import console, error_console
from bcnn.utils.files import cache_folder

Options = argparse.Namespace
Contender = Callable[[Options], dict[str, float]]  # → seconds, and what else it measures

HELP = {
    "device": "auto, cpu or cuda",
    "size": "side of the images in pixels",
    "batch": "images a step",
    "images": "images to time over",
    "classes": "number of classes",
    "epochs": "epochs of stage last",
    "rows": "numbers of descriptors for the solver",
    "root": "folder of images; default: made ones",
    "pooling": "a pooling to measure, too",
    "project": "channels that this pooling's maps are projected to; 0: all",
}


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser of these options; a default's type is that of the option."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default in {"device": "auto", **defaults}.items():
        many = {"nargs": "*", "type": int} if isinstance(default, list) else {"type": type(default)}
        made.add_argument(f"--{name}", default=default, help=HELP[name], **many)  # type: ignore[arg-type]
    return made


def device_of(options: Options) -> torch.device:
    """Return the device to measure on."""
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    return torch.device("cuda" if cuda else "cpu")


def measure(name: str, contender: Contender, options: Options) -> dict[str, float]:
    """Run a contender in a process of its own, with an empty cache of its own.

    Returns:
        What the contender returns, and the most memory it took, in bytes, as `peak`: on a GPU what was
        allocated there, else what the process grew by.
    """
    error_console.print(f"measuring {name} …")
    with (
        tempfile.TemporaryDirectory(dir=cache_folder("benchmarks")) as folder,
        ProcessPoolExecutor(1, get_context("spawn")) as process,
    ):
        return process.submit(_in_process, contender, options, folder).result()


def _in_process(contender: Contender, options: Options, folder: str) -> dict[str, float]:
    os.environ["TORCH_HOME"] = os.path.dirname(torch.hub.get_dir())  # downloaded weights stay in use
    os.environ["XDG_CACHE_HOME"] = folder
    os.environ.pop("BCNN_STORES", None)
    before = _resident()
    result = contender(options)
    cuda = device_of(options).type == "cuda"
    return {**result, "peak": torch.cuda.max_memory_allocated() if cuda else _resident() - before}


def _resident() -> int:
    """Return the most bytes of memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare(
    title: str, contenders: dict[str, Contender], options: Options, unit: str = "image"
) -> dict[str, dict[str, float]]:
    """Measure the contenders one after the other and print a table; the first is the reference."""
    rows = {name: measure(name, contender, options) for name, contender in contenders.items()}
    device = torch.cuda.get_device_name() if device_of(options).type == "cuda" else "CPU"
    table = Table(title=f"{title} ({device})", title_justify="left")
    for heading in ("", f"s/{unit}", f"{unit}s/s", "speed-up", "memory"):
        table.add_column(heading, justify="right" if heading else "left")
    reference = next(iter(rows.values()))["seconds"]
    for name, row in rows.items():
        seconds = row["seconds"]
        cells = f"{seconds:.3g}", f"{1 / seconds:.3g}", f"{reference / seconds:.2f} ×"
        table.add_row(name, *cells, f"{row['peak'] / 1e6:.0f} MB")
    console.print(table)
    return rows


def now(device: torch.device) -> float:
    """Return the time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def random_batches(options: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `options.images` images of noise and their labels, `options.batch` at a time."""
    device = device_of(options)
    for start in range(0, options.images, options.batch):
        count = min(options.batch, options.images - start)
        images = torch.rand(count, 3, options.size, options.size, device=device)
        yield images, torch.randint(options.classes, (count,), device=device)


def seconds_per_image(step: Callable[[Tensor, Tensor], None], options: Options) -> float:
    """Time a training step on (images, labels)."""
    batches = list(random_batches(options))
    step(*batches[0])  # allocates
    start = now(device_of(options))
    for images, labels in batches:
        step(images, labels)
    return (now(device_of(options)) - start) / options.images


class OriginalNet(nn.Module):
    """The network of the two-script original: float32, a classifier on all 262,144 entries."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=False)[:-1]
        self.classifiers = nn.Sequential(nn.Linear(512**2, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(2)
        x = (torch.bmm(x, x.transpose(1, 2)) / x.shape[2]).flatten(1)
        return self.classifiers(F.normalize(x.sign() * (x.abs() + 1e-10).sqrt()))


def original_step(options: Options) -> dict[str, float]:
    """Time the original's step. Its stage last freezes no layer, so this is the step of both stages."""
    net = OriginalNet(options.classes).to(device_of(options))
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-5)

    def step(images: Tensor, labels: Tensor) -> None:
        sgd.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        sgd.step()

    return {"seconds": seconds_per_image(step, options)}
