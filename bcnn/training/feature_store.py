"""Descriptors on disk, by image: a folder of `.npy` shards, which are complete or absent."""

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
from bcnn.utils.files import atomic_write, cache_dir, read_json, remove_parts

DTYPE = np.dtype("float16")  # of descriptors on disk
SHARD = 16  # images at most
VIEWS = 2  # the evaluation crop and its mirror image, which only training reads

KEY = re.compile("[0-9a-f]{16}")  # name of a store's folder, and of its lock
ABOUT = "store.json"
SHARDS = "[0-9a-f]" * 16 + ".npy"  # pattern of their names


def stores_dir() -> Path:
    """Return the folder of all stores: $BCNN_STORES, or one in the cache folder."""
    return Path(os.environ.get("BCNN_STORES", cache_dir() / "stores")).expanduser()


def key_of(identity: dict[str, Any]) -> str:
    """Return the key under which something is cached that these plain values determine."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class FeatureStore:
    """Descriptors by image: of a list, number 2·i is of image i, number 2·i + 1 of its mirror image.

    The store of the same identity and width is the same one, whatever the list: images that it lacks
    are added in shards. A shard without images of `mirrored` has no mirror images.

    Args:
        digests: of the images of the list; copies of a file have one descriptor.
        about: what the images are, for `bcnn cache`.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        digests: Sequence[str],
        width: int,
        mirrored: Iterable[int],
        about: str,
    ) -> None:
        self.key = key_of({"identity": identity, "width": width})
        self.folder = stores_dir() / self.key
        self.digests, self.width, self.about = digests, width, about
        self._needed = dict.fromkeys(digests, 1)  # views
        for image in mirrored:
            self._needed[digests[image]] = VIEWS
        self._found: dict[str, tuple[str, int, int]] = {}  # file, offset of its descriptors, views

    @property
    def missing_bytes(self) -> int:
        """Size of the shards to be computed."""
        descriptors = sum(len(shard) * self.views(shard) for shard in self.scan())
        return descriptors * self.width * DTYPE.itemsize

    def lock(self) -> FileLock:
        """Return the lock of whoever adds to the store."""
        return FileLock(stores_dir() / f"{self.key}.lock")

    def open(self) -> list[list[str]]:
        """Remove what killed runs left, under the lock, and return the shards to be computed."""
        remove_parts(self.folder)
        origins = dict.fromkeys([*read_about(self.folder), self.about])
        with atomic_write(self.folder / ABOUT) as part:
            part.write_text(json.dumps([*origins]))
        return self.scan()

    def scan(self) -> list[list[str]]:
        """Look for the images in complete shards; return the digests of the others, by shard."""
        found: dict[str, tuple[str, int, int]] = {}
        for path in self.folder.glob(SHARDS):
            # A file that was cut short raises one of these.
            with suppress(FileNotFoundError, ValueError, EOFError), path.open("rb") as file:
                array = np.load(path, mmap_mode="r")
                file.seek(array.offset + array.nbytes)
                digests, views = np.load(file).tolist(), array.shape[1]
                if array.shape != (len(digests), views, self.width) or array.dtype != DTYPE:
                    continue
                starts = range(array.offset, array.offset + array.nbytes, array.strides[0])
                for digest, start in zip(digests, starts, strict=True):
                    if views > found.get(digest, ("", 0, 0))[2]:
                        found[digest] = str(path), start, views
        self._found = {digest: found[digest] for digest in self._needed if digest in found}
        missing = [d for d, views in self._needed.items() if d not in found or found[d][2] < views]
        return in_shards(missing)

    def views(self, shard: Iterable[str]) -> int:
        """Return how many descriptors of each image a shard needs."""
        return max(self._needed[digest] for digest in shard)

    def write(self, shard: Sequence[str], descriptors: np.ndarray) -> None:
        """Write a shard: float16 (images, views, width), and the digests."""
        name = key_of({"images": shard, "views": descriptors.shape[1]})
        try:
            with atomic_write(self.folder / f"{name}.npy") as part, part.open("wb") as file:
                np.save(file, descriptors)
                np.save(file, np.array(shard))
        except UserError as error:
            raise UserError(
                f"{error}: free {self.missing_bytes / 1e9:.1f} GB and run again, set BCNN_STORES to a "
                "folder on another disk, or choose last=sgd last.store=false"
            ) from error

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Return descriptors (len(numbers), width) by number.

        Plain reads, since the pages of a memory map would count as this process's memory.
        """
        descriptors = np.empty((len(numbers), self.width), DTYPE)
        for number, descriptor in zip(numbers, descriptors, strict=True):
            image, view = divmod(number, VIEWS)
            path, offset, views = self._found[self.digests[image]]
            if view >= views:
                raise IndexError(f"descriptor {number} is of a mirror image that was not asked for")
            with open(path, "rb", buffering=0) as file:
                file.seek(offset + view * descriptor.nbytes)
                if file.readinto(descriptor.data) != descriptor.nbytes:
                    raise UserError(f"{path} was cut short while in use: run again")
        return descriptors


def in_shards(digests: Iterable[str]) -> list[list[str]]:
    """Return digests by shard, each digest once; only the last shard may have fewer images."""
    each = [*dict.fromkeys(digests)]
    return [each[i : i + SHARD] for i in range(0, len(each), SHARD)]


def remove_store(folder: Path) -> None:
    """Remove a store; raise OSError where its folder holds anything else."""
    remove_parts(folder)
    for path in (*folder.glob(SHARDS), folder / ABOUT):
        path.unlink()
    folder.rmdir()


def read_about(folder: Path) -> list[str]:
    """Return which images a store was used for; none where it was not used yet."""
    file = folder / ABOUT
    return [*read_json(file)] if file.is_file() else []
