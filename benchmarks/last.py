"""Stage `last`: the original's loop, a cache of relu5_3 maps, and this project's descriptor store.

Each contender returns seconds an image: `once`, before the first epoch, and of an `epoch` that is warm.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.public import Butterflies
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import initialise_backbone
from bcnn.models.third_party import CHANNELS
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.module import BCNNModule
from bcnn.utils.device import fastest_precision
from bcnn.utils.errors import UserError
from benchmarks.harness import measure, now, random_batches, title, torch_device, trainer
from benchmarks.options import Options
from benchmarks.original import OriginalNet, original_loop

BATCH = 64  # images a step over stored features, as in conf/last/sgd.yaml
STEPS = 4  # that the cache is timed over


def relu5_3_cache(options: Options) -> dict[str, float]:
    """Float32 maps of relu5_3 on disk, pooled and classified anew in every epoch."""
    device = torch_device(options)
    net = OriginalNet(options.classes).to(device)
    sgd = torch.optim.SGD(net.classifiers.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-5)
    side = options.size // 16
    shape = (options.images, CHANNELS, side, side)

    def step() -> None:
        rows = np.random.randint(options.images, size=BATCH)  # a shuffled epoch reads all over the file
        maps = torch.from_numpy(cache[rows]).to(device)
        labels = torch.randint(options.classes, (BATCH,), device=device)
        sgd.zero_grad()
        F.cross_entropy(net.classify(maps), labels).backward()
        sgd.step()

    with tempfile.TemporaryDirectory() as folder:
        cache = np.memmap(Path(folder) / "maps", np.float32, "w+", shape=shape)
        start, filled = now(device), 0
        for images, _ in random_batches(options):
            with torch.no_grad():
                cache[filled : filled + len(images)] = net.features(images).cpu().numpy()
            filled += len(images)
        cache.flush()
        once = (now(device) - start) / options.images
        step()  # the first allocates
        start = now(device)
        for _ in range(STEPS):
            step()
        epoch = (now(device) - start) / (STEPS * BATCH)
    return {"once": once, "epoch": epoch, "bytes": 4.0 * CHANNELS * side**2}


def descriptor_store(options: Options) -> dict[str, float]:
    """This project's stage `last`, from an empty store: built, then read in every epoch.

    `start` is what the fit takes beyond its epochs, were all as the warm ones.
    """
    folder = _folder(options)
    model = BCNN(folder.classes, folder.preprocessing)
    initialise_backbone(model, options.weights)
    data = CachedFeatureDataModule(folder, model, fastest_precision(torch_device(options).type))
    sgd = partial(torch.optim.SGD, lr=1.0, momentum=0.9, weight_decay=1e-5, fused=True)
    module = BCNNModule(model, "last", sgd)
    clock = _EpochClock()
    fit = trainer(options, max_epochs=options.epochs, callbacks=[clock])
    data.trainer = fit
    start = time.perf_counter()
    data.setup()
    once = time.perf_counter() - start
    start = time.perf_counter()
    fit.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    test = trainer(options).test(module, datamodule=data, verbose=False)[0] if folder.test else {}
    images = len(folder.train)
    return {
        "once": once / images,  # the building of val and test is in it
        "start": (seconds - options.epochs * clock.warm_epoch()) / images,
        "epoch": clock.warm_epoch() / images,
        "bytes": float(data.store.nbytes) / len(data.paths),
        **({"top1": test["test_top1"]} if test else {}),
        "images": images,
    }


class _EpochClock(L.Callback):
    """When each epoch began, and when the last ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.times.append(now(pl_module.device))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.times.append(now(pl_module.device))

    def warm_epoch(self) -> float:
        """Mean seconds of the epochs after the first."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def table(options: Options) -> Table:
    """The three side by side."""
    if options.epochs < 2:
        raise UserError(f"epochs={options.epochs}: 2 at least, as the first only warms up")
    ours = measure(descriptor_store, options)
    cache = measure(relu5_3_cache, options)
    original = measure(original_loop, options)
    images, epochs = ours["images"], options.epochs
    table = Table(title=title(options))
    for heading in ("stage last", "once", "an epoch", "in all", "faster", "an image", "memory"):
        table.add_column(heading, justify="left" if heading == "stage last" else "right")
    for label, row in (("original *", original), ("cache *", cache), ("store", ours)):
        total = row.get("once", 0) + row.get("start", 0) + epochs * row["epoch"]
        table.add_row(
            label,
            f"{row.get('once', 0) * images:.0f} s",
            f"{row['epoch'] * images:.3g} s",
            f"{total * images:.0f} s",
            f"{epochs * original['epoch'] / total:.1f} ×",
            f"{row['bytes'] / 1e3:.0f} kB" if "bytes" in row else "",
            f"{row['peak'] / 1e9:.2f} GB",
        )
    table.caption = (
        f"{epochs} epochs of {images:.0f} images, cache and store in batches of {BATCH}; an image: "
        "bytes on disk, of the store in both of its views; "
        f"*: timed over {options.images} images and multiplied out"
    )
    if "top1" in ours:
        table.caption += f"; test top-1 of the store's {ours['top1']:.1%}"
    return table


def _folder(options: Options) -> FineGrainedDataModule:
    kind = FineGrainedDataModule if options.root else Butterflies
    root = options.root or "data/butterflies"
    data = kind(root, options.size, val_fraction=0, batch_size=BATCH)
    data.prepare_data()
    data.setup()
    return data
