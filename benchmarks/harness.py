"""What every part measures with: a process for each contender, clocks, random images."""

import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from bcnn.training.feature_store import stores_dir
from benchmarks.options import Options

Contender = Callable[[Options], dict[str, float]]


def torch_device(options: Options) -> torch.device:
    """That `device` names."""
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    return torch.device("cuda" if cuda else "cpu")


def title(options: Options) -> str:
    """Of the tables: the device and the work."""
    name = f"CPU, {torch.get_num_threads()} threads"
    if torch_device(options).type == "cuda":
        name = torch.cuda.get_device_name()
    return f"{name}; {options.size} px, batch {options.batch}, {options.classes} classes"


def measure(contender: Contender, options: Options) -> dict[str, float]:
    """Run a contender in a process of its own, with stores of its own.

    Returns:
        What the contender does, and under `peak` the bytes of memory that it took at most: on a GPU
        those allocated there, else what the process grew by.
    """
    Console(stderr=True).print(f"measuring {contender.__name__} …")
    stores_dir().parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=stores_dir().parent) as stores,
        ProcessPoolExecutor(1, get_context("spawn")) as process,
    ):
        return process.submit(_in_process, contender, options, stores).result()


def _in_process(contender: Contender, options: Options, stores: str) -> dict[str, float]:
    os.environ["BCNN_STORES"] = stores
    before = _resident()
    result = contender(options)
    cuda = torch_device(options).type == "cuda"
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
    device = torch_device(options)
    for start in range(0, options.images, options.batch):
        count = min(options.batch, options.images - start)
        images = torch.rand(count, 3, options.size, options.size, device=device)
        yield images, torch.randint(options.classes, (count,), device=device)


def seconds_an_image(step: Callable[[Tensor, Tensor], None], options: Options) -> float:
    """Of a training step on (images, labels)."""
    batches = list(random_batches(options))
    step(*batches[0])  # the first allocates
    start = now(torch_device(options))
    for images, labels in batches:
        step(images, labels)
    return (now(torch_device(options)) - start) / options.images


def trainer(options: Options, **arguments: Any) -> L.Trainer:
    """A trainer that writes nothing, and says nothing of its own configuration."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return L.Trainer(
        accelerator=torch_device(options).type,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **arguments,
    )
