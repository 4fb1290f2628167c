"""Every image decoded once before any training, and what that found remembered.

A file is checked again only when its size or its time of change is another, or when it was broken.
"""

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from bcnn.data.formats import open_image
from bcnn.data.image_io import VERSION, decode, load_image
from bcnn.utils.environment import cores
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, cache_folder
from bcnn.utils.progress import track

CHUNK = 32  # images that a thread takes at a time: handing over costs as much as a small one

# Size in bytes and time of change in ns, which tell a file from its later versions, and its finding.
ROW = np.dtype(
    [
        ("state", np.int64, 2),
        ("format", "S8"),
        ("width", np.int64),
        ("height", np.int64),
        ("digest", "S32"),
        ("flat", bool),
        ("look", np.uint64),
    ]
)
# The lowest frequencies of a discrete cosine transform of 32 × 32 pixels.
COSINES = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))


class Finding(NamedTuple):
    """What is known of a file: its pixels' digest and what Pillow calls its format; or an error."""

    format: str = ""
    width: int = 0  # px, as stored: before an EXIF rotation
    height: int = 0
    digest: str = ""
    flat: bool = False  # of one colour throughout
    look: int = 0  # 63 bits, of which images that look the same share nearly all
    error: str = ""


def check(source: Path, paths: Sequence[str]) -> dict[str, Finding]:
    """Decode every image, several at a time, but for those that are remembered.

    Args:
        source: the folder or list that the images are of.
        paths: the images.

    Raises:
        UserError: the cache folder cannot be written.
    """
    memory = cache_file(source, ".npz")
    with FileLock(memory.with_suffix(".lock")):  # runs that start together check once
        known, rows = _load(memory)
        places = paths if source.is_absolute() else [os.path.abspath(path) for path in paths]
        numbers = (number for path in paths for number in _state(path))
        states = np.fromiter(numbers, np.int64, 2 * len(paths)).reshape(-1, 2)
        row = dict(zip(known, range(len(rows)), strict=False))
        where = np.fromiter((row.get(place, -1) for place in places), np.int64, len(places))
        same = where >= 0
        same[same] = (rows["state"][where[same]] == states[same]).all(1)
        found = dict(zip(compress(paths, same), _findings(rows[where[same]]), strict=True))
        todo = [path for path in paths if path not in found]
        if todo:
            try:
                _inspect_all(todo, found)
            finally:  # an interrupted check goes on from where it was
                # A broken file is not remembered: it may be intact with another Pillow.
                intact = [i for i, p in enumerate(paths) if p in found and not found[p].error]
                others = np.setdiff1d(np.arange(len(rows)), where)
                new = _rows([found[paths[i]] for i in intact], states[intact])
                kept = [*(places[i] for i in intact), *(known[i] for i in others)]
                _save(memory, kept, np.concatenate([new, rows[others]]))
    return found


def inspect(path: str) -> Finding:
    """Decode an image as training does, to its last byte.

    JPEGs are decoded at an eighth of their size: all of the file is read and every coefficient
    decoded, so that every truncation shows, but most of the arithmetic is left out. What is of one
    colour then is decoded whole, to be certain.
    """
    try:
        with open_image(path) as image:
            kind, (width, height) = str(image.format), image.size
            pixels = decode(image, side=1)
        digest = hashlib.blake2b(repr(pixels.size).encode(), digest_size=16)
        digest.update(pixels.tobytes())
        flat = _is_flat(pixels) and _is_flat(load_image(path))
        return Finding(kind, width, height, digest.hexdigest(), flat, _look(pixels))
    except Exception as error:  # decoders raise whatever the bytes lead them into
        return Finding(error=_reason(error))


def broken(findings: dict[str, Finding]) -> dict[str, str]:
    """The images that cannot be decoded, and why."""
    return {path: finding.error for path, finding in findings.items() if finding.error}


def write_broken(source: Path, reasons: dict[str, str]) -> Path:
    """Write a line `path<TAB>reason` for each broken image; returns the file."""
    file = cache_file(source, "-broken.txt")
    lines = (f"{os.path.abspath(path)}\t{reason}\n" for path, reason in reasons.items())
    with atomic_write(file) as part:
        part.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    return file


def cache_file(source: Path, suffix: str) -> Path:
    """A file about `source` in the cache of checks."""
    absolute = os.path.abspath(source)
    key = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:8]
    return cache_folder("checks") / f"{os.path.basename(absolute)}-{key}{suffix}"


def _is_flat(pixels: Image.Image) -> bool:
    return pixels.getcolors(1) is not None


def _look(pixels: Image.Image) -> int:
    """Whether each of the lowest frequencies but the mean is above their median ("pHash").

    Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010, §3.2.1. The
    library that has it (imagehash) would bring another for wavelets, for these three lines.
    """
    small = pixels.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    low = (COSINES @ np.asarray(small, np.float32) @ COSINES.T).ravel()[1:]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def _inspect_all(paths: Sequence[str], found: dict[str, Finding]) -> None:
    # Threads: Pillow lets go of the interpreter's lock while it decodes.
    pool = ThreadPoolExecutor(cores())
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    try:
        results = chain.from_iterable(pool.map(lambda chunk: [inspect(p) for p in chunk], chunks))
        progress = track(results, "checking images", len(paths))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about what it can live with
            for path, finding in zip(paths, progress, strict=True):
                found[path] = finding
    finally:
        pool.shutdown(cancel_futures=True)


def _state(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # gone, or a link to nowhere: `inspect` says so
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


def _load(memory: Path) -> tuple[list[str], np.ndarray]:
    """The paths of the files that are remembered, and a row of each."""
    try:
        with np.load(memory) as remembered:
            rows = remembered["rows"]
            if remembered["version"] == VERSION and rows.dtype == ROW:
                return os.fsdecode(remembered["paths"].tobytes()).split("\0"), rows
    except Exception:  # none yet, or damaged: then numpy raises whatever the bytes lead it into
        pass
    return [], np.empty(0, ROW)


def _save(memory: Path, paths: list[str], rows: np.ndarray) -> None:
    names = np.frombuffer(os.fsencode("\0".join(paths)), np.uint8)
    with (
        suppress(UserError),
        atomic_write(memory) as file,
    ):  # without room for it, the next run checks again
        np.savez(file, version=VERSION, paths=names, rows=rows)


def _rows(findings: Sequence[Finding], states: np.ndarray) -> np.ndarray:
    rows = np.empty(len(findings), ROW)
    rows["state"] = states
    for name in Finding._fields[:-1]:
        rows[name] = [getattr(finding, name) for finding in findings]
    return rows


def _findings(rows: np.ndarray) -> Iterator[Finding]:
    formats = map(sys.intern, map(bytes.decode, rows["format"]))
    sizes = rows["width"].tolist(), rows["height"].tolist()
    digests = map(bytes.decode, rows["digest"])
    return map(Finding, formats, *sizes, digests, rows["flat"].tolist(), rows["look"].tolist())


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError) and error.__cause__:  # of `load_image`, which names the file
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
