"""What every part measures with: the options, a process for each contender, clocks, random images."""

import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from bcnn.store import stores_dir


@dataclass
class Options:
    """What to measure: see the command's usage."""

    stage: str = "last"
    device: str = "auto"
    size: int = 448
    batch: int = 8
    images: int = 32
    classes: int = 17
    rows: list[int] = field(default_factory=lambda: [500, 1000, 2000])
    epochs: int = 55
    root: Path | None = None
    weights: str = "random"
    ckpt: Path | None = None

    @property
    def torch_device(self) -> torch.device:
        cuda = torch.cuda.is_available() if self.device == "auto" else self.device == "cuda"
        return torch.device("cuda" if cuda else "cpu")

    @property
    def title(self) -> str:
        """Of the tables: the device and the work."""
        name = f"CPU, {torch.get_num_threads()} threads"
        if self.torch_device.type == "cuda":
            name = torch.cuda.get_device_name()
        return f"{name}; {self.size} px, batch {self.batch}, {self.classes} classes"


Contender = Callable[[Options], dict[str, float]]


def measure(contender: Contender, options: Options) -> dict[str, float]:
    """Run a contender in a process of its own, with stores of its own.

    Returns:
        What the contender does, and under `peak` the bytes of memory that it took at most: on a GPU
        those allocated there, else what the process grew by.
    """
    Console(stderr=True).print(f"measuring {contender.__name__} …")
    with (
        tempfile.TemporaryDirectory(dir=stores_dir().parent) as stores,
        ProcessPoolExecutor(1, get_context("spawn")) as process,
    ):
        return process.submit(_in_process, contender, options, stores).result()


def _in_process(contender: Contender, options: Options, stores: str) -> dict[str, float]:
    os.environ["BCNN_STORES"] = stores
    before = _resident()
    result = contender(options)
    cuda = options.torch_device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else _resident() - before
    return {**result, "peak": float(peak)}


def _resident() -> int:
    """Most bytes of memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def random_batches(options: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """`options.images` images of noise and their labels, `options.batch` at a time."""
    device = options.torch_device
    for start in range(0, options.images, options.batch):
        count = min(options.batch, options.images - start)
        images = torch.rand(count, 3, options.size, options.size, device=device)
        yield images, torch.randint(options.classes, (count,), device=device)


def seconds_an_image(step: Callable[[Tensor, Tensor], None], options: Options) -> float:
    """Of a training step on (images, labels)."""
    batches = list(random_batches(options))
    step(*batches[0])  # the first allocates
    start = now(options.torch_device)
    for images, labels in batches:
        step(images, labels)
    return (now(options.torch_device) - start) / options.images


def trainer(options: Options, **arguments: Any) -> L.Trainer:
    """A trainer that writes nothing, and says nothing of its own configuration."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return L.Trainer(
        accelerator=options.torch_device.type,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **arguments,
    )
