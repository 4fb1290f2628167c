"""Descriptors on disk, and the command that lists and removes them.

A store is a folder of chunks, each the rows of `CHUNK` images. A chunk is written under another name
and then renamed to one that holds its checksum, so a chunk that was cut short, altered or lost is
seen when the store is opened: whatever does not verify is missing, and only that is computed again.
"""

import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from bcnn.errors import UserError
from bcnn.options import command
from bcnn.terminal import say

USAGE = """
python -m bcnn.store                    lists the descriptor stores: key, size, what they belong to
python -m bcnn.store remove=KEY[,KEY]   removes these; remove=all: every one

They are in $BCNN_STORES, or in ~/.cache/bcnn/stores.
"""

CHUNK = 16  # images
VIEWS = 2  # the evaluation crop and its mirror image


def stores_dir() -> Path:
    """Where the stores are: $BCNN_STORES, or ~/.cache/bcnn/stores."""
    return Path(os.environ.get("BCNN_STORES", "~/.cache/bcnn/stores")).expanduser()


class DescriptorStore:
    """Rows of one image list: row 2·i is image i's descriptor, row 2·i + 1 its mirror image's.

    Args:
        identity: what determines the rows; any change of it leads to another store.
        images: number of images.
        width: entries a row.
        dtype: of the entries on disk.
        about: what `python -m bcnn.store` says it belongs to; not part of the identity.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        images: int,
        width: int,
        dtype: str = "float16",
        about: str = "",
    ) -> None:
        whole = {"rows": identity, "images": images, "width": width, "entries": dtype}
        self.key = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = stores_dir() / self.key
        self.images = images
        self.width = width
        self.dtype = np.dtype(dtype)
        self.about = about
        self._chunks: dict[int, Path] = {}

    @property
    def nbytes(self) -> int:
        """Size of the rows on disk, complete."""
        return self.images * VIEWS * self.width * self.dtype.itemsize

    @property
    def chunk_count(self) -> int:
        return -(-self.images // CHUNK)

    def lock(self) -> FileLock:
        """Held while the store is verified and built, so that two runs do not both build it."""
        stores_dir().mkdir(parents=True, exist_ok=True)
        return FileLock(stores_dir() / f"{self.key}.lock")

    def open(self) -> tuple[list[int], int]:
        """Verify every chunk, under the lock; what is damaged or left over is removed.

        Returns:
            The chunks still to be computed, and how many of them were there but damaged (these
            are removed).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"about": self.about, "images": self.images, "chunks": self.chunk_count}
        _write(self.folder / "store.json", json.dumps(about, indent=1).encode())
        for leftover in self.folder.glob("*.tmp"):  # of a run that was killed
            leftover.unlink()
        damaged = self.find_chunks()
        for path in damaged:
            path.unlink()
        missing = [c for c in range(self.chunk_count) if c not in self._chunks]
        return missing, len(damaged)

    def find_chunks(self) -> list[Path]:
        """Verify every chunk and change nothing; returns the damaged ones."""
        found = sorted(self.folder.glob("*.rows"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # zlib lets go of the interpreter's lock
            intact = list(pool.map(_verifies, found))
        chunks = zip(found, intact, strict=True)
        self._chunks = {int(path.name.split("-")[0]): path for path, good in chunks if good}
        return [path for path, good in zip(found, intact, strict=True) if not good]

    def chunk_images(self, chunk: int) -> range:
        """Positions of the images whose rows the chunk holds."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.images))

    def write(self, chunk: int, rows: np.ndarray) -> None:
        """Keep the rows of `chunk_images(chunk)`: (images · 2, width).

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        content = rows.astype(self.dtype).tobytes()
        path = self.folder / f"{chunk:06d}-{zlib.crc32(content):08x}.rows"
        try:
            _write(path, content)
        except OSError as error:
            raise UserError(
                f"cannot write descriptors to {self.folder} ({error.strerror}): free "
                f"{self.nbytes / 1e9:.1f} GB there and run again (what is complete is kept), set "
                "BCNN_STORES to a folder on another disk, or choose last=sgd last.store=false"
            ) from error
        self._chunks[chunk] = path

    def read(self, rows: Sequence[int], out: np.ndarray) -> None:
        """Rows by index, in the order asked for, into (len(rows), width), in the dtype on disk.

        Read with ordinary file reads, not a memory map: mapped pages would count as this process's
        memory until somebody else needs it.
        """
        for row, place in zip(rows, out, strict=True):
            chunk, offset = divmod(row, CHUNK * VIEWS)
            with self._chunks[chunk].open("rb", buffering=0) as file:
                file.seek(offset * place.nbytes)
                if file.readinto(place.data) != place.nbytes:
                    raise UserError(f"{file.name} was cut short while in use: run again")


def _verifies(path: Path) -> bool:
    return path.stem.split("-")[-1] == f"{zlib.crc32(path.read_bytes()):08x}"


def _write(path: Path, content: bytes) -> None:
    """All of the file or none of it."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _stores() -> Iterator[tuple[Path, str]]:
    for file in sorted(stores_dir().glob("*/store.json")):
        folder = file.parent
        entry = json.loads(file.read_text())
        chunks = list(folder.glob("*.rows"))
        size = sum(chunk.stat().st_size for chunk in chunks) / 1e6
        share = f"{len(chunks) / entry['chunks']:.0%} built"
        yield folder, f"{folder.name}  {size:9.1f} MB  {share:>10}  {entry['about']}"


@dataclass
class Options:
    """See the usage."""

    remove: str = ""


def main(options: Options) -> int:
    """List the stores, or remove those whose keys are given."""
    stores = {folder.name: (folder, line) for folder, line in _stores()}
    if not options.remove:
        say(f"{len(stores)} stores in {stores_dir()}")
        say(*(line for _, line in stores.values()))
        return 0
    keys = list(stores) if options.remove == "all" else options.remove.split(",")
    unknown = sorted(set(keys) - set(stores))
    if unknown:
        raise UserError(f"no such store: {', '.join(unknown)}; python -m bcnn.store lists them")
    for key in keys:
        with FileLock(stores_dir() / f"{key}.lock"):
            shutil.rmtree(stores[key][0])
        say(f"removed {stores[key][1]}")
    return 0


if __name__ == "__main__":
    sys.exit(command(Options, main, USAGE))
