"""Files that URLs name, on any file system that fsspec reads; local files by the same functions.

Of an archive, `tar://photos/a.jpg::s3://bucket/shard.tar` is a member, read in place.
"""

import os
import re
import threading
from functools import lru_cache
from glob import has_magic
from pathlib import Path
from tarfile import TarError
from typing import Any, BinaryIO
from zipfile import BadZipFile

from bcnn.utils.errors import UserError

URL = re.compile(r"([a-z]+::)*[a-z][a-z0-9+.-]+://")  # two letters at least: C: is a drive of Windows
ARCHIVES = 16  # open at a time, each with the index of its members


def is_url(path: str | Path) -> bool:
    """Return whether a path has a scheme, as in s3://bucket/a.jpg."""
    return bool(URL.match(str(path)))


def member(path: str) -> str:
    """Return a path or URL without the archive that the file is in."""
    return path.partition("::")[0] if is_url(path) else path


def is_file(path: str) -> bool:
    """Return whether there is a file of this path or URL."""
    if not is_url(path):
        return os.path.isfile(path)
    system, name = _locate(path)
    return system.isfile(name)


def open_file(path: str | Path) -> BinaryIO:
    """Open the file of a path or URL for reading."""
    if not is_url(path):
        return open(path, "rb")
    system, name = _locate(str(path))
    return system.open(name, "rb")


def files_at(url: str) -> list[str]:
    """Return the URLs of the files of a folder and below it, or those that match a pattern, sorted."""
    system, name = _locate(url)
    archive = url.removeprefix(member(url))
    names = system.glob(name) if has_magic(name) else system.find(name)
    return [system.unstrip_protocol(each) + archive for each in sorted(names)]


def beside(file: str, path: str) -> str:
    """Return a path that begins at the folder of a file, unless it is absolute or a URL."""
    if is_url(path) or not is_url(file):
        return path if is_url(path) else os.path.join(os.path.dirname(file), path)
    name = member(file)
    return name[: name.rindex("/") + 1] + path + file.removeprefix(name)


def _locate(url: str) -> tuple[Any, str]:
    """Return the file system that a URL names, and the name of the file there."""
    from fsspec.core import url_to_fs

    scheme, _, name = url.partition("://")
    name, chain, rest = name.partition("::")
    try:
        if not chain or "::" in scheme:
            return url_to_fs(url)
        status = None if is_url(rest) else os.stat(rest)
        state = status and (status.st_ino, status.st_mtime_ns)
        return _archive(f"{scheme}://::{rest}", state, os.getpid(), threading.get_ident()), name
    except (ValueError, BadZipFile, TarError) as error:  # an unknown scheme, a damaged archive
        raise UserError(f"{url}: {error}") from error


@lru_cache(ARCHIVES)
def _archive(url: str, state: object, process: int, thread: int) -> Any:
    """Open an archive in this state, in a file of this process and thread alone: reading moves in it.

    fsspec would list the members again for each that is read.
    """
    from fsspec.core import url_to_fs

    return url_to_fs(url)[0]
