"""Descriptors on disk.

A store is a folder of chunks, each the rows of `CHUNK` images. The name of a chunk holds its checksum,
so a chunk that was cut short, altered or lost is seen when the store is opened: whatever does not
verify is missing, and only that is computed again.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from bcnn.utils.environment import cores
from bcnn.utils.errors import UserError
from bcnn.utils.files import PART, atomic_write, cache_dir
from bcnn.utils.progress import track

CHUNK = 16  # images
VIEWS = 2  # the evaluation crop and its mirror image, which training alone reads

KEY = re.compile("[0-9a-f]{16}")  # name of a store's folder, and of its lock
ROWS = re.compile(r"([0-9]{6,})-([0-9a-f]{8})\.rows")  # number and checksum of a chunk
ABOUT = "store.json"
LEFT = re.compile(rf"{re.escape(PART)}.*|.*\.tmp")  # by runs that were killed; .tmp in those of before
OURS = (re.compile(re.escape(ABOUT)), ROWS, LEFT)


def stores_dir() -> Path:
    """Where the stores are: $BCNN_STORES, or in the cache folder."""
    return Path(os.environ.get("BCNN_STORES", cache_dir() / "stores")).expanduser()


def made_stores_dir() -> Path:
    """`stores_dir`, made where there is none.

    Raises:
        UserError: it cannot be made.
    """
    try:
        stores_dir().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{stores_dir()} cannot be made ({error.strerror}): set BCNN_STORES to another folder"
        ) from error
    return stores_dir()


class FeatureStore:
    """Rows of one image list: row 2·i is image i's descriptor, row 2·i + 1 its mirror image's.

    Chunks without an image that is mirrored have no rows of mirror images, until somebody needs them.

    Args:
        identity: what determines the rows; any change of it leads to another store.
        images: number of images.
        width: entries a row.
        dtype: of the entries on disk.
        about: what the command `cache` says it belongs to; not part of the identity.
        mirrored: the images whose mirror image is read, too; None: all.
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
        rows = {"rows": identity, "images": images, "width": width, "entries": dtype}
        self.key = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = stores_dir() / self.key
        self.images = images
        self.width = width
        self.dtype = np.dtype(dtype)
        self.about = about
        self._mirrored = None if mirrored is None else {image // CHUNK for image in mirrored}
        self._chunks: dict[int, tuple[Path, int]] = {}  # and how many views it has of an image

    @property
    def rows(self) -> int:
        """How many there are, complete."""
        return sum(len(self.chunk_images(c)) * self.views(c) for c in range(self.chunk_count))

    @property
    def nbytes(self) -> int:
        """Size of the rows on disk, complete."""
        return self.rows * self.width * self.dtype.itemsize

    @property
    def chunk_count(self) -> int:
        return -(-self.images // CHUNK)

    @property
    def complete(self) -> bool:
        """Whether every chunk was found."""
        return len(self._chunks) == self.chunk_count

    def lock(self) -> FileLock:
        """Held while the store is verified and built, so that two runs do not both build it."""
        return FileLock(made_stores_dir() / f"{self.key}.lock")

    def open(self) -> tuple[list[int], int]:
        """Verify every chunk, under the lock; what is damaged or left over is removed.

        Returns:
            The chunks still to be computed, and how many of them were there but damaged (these
            are removed).
        """
        about = {"about": self.about, "images": self.images, "chunks": self.chunk_count}
        if read_about(self.folder) != about:
            with atomic_write(self.folder / ABOUT) as part:
                part.write_text(json.dumps(about, indent=1))
        damaged = self.find_chunks()
        for path in (*damaged, *files(self.folder, LEFT)):
            path.unlink(missing_ok=True)
        missing = [c for c in range(self.chunk_count) if c not in self._chunks]
        return missing, len(damaged)

    def find_chunks(self) -> list[Path]:
        """Verify every chunk and change nothing; returns the damaged ones."""
        found = files(self.folder, ROWS)
        with ThreadPoolExecutor(cores()) as pool:  # zlib lets go of the interpreter's lock
            verified = pool.map(self._verified_views, found)
            views = list(track(verified, "verifying descriptors", len(found), "chunks"))
        self._chunks = {}
        for path, count in zip(found, views, strict=True):
            chunk = int(path.name.split("-")[0])
            if count and count >= self.views(chunk):
                self._chunks[chunk] = path, count
        return [path for path, count in zip(found, views, strict=True) if not count]

    def _verified_views(self, path: Path) -> int:
        """How many views of its images a chunk has; 0 where it is damaged."""
        chunk, checksum = path.stem.split("-")
        row = self.width * self.dtype.itemsize
        try:
            views, rest = divmod(path.stat().st_size, len(self.chunk_images(int(chunk))) * row or 1)
            complete = not rest and 0 < views <= VIEWS
            return views * (complete and checksum == f"{zlib.crc32(path.read_bytes()):08x}")
        except OSError:
            return 0

    def views(self, chunk: int) -> int:
        """How many rows a chunk has to have of each of its images."""
        return VIEWS if self._mirrored is None or chunk in self._mirrored else 1

    def chunk_images(self, chunk: int) -> range:
        """Positions of the images whose rows the chunk holds."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.images))

    def write(self, chunk: int, rows: np.ndarray) -> None:
        """Keep the rows of `chunk_images(chunk)`: (images · views, width), finite in the dtype on disk.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        content = rows.astype(self.dtype).tobytes()
        path = self.folder / f"{chunk:06d}-{zlib.crc32(content):08x}.rows"
        try:
            with atomic_write(path) as part:
                part.write_bytes(content)
        except UserError as error:
            raise UserError(
                f"{error}: free {self.nbytes / 1e9:.1f} GB there and run again (what is complete is "
                "kept), set BCNN_STORES to a folder on another disk, or choose last=sgd "
                "last.store=false"
            ) from error
        self._chunks[chunk] = path, len(rows) // len(self.chunk_images(chunk))

    def read(self, rows: Sequence[int], out: np.ndarray) -> None:
        """Rows by index, in the order asked for, into (len(rows), width), in the dtype on disk.

        Read with ordinary file reads, not a memory map: mapped pages would count as this process's
        memory until somebody else needs it.
        """
        for row, place in zip(rows, out, strict=True):
            image, view = divmod(row, VIEWS)
            path, views = self._chunks[image // CHUNK]
            if view >= views:
                raise IndexError(f"row {row} is of a mirror image that was not asked for")
            try:
                with path.open("rb", buffering=0) as file:
                    file.seek((image % CHUNK * views + view) * place.nbytes)
                    read = file.readinto(place.data)
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}): run again") from error
            if read != place.nbytes:
                raise UserError(f"{path} was cut short while in use: run again")


def files(folder: Path, *names: re.Pattern[str]) -> list[Path]:
    """Files of a folder whose names are of these forms."""
    found = (path for path in folder.glob("*") if any(name.fullmatch(path.name) for name in names))
    return sorted(path for path in found if path.is_file())


def read_about(folder: Path) -> dict[str, Any]:
    """What a store says it belongs to; nothing where it cannot be read."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}
