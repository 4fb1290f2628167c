"""Descriptors on disk: a folder of `.npy` shards of `SHARD` images, which are complete or absent."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, cache_dir, remove_parts

SHARD = 16  # images
VIEWS = 2  # the evaluation crop and its mirror image, which only training reads

KEY = re.compile("[0-9a-f]{16}")  # name of a store's folder, and of its lock
ABOUT = "store.json"


def stores_dir() -> Path:
    """Return the folder of all stores: $BCNN_STORES, or one in the cache folder."""
    return Path(os.environ.get("BCNN_STORES", cache_dir() / "stores")).expanduser()


def key_of(identity: dict[str, Any]) -> str:
    """Return the key under which something is cached that these plain values determine."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class FeatureStore:
    """Descriptors of a list of images: number 2·i is of image i, number 2·i + 1 of its mirror image.

    Shards without images of `mirrored` (None: all) have no mirror images until a run needs them. The
    store of the same identity, images, width and dtype is the same one; `about` is for `bcnn cache`.
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
        self.key = key_of({"identity": identity, "images": images, "width": width, "dtype": dtype})
        self.folder = stores_dir() / self.key
        self.images, self.width, self.dtype, self.about = images, width, np.dtype(dtype), about
        self.shards = -(-images // SHARD)
        self._mirrored = None if mirrored is None else {image // SHARD for image in mirrored}
        self._found: dict[int, tuple[str, int, int]] = {}  # file, offset of its data, views

    @property
    def nbytes(self) -> int:
        """Size of the complete store on disk."""
        descriptors = sum(len(self.shard_images(k)) * self.views(k) for k in range(self.shards))
        return descriptors * self.width * self.dtype.itemsize

    def lock(self) -> FileLock:
        """Return the lock of whoever builds the store."""
        return FileLock(stores_dir() / f"{self.key}.lock")

    def open(self) -> list[int]:
        """Remove what killed runs left, under the lock, and return the shards to be computed."""
        remove_parts(self.folder)
        with atomic_write(self.folder / ABOUT) as part:
            part.write_text(json.dumps({"about": self.about}))
        return self.scan()

    def scan(self) -> list[int]:
        """Look for complete shards, and return the missing ones."""
        self._found = {}
        for shard in range(self.shards):
            for views in range(self.views(shard), VIEWS + 1):
                path, images = self._path(shard, views), len(self.shard_images(shard))
                # numpy compares the header with the size of the file
                with suppress(FileNotFoundError, ValueError, EOFError):
                    array = np.load(path, mmap_mode="r")
                    if array.shape == (images, views, self.width) and array.dtype == self.dtype:
                        self._found[shard] = (str(path), array.offset, views)
        return [shard for shard in range(self.shards) if shard not in self._found]

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
                f"{error}: free {self.nbytes / 1e9:.1f} GB and run again, set BCNN_STORES to a folder "
                "on another disk, or choose last=sgd last.store=false"
            ) from error

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Return descriptors (len(numbers), width) by number.

        Plain reads, since the pages of a memory map would count as this process's memory.
        """
        descriptors = np.empty((len(numbers), self.width), self.dtype)
        for number, descriptor in zip(numbers, descriptors, strict=True):
            image, view = divmod(number, VIEWS)
            path, offset, views = self._found[image // SHARD]
            if view >= views:
                raise IndexError(f"descriptor {number} is of a mirror image that was not asked for")
            with open(path, "rb", buffering=0) as file:
                file.seek(offset + (image % SHARD * views + view) * descriptor.nbytes)
                if file.readinto(descriptor.data) != descriptor.nbytes:
                    raise UserError(f"{path} was cut short while in use: run again")
        return descriptors

    def _path(self, shard: int, views: int) -> Path:
        """Name the views, so that a shard with more of them replaces none that another run reads."""
        return self.folder / f"{shard:06d}-{views}.npy"


def remove_store(folder: Path) -> None:
    """Remove a store; raise OSError where its folder holds anything else."""
    remove_parts(folder)
    for path in (*folder.glob("[0-9]*-[12].npy"), folder / ABOUT):
        path.unlink()
    folder.rmdir()


def read_about(folder: Path) -> dict[str, Any]:
    """Return what a store belongs to; empty where that cannot be read."""
    try:
        return dict(json.loads((folder / ABOUT).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}
