"""Every image decoded once before any training, and what that found remembered.

A file is checked again only when its size or its time of change is another, or when it was broken.
"""

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from rich.progress import track

from bcnn.data.decoding import VERSION, load_image
from bcnn.data.formats import open_image
from bcnn.errors import UserError

State = tuple[int, int]  # size in bytes and time of change in ns: tell a file from its later versions


@dataclass(frozen=True)
class Finding:
    """What is known of a file: its pixels' digest and what Pillow calls its format; or an error."""

    format: str = ""
    width: int = 0  # px, as stored: before an EXIF rotation
    height: int = 0
    digest: str = ""
    flat: bool = False  # of one colour throughout
    error: str = ""


def check(source: Path, paths: Sequence[str]) -> dict[str, Finding]:
    """Decode every image, several at a time, but for those that are remembered.

    Args:
        source: the folder or list that the images are of.
        paths: the images.

    Raises:
        UserError: the cache folder cannot be written.
    """
    memory = cache_file(source, ".json")
    with FileLock(memory.with_suffix(".lock")):  # runs that start together check once
        known = _load(memory)
        places = {path: os.path.abspath(path) for path in paths}
        states = {path: _state(path) for path in paths}
        found = {
            path: known[place][1]
            for path, place in places.items()
            if place in known and known[place][0] == states[path]
        }
        todo = [path for path in places if path not in found]
        if todo:
            try:
                _inspect_all(todo, found)
            finally:  # an interrupted check goes on from where it was
                new = {places[path]: (states[path], finding) for path, finding in found.items()}
                _save(memory, known | new)
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
        pixels = load_image(path, side=1)
        digest = hashlib.blake2b(repr(pixels.size).encode(), digest_size=16)
        digest.update(pixels.tobytes())
        flat = _is_flat(pixels) and _is_flat(load_image(path))
        return Finding(kind, width, height, digest.hexdigest(), flat)
    except Exception as error:  # decoders raise whatever the bytes lead them into
        return Finding(error=_reason(error.__cause__ or error))


def broken(findings: dict[str, Finding]) -> dict[str, str]:
    """The images that cannot be decoded, and why."""
    return {path: finding.error for path, finding in findings.items() if finding.error}


def write_broken(source: Path, reasons: dict[str, str]) -> Path:
    """Write a line `path<TAB>reason` for each broken image; returns the file."""
    file = cache_file(source, "-broken.txt")
    with file.open("w", encoding="utf-8", errors="surrogateescape") as out:
        out.writelines(f"{os.path.abspath(path)}\t{reason}\n" for path, reason in reasons.items())
    return file


def cache_file(source: Path, suffix: str) -> Path:
    """A file about `source` in $XDG_CACHE_HOME/bcnn/checks, or in ~/.cache/bcnn/checks."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "bcnn" / "checks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): set XDG_CACHE_HOME to a folder to write to"
        ) from error
    absolute = os.path.abspath(source)
    key = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:8]
    return folder / f"{os.path.basename(absolute)}-{key}{suffix}"


def _is_flat(pixels: Image.Image) -> bool:
    return pixels.getcolors(1) is not None


def _inspect_all(paths: Sequence[str], found: dict[str, Finding]) -> None:
    # Threads: Pillow lets go of the interpreter's lock while it decodes.
    pool = ThreadPoolExecutor(os.cpu_count())
    quiet = getattr(rank_zero_only, "rank", 0) != 0
    try:
        results: Iterable[Finding] = pool.map(inspect, paths)
        progress = track(results, "Checking images", total=len(paths), disable=quiet)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about what it can live with
            for path, finding in zip(paths, progress, strict=True):
                found[path] = finding
    finally:
        pool.shutdown(cancel_futures=True)


def _state(path: str) -> State:
    try:
        status = os.stat(path)
    except OSError:  # gone, or a link to nowhere: `inspect` says so
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


def _load(memory: Path) -> dict[str, tuple[State, Finding]]:
    try:
        remembered = json.loads(memory.read_text())
        entries = remembered["files"] if remembered["version"] == VERSION else {}
        return {path: ((size, time), Finding(*rest)) for path, (size, time, *rest) in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none yet, or damaged
        return {}


def _save(memory: Path, known: dict[str, tuple[State, Finding]]) -> None:
    """Keep what is known of the intact files: a broken one may be intact with another Pillow."""
    entries = {
        path: [*state, *astuple(finding)]
        for path, (state, finding) in known.items()
        if not finding.error
    }
    temporary = memory.with_suffix(".tmp")
    with suppress(OSError):  # without room for it, the next run checks again
        temporary.write_text(json.dumps({"version": VERSION, "files": entries}))
        temporary.replace(memory)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
