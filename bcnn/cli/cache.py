"""List and remove the descriptor stores: the command."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from bcnn.training.feature_store import ABOUT, KEY, OURS, ROWS, files, read_about, stores_dir
from bcnn.utils.errors import UserError
from bcnn.utils.options import command
from bcnn.utils.terminal import say

USAGE = """
python -m bcnn.store                    lists the descriptor stores: key, size, what they belong to
python -m bcnn.store remove=KEY[,KEY]   removes these; remove=all: every one

They are in $BCNN_STORES, or in $XDG_CACHE_HOME/bcnn/stores, or in ~/.cache/bcnn/stores.
"""


def _line(folder: Path) -> str:
    chunks, about = files(folder, ROWS), read_about(folder)
    size = sum(path.stat().st_size for path in files(folder, *OURS)) / 1e6
    of, said = about.get("chunks"), about.get("about")
    share = f"{len(chunks) / of:.0%} built" if type(of) is int and of > 0 else "?"
    belongs = said if isinstance(said, str) else f"{ABOUT} is missing or damaged"
    return f"{folder.name}  {size:9.1f} MB  {share:>10}  {belongs}"


def _remove(key: str) -> None:
    """Remove what is the store's; a folder that holds something else stays with it.

    Raises:
        Timeout: a run builds or verifies it.
    """
    folder, lock = stores_dir() / key, FileLock(stores_dir() / f"{key}.lock")
    with lock.acquire(timeout=0):
        for path in files(folder, *OURS):
            path.unlink()
        with suppress(OSError):
            folder.rmdir()
        Path(lock.lock_file).unlink()


@dataclass
class Options:
    """See the usage."""

    remove: str = ""


def main(options: Options) -> int:
    """List the stores, or remove those whose keys are given."""
    there = [path for path in sorted(stores_dir().glob("*")) if KEY.fullmatch(path.stem)]
    folders = [path for path in there if path.is_dir() and path.suffix == ""]
    lines = {
        path.name: _line(path) for path in folders if files(path, *OURS) or not any(path.iterdir())
    }
    if not options.remove:
        say(f"{len(lines)} stores in {stores_dir()}")
        say(*lines.values())
        return 0
    locks = [path.stem for path in there if path.suffix == ".lock" and path.is_file()]
    known = {*lines, *locks}
    keys = sorted(known) if options.remove == "all" else options.remove.split(",")
    unknown = sorted({*keys} - known)
    if unknown:
        raise UserError(f"no such store: {', '.join(unknown)}; python -m bcnn.store lists them")
    busy = []
    for key in keys:
        try:
            _remove(key)
        except Timeout:
            busy.append(key)
            continue
        except OSError as error:
            raise UserError(f"{stores_dir() / key} cannot be removed: {error.strerror}") from error
        say(f"removed {lines.get(key, key)}")
    if busy:
        raise UserError(f"a run is building {', '.join(busy)}: remove it when that has ended")
    return 0


if __name__ == "__main__":
    sys.exit(command(Options, main, USAGE))
