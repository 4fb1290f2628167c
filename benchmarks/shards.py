"""Photographs in tar shards: members in place, at random and in order, beside files; on one core."""

import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import photographs
from harness import Options, compare, parser
from PIL import Image

from bcnn.data import urls
from bcnn.data.image_io import decode, load_image, open_image

DRAWN = 100  # different photographs; the others are copies


def files(options: Options) -> dict[str, float]:
    """Time files, drawn at random."""
    paths = [f"{options.root}/photos/{name}" for name in _names(options)]
    return _seconds(load_image(path, options.size) for path in paths)


def in_place(options: Options, reopened: bool = False) -> dict[str, float]:
    """Time members, drawn at random, after the index of the shard was read; or with it, for each."""

    def load(name: str) -> Image.Image:
        if reopened:
            urls._archive.cache_clear()
        return load_image(f"tar://{name}::{options.root}/shard.tar", options.size)

    names = _names(options)
    load(names[0])
    return _seconds(load(name) for name in names[: 20 if reopened else None])


def reopened(options: Options) -> dict[str, float]:
    """Time members where the index is read for each."""
    return in_place(options, reopened=True)


def in_order(options: Options) -> dict[str, float]:
    """Time members one after the other, as WebDataset reads them."""
    with tarfile.open(f"{options.root}/shard.tar", "r|") as tar:
        contents = (BytesIO(tar.extractfile(member).read()) for member in tar)  # type: ignore[union-attr]
        return _seconds(decode(open_image(content), options.size) for content in contents)


def _names(options: Options) -> list[str]:
    drawn = np.random.default_rng(0).integers(options.members, size=options.images)
    return [f"{number:05}.jpg" for number in drawn]


def _seconds(images: Iterable[Image.Image]) -> dict[str, float]:
    """Return the processor seconds an image takes, where other work does not count."""
    start = time.process_time()
    count = sum(1 for _ in images)
    return {"seconds": (time.process_time() - start) / count}


if __name__ == "__main__":
    asked = parser(__doc__, "size", "images", "members").parse_args()
    with tempfile.TemporaryDirectory() as asked.root:
        root = Path(asked.root)
        photographs.write(root / "drawn", (500, 375), min(DRAWN, asked.members))
        drawn = sorted(root.glob("drawn/*/*.jpg"))
        (root / "photos").mkdir()
        with tarfile.open(root / "shard.tar", "w") as shard:
            for number in range(asked.members):
                copy = shutil.copy(drawn[number % len(drawn)], root / f"photos/{number:05}.jpg")
                shard.add(copy, copy.name)
        contenders = {
            "files, at random": files,
            "members, at random": in_place,
            "and an index for each": reopened,
            "members, in order": in_order,
        }
        compare(f"{asked.members} JPEGs of 500 × 375 px, one core", contenders, asked)
