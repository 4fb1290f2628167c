"""Shared by the benchmarks: options, processes, clocks, a table, the two-script original's network."""

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark.utils.timer import timer as now  # waits for the GPU
from torchvision.models.vgg import cfgs, make_layers

from bcnn.utils.console import console, error_console
from bcnn.utils.device import best_device
from bcnn.utils.files import cache_folder

Options = argparse.Namespace
Contender = Callable[[Options], dict[str, float]]  # → seconds, and what else it measures

ARGUMENTS: dict[str, tuple[object, str]] = {
    "size": (448, "side of the images in pixels"),
    "batch": (8, "images a step"),
    "images": (32, "images to time over"),
    "classes": (17, "number of classes"),
    "epochs": (55, "epochs of stage last"),
    "root": ("", "folder of images; default: made ones"),
    "members": (10_000, "images in a shard"),
    "pooling": ("", "a pooling to measure, too"),
    "project": (0, "channels that this pooling's maps are projected to; 0: all"),
}


def parser(description: str | None, *names: str) -> argparse.ArgumentParser:
    """Return a parser of the device and of these arguments."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--device", type=torch.device, default=best_device(), help="cpu or cuda")
    for name in names:
        default, text = ARGUMENTS[name]
        made.add_argument(f"--{name}", type=type(default), default=default, help=text)
    return made


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
    cuda = options.device.type == "cuda"
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
    device = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
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


def seconds_per_image(step: Callable[[Tensor, Tensor], None], options: Options) -> float:
    """Time a training step on batches of noise and their labels."""
    noise = torch.rand(options.images, 3, options.size, options.size, device=options.device)
    labels = torch.randint(options.classes, (options.images,), device=options.device)
    batches = [*zip(noise.split(options.batch), labels.split(options.batch), strict=True)]
    step(*batches[0])  # allocates
    start = now()
    for batch in batches:
        step(*batch)
    return (now() - start) / options.images


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
    net = OriginalNet(options.classes).to(options.device)
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-5)

    def step(images: Tensor, labels: Tensor) -> None:
        sgd.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        sgd.step()

    return {"seconds": seconds_per_image(step, options)}
