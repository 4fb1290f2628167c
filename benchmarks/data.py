"""Loading: torchvision's plain pipeline, and this project's, side by side in a DataLoader's workers."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.datasets.folder import pil_loader

from bcnn.data.datamodule import ImageList
from bcnn.data.image_cache import load_reduced
from bcnn.data.image_io import load_image
from bcnn.data.transforms import Preprocessing
from bcnn.models.checkpoint import load_model
from bcnn.utils.environment import default_workers
from bcnn.utils.errors import UserError
from bcnn.utils.progress import track
from benchmarks import photographs
from benchmarks.harness import measure, torch_device
from benchmarks.options import Options

SIZES = ((500, 375), (4000, 3000))  # px: photographs as the benchmark sets have them, and as cameras do
EPOCHS = 3  # that are timed, after one that starts the workers

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Plain(Dataset[tuple[Tensor, int]]):
    """What most training code does: everything on the whole image, and in floating point."""

    def __init__(self, samples: Sequence[tuple[str, int]], size: int) -> None:
        self.samples = samples
        self.transform = v1.Compose(
            [
                v1.Resize(size),
                v1.RandomCrop(size),
                v1.RandomHorizontalFlip(),
                v1.ToTensor(),
                v1.Normalize(*IMAGENET),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(pil_loader(path)), label


class Clocked(Dataset[tuple[Tensor, float]]):
    """Images, and the processor seconds since the last: to decode, transform, collate and send one."""

    def __init__(self, images: Dataset[tuple[Tensor, int]]) -> None:
        self.images: Any = images
        self.last = 0.0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        image, _ = self.images[index]
        last, self.last = self.last, time.process_time()  # of this worker: others do not disturb it
        return image, self.last - last


def plain_pipeline(options: Options) -> dict[str, float]:
    """PIL → Resize → RandomCrop → Flip → ToTensor → Normalize."""
    return _speed(Plain(_samples(options), options.size), options)


def project_pipeline(options: Options) -> dict[str, float]:
    """As in training: reduced decoding, uint8 all the way; the model normalises, on its device."""
    return _speed(_images(options, load_image), options)


def cached_pipeline(options: Options) -> dict[str, float]:
    """The same with `data.cache=true`: the copies are made in the epoch that is not timed."""
    os.environ["XDG_CACHE_HOME"] = os.environ["BCNN_STORES"]  # which is this process's own
    return _speed(_images(options, load_reduced), options)


def _images(options: Options, load: Callable[..., Image.Image]) -> ImageList:
    transform = Preprocessing(options.size).training()
    return ImageList(_samples(options), transform, partial(load, side=options.size))


def decisions(options: Options) -> dict[str, float]:
    """What reduced decoding does to a trained model's answers, in float32."""
    assert options.ckpt is not None
    device = torch_device(options)
    model = load_model(options.ckpt).to(device).eval()
    transform = replace(model.preprocessing, size=options.size, crop_pct=1.0).evaluation()
    reduced, changed, largest = 0, 0, 0.0
    for path, _ in track(_samples(options), "classifying"):
        whole, ours = load_image(path), load_image(path, options.size)
        if ours.size == whole.size:
            continue
        images = torch.stack([transform(whole), transform(ours)]).as_subclass(Tensor)
        with torch.no_grad():
            a, b = model(images.to(device))
        reduced += 1
        changed += int(a.argmax() != b.argmax())
        largest = max(largest, float((a - b).abs().max()))
    return {"reduced": reduced, "changed": changed, "largest": largest}


def table(options: Options) -> Table:
    """The pipelines, on the JPEGs under `root` or on made ones of each size."""
    table = Table(title=f"JPEGs to crops of {options.size} px")
    for heading in ("photographs", "pipeline", "a core", "faster", "in all", "faster"):
        left = heading in ("photographs", "pipeline")
        table.add_column(heading, justify="left" if left else "right")
    with tempfile.TemporaryDirectory() as scratch:
        folders = [options.root] if options.root else _made(Path(scratch), options.images)
        for folder in folders:
            here = replace(options, root=folder)
            pipelines = {
                "plain": plain_pipeline,
                "bcnn": project_pipeline,
                "with data.cache=true": cached_pipeline,
            }
            rows = {name: measure(pipeline, here) for name, pipeline in pipelines.items()}
            plain = rows["plain"]
            labels = [folder.name, f"{plain['bytes'] / 1e3:.0f} kB each", ""]
            for label, (pipeline, row) in zip(labels, rows.items(), strict=True):
                table.add_row(
                    label,
                    pipeline,
                    f"{row['a core']:.0f}/s",
                    f"{row['a core'] / plain['a core']:.1f} ×",
                    f"{row['in all']:.0f}/s",
                    f"{row['in all'] / plain['in all']:.1f} ×",
                )
        table.caption = (
            f"{options.images} photographs; a core: by the processor time of the loader's workers; "
            f"in all: by the clock, {plain['workers']} workers, batches of {options.batch}"
        )
        if options.ckpt:
            told = measure(decisions, here)
            table.caption += (
                f"; top-1 changed in {told['changed']} of {told['reduced']} photographs decoded at a "
                f"reduced scale, a logit by {told['largest']:.2g} at most"
            )
    return table


def _speed(images: Dataset[tuple[Tensor, int]], options: Options) -> dict[str, float]:
    """Images a second, from a loader with as many workers as training has."""
    workers = default_workers()
    loader = DataLoader(
        Clocked(images),
        options.batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )
    for _ in loader:
        pass
    count, spent, start = 0, 0.0, time.perf_counter()
    for batch, seconds in (pair for _ in range(EPOCHS) for pair in loader):
        count += len(batch)
        spent += float(seconds.sum())
    return {
        "a core": count / spent,
        "in all": count / (time.perf_counter() - start),
        "workers": workers,
        "bytes": sum(Path(path).stat().st_size for path, _ in _samples(options))
        / len(_samples(options)),
    }


def _made(root: Path, count: int) -> list[Path]:
    """A folder of photographs of each size."""
    folders = [root / f"{width} × {height} px" for width, height in SIZES]
    for folder, size in zip(folders, SIZES, strict=True):
        photographs.write(folder, size, count)
    return folders


def _samples(options: Options) -> list[tuple[str, int]]:
    """`options.images` JPEGs, from all over the folder."""
    assert options.root is not None  # `table` sees to it
    found = sorted(p for p in options.root.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise UserError(f"no JPEGs under {options.root} (root)")
    return [(str(path), 0) for path in found[:: max(1, len(found) // options.images)]][: options.images]
