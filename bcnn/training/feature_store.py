"""Descriptors on disk: a folder of `.npy` shards, each of `SHARD` images.

A shard appears under its name once it is complete, so a build that was interrupted resumes with the
shards that are missing.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from bcnn.utils.errors import UserError
from bcnn.utils.files import PART, atomic_write, cache_dir

SHARD = 16  # images
VIEWS = 2  # the evaluation crop and its mirror image, which only training reads

KEY = re.compile("[0-9a-f]{16}")  # name of a store's folder, and of its lock
ABOUT = "store.json"


def stores_dir() -> Path:
    """Return the folder of all stores: $BCNN_STORES, or one in the cache folder."""
    return Path(os.environ.get("BCNN_STORES", cache_dir() / "stores")).expanduser()


class FeatureStore:
    """Descriptors of a list of images: number 2·i is of image i, number 2·i + 1 of its mirror image.

    Shards without training images have no mirror images until a run needs them.

    Args:
        identity: what determines the descriptors; any change of it leads to another store.
        images: number of images.
        width: entries of a descriptor.
        dtype: of the entries on disk.
        about: what `bcnn cache` shows; not part of the identity.
        mirrored: the images whose mirror image is read as well; None: all.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        images: int,
        width: int,
        dtype: str = "float16",
        about: str = "",
        mirrored: Iterable[int] | None = None,
    ) -> None:
        known = {"identity": identity, "images": images, "width": width, "dtype": dtype}
        self.key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = stores_dir() / self.key
        self.images = images
        self.width = width
        self.dtype = np.dtype(dtype)
        self.about = about
        self.shards = -(-images // SHARD)
        self._mirrored = None if mirrored is None else {image // SHARD for image in mirrored}
        self._found: dict[int, tuple[str, int, int]] = {}  # file, offset of its data, views

    @property
    def descriptors(self) -> int:
        """Number of descriptors in the complete store."""
        return sum(len(self.shard_images(k)) * self.views(k) for k in range(self.shards))

    @property
    def nbytes(self) -> int:
        """Size of the complete store on disk."""
        return self.descriptors * self.width * self.dtype.itemsize

    @property
    def missing(self) -> list[int]:
        """Shards that `scan` has not found."""
        return [shard for shard in range(self.shards) if shard not in self._found]

    def lock(self) -> FileLock:
        """Return the lock of whoever builds the store."""
        stores_dir().mkdir(parents=True, exist_ok=True)
        return FileLock(stores_dir() / f"{self.key}.lock")

    def open(self) -> list[int]:
        """Remove what killed runs left, under the lock, and return the shards to be computed."""
        for path in self.folder.glob(f"{PART}*"):
            path.unlink()
        with atomic_write(self.folder / ABOUT) as part:
            part.write_text(json.dumps({"about": self.about}))
        return self.scan()

    def scan(self) -> list[int]:
        """Look for complete shards, and return the missing ones."""
        self._found = {}
        for shard in range(self.shards):
            for views in range(self.views(shard), VIEWS + 1):
                path = self._path(shard, views)
                try:  # numpy compares the header with the size of the file
                    array = np.load(path, mmap_mode="r")
                except (FileNotFoundError, ValueError, EOFError):
                    continue
                expected = (len(self.shard_images(shard)), views, self.width)
                if array.shape == expected and array.dtype == self.dtype:
                    self._found[shard] = (str(path), array.offset, views)
        return self.missing

    def views(self, shard: int) -> int:
        """Return how many descriptors of each image a shard needs."""
        return VIEWS if self._mirrored is None or shard in self._mirrored else 1

    def shard_images(self, shard: int) -> range:
        """Return the positions of a shard's images."""
        return range(shard * SHARD, min((shard + 1) * SHARD, self.images))

    def write(self, shard: int, descriptors: np.ndarray) -> None:
        """Write a shard: (images, views, width), finite in the dtype on disk."""
        try:
            with atomic_write(self._path(shard, descriptors.shape[1])) as part:
                np.save(part, descriptors.astype(self.dtype, copy=False))
        except UserError as error:
            raise UserError(
                f"{error}: free {self.nbytes / 1e9:.1f} GB there and run again (finished shards are "
                "kept), set BCNN_STORES to a folder on another disk, or choose last=sgd "
                "last.store=false"
            ) from error

    def read(self, numbers: Sequence[int], out: np.ndarray) -> None:
        """Read descriptors by number, in this order, into `out` (len(numbers), width).

        Plain reads, since the pages of a memory map would count as this process's memory.
        """
        for number, descriptor in zip(numbers, out, strict=True):
            image, view = divmod(number, VIEWS)
            path, offset, views = self._found[image // SHARD]
            if view >= views:
                raise IndexError(f"descriptor {number} is of a mirror image that was not asked for")
            with open(path, "rb", buffering=0) as file:
                file.seek(offset + (image % SHARD * views + view) * descriptor.nbytes)
                if file.readinto(descriptor.data) != descriptor.nbytes:
                    raise UserError(f"{path} was cut short while in use: run again")

    def _path(self, shard: int, views: int) -> Path:
        """Name the views, so that a shard with more of them replaces none that another run reads."""
        return self.folder / f"{shard:06d}-{views}.npy"


def read_about(folder: Path) -> dict[str, Any]:
    """Return what a store belongs to; empty where that cannot be read."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
