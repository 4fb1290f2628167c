"""This project beside the source's plain loop, on your machine.

python -m bcnn.benchmark [OPTION=VALUE ...]

  stage=last       the source's loop, a cache of relu5_3 maps, and this project's descriptor store
  stage=finetune   a training step of the source's network, and of this project's
  stage=convex     the convex solver at growing numbers of rows (two an image)

  device=auto      auto | cpu | cuda
  size=448         side of the images in pixels
  batch=8          images a step
  images=32        images that the source's loop and the cache are timed over
  classes=17       of stage=finetune and stage=convex
  rows=[500,1000,2000]  of stage=convex
  epochs=55        of stage=last
  root=FOLDER      image folder for stage=last; none: the embedded butterflies
  weights=random   for stage=last, as model.weights
"""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vgg import cfgs, make_layers

from bcnn.convex import ConvexModule
from bcnn.data.folder import ImageFolderData
from bcnn.data.sets import Butterflies
from bcnn.descriptors import DescriptorData
from bcnn.errors import UserError
from bcnn.model import BCNN, CHANNELS
from bcnn.module import BCNNModule
from bcnn.options import command
from bcnn.pooling import packed_size
from bcnn.precision import AUTOCAST, fastest_precision
from bcnn.store import SCALE, VIEWS, DescriptorStore, stores_dir
from bcnn.weights import initialise_features


@dataclass
class Options:
    """What to measure: see the module's docstring."""

    stage: str = "last"
    device: str = "auto"
    size: int = 448
    batch: int = 8
    images: int = 32
    classes: int = 17
    rows: list[int] = field(default_factory=lambda: [500, 1000, 2000])
    epochs: int = 55
    root: str = ""
    weights: str = "random"

    @property
    def torch_device(self) -> torch.device:
        cuda = torch.cuda.is_available() if self.device == "auto" else self.device == "cuda"
        return torch.device("cuda" if cuda else "cpu")


class SourceNet(nn.Module):
    """The source's network: float32, NCHW, a classifier on all 262,144 entries."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=False)[:-1]
        self.classifiers = nn.Sequential(nn.Linear(CHANNELS**2, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))

    def classify(self, maps: Tensor) -> Tensor:
        x = maps.flatten(2)
        x = (torch.bmm(x, x.transpose(1, 2)) / x.shape[2]).flatten(1)
        return self.classifiers(F.normalize(x.sign() * (x.abs() + 1e-10).sqrt()))


def source_loop(options: Options) -> dict[str, float]:
    """Its step in both stages: `last` freezes nothing, so every layer is passed both ways."""
    device = options.torch_device
    net = SourceNet(options.classes).to(device)
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-5)

    def step(images: Tensor, labels: Tensor) -> None:
        sgd.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        sgd.step()

    return {"epoch": _seconds_an_image(step, options)}


def relu5_3_cache(options: Options) -> dict[str, float]:
    """Float32 maps of relu5_3 on disk, pooled and classified anew in every epoch."""
    device = options.torch_device
    net = SourceNet(options.classes).to(device)
    sgd = torch.optim.SGD(net.classifiers.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-5)
    side = options.size // 16
    shape = (options.images, CHANNELS, side, side)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        cache = np.memmap(Path(folder) / "maps", np.float32, "w+", shape=shape)
        start = _now(device)
        for begin, images, _ in _random_batches(options):
            cache[begin : begin + len(images)] = net.features(images).cpu().numpy()
        cache.flush()
        once = (_now(device) - start) / options.images

        @torch.enable_grad()
        def epoch() -> None:
            for begin, images, labels in _random_batches(options):
                maps = torch.from_numpy(np.array(cache[begin : begin + len(images)])).to(device)
                sgd.zero_grad()
                F.cross_entropy(net.classify(maps), labels).backward()
                sgd.step()

        epoch()
        start = _now(device)
        epoch()
    seconds = (_now(device) - start) / options.images
    return {"once": once, "epoch": seconds, "bytes": 4.0 * CHANNELS * side**2}


def descriptor_store(options: Options) -> dict[str, float]:
    """This project's stage `last`, from an empty store: built, then read in every epoch."""
    folder = _folder(options)
    model = BCNN(folder.classes, folder.size)
    initialise_features(model, options.weights)
    data = DescriptorData(folder, model, fastest_precision(options.torch_device.type))
    module = BCNNModule(model, "last", lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9))
    trainer = _trainer(options, max_epochs=options.epochs)
    data.trainer = trainer
    start = time.perf_counter()
    data.setup()
    once = time.perf_counter() - start
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    epochs = time.perf_counter() - start
    test = _trainer(options).test(module, datamodule=data, verbose=False)[0] if folder.test else {}
    return {
        "once": once / len(folder.train),  # the building of val and test is in it
        "epoch": epochs / options.epochs / len(folder.train),
        "bytes": float(data.store.nbytes) / len(data.paths) / VIEWS,
        **({"top1": test["test_top1"]} if test else {}),
        "images": len(folder.train),
    }


