"""Files that are whole or absent, whatever ends the process that writes them, and where they go."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from bcnn.utils.errors import UserError

PART = ".part-"  # begins the name of a file that is being written
FULL = 1 << 20  # bytes: a disk with less is full


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Where to write what `path` is to hold: a file beside it, of the same ending.

    When the block ends it is on the disk and takes the place of `path`; when the block raises it is
    removed, and `path` is as it was. A process that is killed leaves at most a file `.part-…`.

    Args:
        path: its folder is made where there is none.

    Raises:
        UserError: the file cannot be written, or the disk is full.
    """
    part = path.with_name(f"{PART}{os.getpid()}-{path.name[-50:]}")  # names have 255 bytes at most
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb+") as file:  # Windows writes out only what may be written
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    except Exception as error:
        # Libraries that write in C++ or Rust say it in their own words.
        with suppress(OSError):
            full = os.strerror(errno.ENOSPC) in str(error)
            if full or shutil.disk_usage(path.parent).free < FULL:
                raise UserError(f"{path} cannot be written: no space left on its disk") from error
        raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def refuse_unwritable(folder: Path) -> None:
    """Say before any work is done that its results could not be kept.

    Args:
        folder: is not made where there is none.

    Raises:
        UserError: no folder, or no file in it, can be made there, or its disk is full.
    """
    there = folder.absolute()
    try:
        while not os.path.lexists(there):
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            if shutil.disk_usage(there).free < FULL:
                raise UserError(f"{folder} cannot be written: no space left on its disk")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error


def new_output(verb: str) -> Path:
    """Where a verb puts what it makes now, below `outputs` in the working folder; it is not made."""
    now = datetime.now()
    return Path("outputs", f"{now:%Y-%m-%d}", f"{now:%H-%M-%S-%f}-{verb}")


def cache_dir() -> Path:
    """What can be made again is kept in $XDG_CACHE_HOME/bcnn, or in ~/.cache/bcnn."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bcnn"


def cache_folder(kind: str) -> Path:
    """The folder `kind` in `cache_dir`, made where there is none.

    Raises:
        UserError: it cannot be written to.
    """
    folder = cache_dir() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): set XDG_CACHE_HOME to a folder to write to"
        ) from error
    return folder


def remove_parts(folder: Path) -> None:
    """Remove what processes that were killed were writing below a folder."""
    for part in folder.rglob(f"{PART}*"):
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The new name, too; not every system lets a folder be opened for it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
