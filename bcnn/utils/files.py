"""Files that are complete or absent, and the folders that output and caches go to."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from bcnn.utils import hub
from bcnn.utils.console import logger
from bcnn.utils.errors import UserError

PART = ".part-"  # prefix of files that are being written
RESULT = "result.json"  # in the folder of each stage of a run that has ended
FULL = 1 << 20  # bytes: a disk with less free space counts as full


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path`, of the same suffix, that replaces `path` at the end.

    The folder is made if necessary. The content is on the disk before the file is renamed. If the block
    raises, `path` is unchanged, and an OSError becomes a UserError that names `path`. A process that is
    killed leaves at most a file `.part-…`.
    """
    # An unguessable name, made with O_EXCL: in a shared folder nobody can put a link there first.
    part = path.with_name(f"{PART}{secrets.token_hex(8)}-{path.name[-50:]}")  # at most 255 bytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, which must not exist, that gets its name at the end.

    If the block raises, nothing is left. A process that is killed leaves a folder `.part-…`.
    """
    part = folder.with_name(f"{PART}{secrets.token_hex(8)}-{folder.name[-50:]}")
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def make_way(folder: Path) -> None:
    """Remove a folder if it is empty; raise UserError if it is not, or none can be written there."""
    try:
        with suppress(FileNotFoundError):
            folder.rmdir()
    except OSError as error:
        raise UserError(f"{folder} exists: name a new folder") from error
    validate_writable(folder)


def read_json(file: Path) -> Any:
    """Return what a JSON file holds; raise UserError if it is damaged."""
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): restore it, or remove it") from error


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left of `atomic_write` and `atomic_folder` below a folder."""
    for part in [*folder.rglob(f"{PART}*")]:
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def validate_writable(folder: Path) -> None:
    """Raise UserError if no file can be written into a folder, which need not exist and is not made."""
    candidates = (folder.absolute(), *folder.absolute().parents)
    existing = next(filter(os.path.lexists, candidates))
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        raise UserError(f"{candidates[0]} cannot be written: {error.strerror or error}") from error
    if free < FULL:
        raise UserError(f"{folder} cannot be written: no space left on its disk")


def new_output(verb: str) -> Path:
    """Return a new folder for the output of a command; it is not made."""
    return Path(f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S-%f}-{verb}")


def checkpoint_of(path: str | Path) -> Path:
    """Return the checkpoint that a run, or a stage, has ended with in its folder; files unchanged.

    hf://user/name is the file of weights in that repository, which is downloaded if necessary.
    """
    if str(path).startswith(hub.SCHEME):
        return hub.download(str(path).removeprefix(hub.SCHEME))
    folder = Path(path)
    stages = (folder / "finetune", folder / "last", folder.absolute()) if folder.is_dir() else ()
    for stage in stages:
        result = stage / RESULT
        if result.is_file() and (checkpoint := read_json(result)["checkpoint"]):
            return stage.parent / checkpoint
        if stage.parent == folder and stage.is_dir():
            logger.warning(f"{folder}: stage {stage.name} has not ended")
    if folder.is_dir():
        raise UserError(f"{folder} is no run with a checkpoint: name a file, or the folder of a run")
    return folder


def cache_dir() -> Path:
    """Return $XDG_CACHE_HOME/bcnn, or ~/.cache/bcnn."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bcnn"
    except RuntimeError as error:
        raise UserError("this user has no home folder: set XDG_CACHE_HOME to a folder") from error


def cache_folder(kind: str) -> Path:
    """Make and return the folder `kind` in `cache_dir`."""
    folder = cache_dir() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}: set XDG_CACHE_HOME to another folder") from error
    return folder