def project_step(options: Options) -> dict[str, float]:
    """This project's finetune step, in the fastest precision of the device."""
    device = options.torch_device
    model = BCNN([str(k) for k in range(options.classes)], options.size).to(device)
    module = BCNNModule(model, "finetune", centering=True).train()
    dtype = AUTOCAST.get(fastest_precision(device.type))
    sgd = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-5)

    def step(images: Tensor, labels: Tensor) -> None:
        sgd.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(module(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        sgd.step()

    seconds = _seconds_an_image(step, options)
    _, images, labels = next(_random_batches(options))
    with FlopCounterMode(display=False) as counter:
        step(images, labels)
    flops = counter.get_total_flops() / len(images)
    return {"epoch": seconds, "flops": flops, "rate": _matrix_rate(device, dtype or torch.float32)}


def convex_solver(options: Options) -> dict[str, float]:
    """Stage `last` solved for one λ on `options.images` random descriptors in two views each."""
    count, width = options.images, packed_size(CHANNELS)
    store = DescriptorStore({"benchmark": "random rows"}, count, width)
    store.open()
    generator = np.random.default_rng(0)
    for chunk in range(store.chunk_count):
        rows = generator.random((len(store.chunk_images(chunk)) * VIEWS, width), np.float32)
        store.write(chunk, rows / np.linalg.norm(rows, axis=1, keepdims=True))
    data: Any = SimpleNamespace(  # as much of a DescriptorData as the solver reads
        images=SimpleNamespace(train=[(str(i), i % options.classes) for i in range(count)]),
        rows=lambda samples: [VIEWS * int(name) for name, _ in samples],
        read=lambda rows: torch.from_numpy(store.read(rows)).float() / SCALE,
    )
    model = BCNN([str(k) for k in range(options.classes)])
    trainer = _trainer(options, max_epochs=1, limit_train_batches=1, precision="32-true")
    start = time.perf_counter()
    trainer.fit(ConvexModule(model, data, [1e-6]), DataLoader(TensorDataset(torch.zeros(1))))
    return {"seconds": time.perf_counter() - start}


def main(options: Options) -> int:
    """Measure, and print a table."""
    stages = {"last": _last, "finetune": _finetune, "convex": _convex}
    if options.stage not in stages:
        raise UserError(f"stage={options.stage}: choose from {', '.join(stages)}")
    Console().print(stages[options.stage](options))
    return 0


def _last(options: Options) -> Table:
    ours = _measure(descriptor_store, options)
    cache = _measure(relu5_3_cache, options)
    source = _measure(source_loop, options)
    images, epochs = ours["images"], options.epochs
    table = Table(title=_title(options))
    for heading in ("stage last", "once", "an epoch", "in all", "faster", "an image", "memory"):
        table.add_column(heading, justify="left" if heading == "stage last" else "right")
    total = {
        name: (row.get("once", 0) + epochs * row["epoch"]) * images
        for name, row in (("source", source), ("cache", cache), ("ours", ours))
    }
    for label, name, row in (
        ("source *", "source", source),
        ("cache *", "cache", cache),
        ("store", "ours", ours),
    ):
        table.add_row(
            label,
            f"{row.get('once', 0) * images:.0f} s",
            f"{row['epoch'] * images:.2f} s",
            f"{total[name]:.0f} s",
            f"{total['source'] / total[name]:.1f} ×",
            f"{row['bytes'] / 1e3:.0f} kB" if "bytes" in row else "",
            f"{row['peak'] / 1e9:.2f} GB",
        )
    table.caption = (
        f"{epochs} epochs of {images:.0f} images; an image: bytes read of it in one view; "
        f"*: timed over {options.images} images and multiplied out"
    )
    if "top1" in ours:
        table.caption += f"; test top-1 of the store's {ours['top1']:.1%}"
    return table


def _finetune(options: Options) -> Table:
    source, ours = _measure(source_loop, options), _measure(project_step, options)
    table = Table("finetune step", "s an image", "images/s", "faster", "memory", title=_title(options))
    for label, row in (("source's", source), ("this project's", ours)):
        table.add_row(
            label,
            f"{row['epoch']:.3f}",
            f"{1 / row['epoch']:.2f}",
            f"{source['epoch'] / row['epoch']:.2f} ×",
            f"{row['peak'] / 1e9:.2f} GB",
        )
    achieved = ours["flops"] / ours["epoch"]
    table.caption = (
        f"this project's step runs at {achieved / 1e12:.2f} TFLOP/s, {achieved / ours['rate']:.0%} "
        f"of the {ours['rate'] / 1e12:.2f} TFLOP/s of a matrix product in the same precision"
    )
    return table


def _convex(options: Options) -> Table:
    table = Table("rows", "seconds", "memory", title=_title(options))
    for rows in options.rows:
        row = _measure(convex_solver, replace(options, images=rows // VIEWS))
        table.add_row(str(rows), f"{row['seconds']:.1f}", f"{row['peak'] / 1e9:.2f} GB")
    return table


def _title(options: Options) -> str:
    device = options.torch_device
    cores = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cores
    return f"{name}; {options.size} px, batch {options.batch}, {options.classes} classes"


def _measure(contender: Callable[[Options], dict[str, float]], options: Options) -> dict[str, float]:
    """Run a contender in a process of its own, with stores of its own, and add its peak memory."""
    Console(stderr=True).print(f"measuring {contender.__name__} …")
    with (
        tempfile.TemporaryDirectory(dir=stores_dir().parent) as stores,
        ProcessPoolExecutor(1, get_context("spawn")) as process,
    ):
        return process.submit(_in_process, contender, options, stores).result()


def _in_process(
    contender: Callable[[Options], dict[str, float]], options: Options, stores: str
) -> dict[str, float]:
    os.environ["BCNN_STORES"] = stores
    result = contender(options)
    if options.torch_device.type == "cuda":
        return {**result, "peak": float(torch.cuda.max_memory_allocated())}
    unit = 1 if sys.platform == "darwin" else 1024
    return {**result, "peak": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}


def _random_batches(options: Options) -> Iterator[tuple[int, Tensor, Tensor]]:
    device = options.torch_device
    for start in range(0, options.images, options.batch):
        count = min(options.batch, options.images - start)
        images = torch.rand(count, 3, options.size, options.size, device=device)
        yield start, images, torch.randint(options.classes, (count,), device=device)


def _seconds_an_image(step: Callable[[Tensor, Tensor], None], options: Options) -> float:
    batches = list(_random_batches(options))
    step(*batches[0][1:])  # the first allocates
    start = _now(options.torch_device)
    for _, images, labels in batches:
        step(images, labels)
    return (_now(options.torch_device) - start) / options.images


def _matrix_rate(device: torch.device, dtype: torch.dtype, side: int = 4096) -> float:
    a = torch.rand(side, side, device=device, dtype=dtype)
    a @ a
    start = _now(device)
    for _ in range(5):
        a @ a
    return 5 * 2 * side**3 / (_now(device) - start)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _folder(options: Options) -> ImageFolderData:
    kind = ImageFolderData if options.root else Butterflies
    data = kind(options.root or "data/butterflies", options.size, val_fraction=0)
    data.prepare_data()
    data.setup()
    return data


def _trainer(options: Options, **limits: Any) -> L.Trainer:
    return L.Trainer(
        accelerator=options.torch_device.type,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **limits,
    )


if __name__ == "__main__":
    sys.exit(command(Options, main, str(__doc__)))
