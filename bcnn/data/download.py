"""The files that a set is published as: fetched, verified and unpacked, or not there at all.

torchvision's `download_and_extract_archive` unpacks in place and unfiltered: broken off, it leaves what
its classes take for the set. Of its helpers the download and the checksum are used.
"""

import shutil
import tarfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import rich.progress
from torchvision.datasets.utils import check_integrity, download_url

from bcnn.utils.errors import UserError

# An archive of so many bytes for each of its own, and these, is a bomb: images are compressed already.
EXPANSION, LARGEST = 20, 1 << 30


@dataclass(frozen=True)
class Published:
    """A file of a set: a tar archive, or anything else that is used as it is.

    Args:
        name: of the file.
        md5: its checksum.
        url: where a program can fetch it; "" where only a person can.
        into: the folder to unpack it in, below the one that holds the set.
    """

    name: str
    md5: str
    url: str
    into: str


def published(md5: dict[str, str], site: str = "", into: str = "") -> tuple[Published, ...]:
    """Files by their names and checksums, all of one address."""
    return tuple(Published(name, md5[name], site and site + name, into) for name in md5)


def fetch(file: Published, folder: Path) -> None:
    """Download `file` into `folder`, where it is not there yet; it never bears its name unfinished.

    Raises:
        UserError: it cannot be fetched, or what came or was there is another file.
    """
    path = folder / file.name
    if path.exists():
        if not check_integrity(path, file.md5):
            raise UserError(
                f"{path} is damaged, or not the published file (its MD5 is not {file.md5}): replace it"
            )
        return
    by_hand = f"get it otherwise and put it at {path}"
    with TemporaryDirectory(prefix=".unfinished-", dir=folder) as scratch:
        try:
            download_url(file.url, scratch, file.name)
        except (OSError, HTTPException) as error:
            raise UserError(f"cannot download {file.url} ({error}): {by_hand}") from error
        if not check_integrity(Path(scratch) / file.name, file.md5):
            raise UserError(
                f"the download of {file.url} broke off or is another file (its MD5 is not {file.md5}): "
                f"try again, or {by_hand}"
            )
        (Path(scratch) / file.name).rename(path)


def unpack(path: Path, folder: Path) -> None:
    """Unpack the tar archive `path` in `folder`, and nowhere else; a file that is none is copied.

    Links are left out: no set needs one, and through several of them a member could land elsewhere.

    Raises:
        UserError: the archive is damaged, would unpack to far more than images do, or has members
            that would land outside `folder`.
    """
    room = LARGEST + EXPANSION * path.stat().st_size

    def take(member: tarfile.TarInfo, place: str) -> tarfile.TarInfo | None:
        nonlocal room
        room -= member.size
        if room < 0:
            raise tarfile.TarError(f"{member.name} is larger than images can be")
        member = tarfile.data_filter(member, place)
        return member if member.isreg() or member.isdir() else None

    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not tarfile.is_tarfile(path):
            shutil.copy(path, folder)
            return
        with (
            rich.progress.open(path, "rb", description=f"Unpacking {path.name}") as stream,
            tarfile.open(fileobj=stream) as archive,
        ):
            archive.extractall(folder, filter=take)
    except Exception as error:  # damaged ones raise whatever the bytes lead into
        raise UserError(f"cannot unpack {path}: {error}") from error
