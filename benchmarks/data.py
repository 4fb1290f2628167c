"""Loading: training crops of JPEGs by torchvision's plain pipeline and by this project, on one core."""

import tempfile
import time
from functools import partial
from pathlib import Path

import photographs
import torch
from harness import Options, compare, parser
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from bcnn.data.datamodule import FineGrainedDataModule

SIZES = ((500, 375), (4000, 3000))  # pixels: as in the usual sets, and as from a camera
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EPOCHS = 3


def plain(options: Options) -> dict[str, float]:
    """Time the usual transforms: on the whole image, and in floating point."""
    crop = [transforms.Resize(options.size), transforms.RandomCrop(options.size)]
    tensor = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    images = ImageFolder(options.root, transforms.Compose([*crop, *tensor]))
    return _seconds(DataLoader(images, options.batch, shuffle=True))


def project(options: Options, cache: bool = False) -> dict[str, float]:
    """Time this project's crops; with `cache`, the epoch that is not timed makes the copies."""
    settings = {"num_workers": 0, "val_fraction": 0, "test_fraction": 0, "cache": cache}
    data = FineGrainedDataModule(options.root, size=options.size, batch_size=options.batch, **settings)
    data.setup()
    return _seconds(data.train_dataloader())


def _seconds(loader: DataLoader) -> dict[str, float]:
    """Return the processor seconds an image takes in this process, where other work does not count."""
    torch.set_num_threads(1)
    list(loader)
    start = time.process_time()
    count = sum(len(images) for _ in range(EPOCHS) for images, _ in loader)
    return {"seconds": (time.process_time() - start) / count}


if __name__ == "__main__":
    asked = parser(__doc__, "size", "batch", "images", "root").parse_args()
    contenders = {
        "torchvision": plain,
        "bcnn": project,
        "bcnn, data.cache=true": partial(project, cache=True),
    }
    with tempfile.TemporaryDirectory() as scratch:
        roots = {f"JPEGs in {asked.root}": asked.root} if asked.root else {}
        for width, height in () if asked.root else SIZES:
            root = Path(scratch, f"{width}")
            photographs.write(root, (width, height), asked.images)
            roots[f"JPEGs of {width} × {height} px"] = str(root)
        for name, asked.root in roots.items():
            compare(f"{name} to crops of {asked.size} px, one core", contenders, asked)
