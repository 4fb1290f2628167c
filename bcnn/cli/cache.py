"""`bcnn cache`: the descriptors that training keeps on disk."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from bcnn.utils.console import console
from bcnn.utils.errors import UserError

REMOVE = typer.Option(metavar="KEY|all", help="Remove one cache, or all.")


def cache(remove: Annotated[str | None, REMOVE] = None) -> None:
    """List the cached descriptors with size and origin, or remove them.

    They are in $BCNN_STORES, or in bcnn/stores in $XDG_CACHE_HOME or ~/.cache.
    """
    from bcnn.training.feature_store import KEY, stores_dir

    caches = sorted(
        path for path in stores_dir().glob("*") if KEY.fullmatch(path.name) and path.is_dir()
    )
    if remove is None:
        console.print(f"{len(caches)} caches in {stores_dir()}")
        for folder in caches:
            console.print(_line(folder))
        return
    chosen = [folder for folder in caches if remove in (folder.name, "all")]
    if not chosen and remove != "all":
        raise UserError(f"--remove {remove}: no such cache; bcnn cache lists them")
    busy = [folder.name for folder in chosen if not _removed(folder)]
    if busy:
        raise UserError(f"a run is using {', '.join(busy)}: remove it when the run has ended")


def _line(folder: Path) -> str:
    from bcnn.training.feature_store import OURS, ROWS, files, read_about

    about = read_about(folder)
    size = sum(path.stat().st_size for path in files(folder, *OURS)) / 1e6
    done, chunks = len(files(folder, ROWS)), about.get("chunks")
    share = f"{done / chunks:.0%} built" if isinstance(chunks, int) and chunks > 0 else "damaged"
    return f"{folder.name}  {size:9.1f} MB  {share:>10}  {about.get('about', 'unknown')}"


def _removed(folder: Path) -> bool:
    """Remove a cache, and its folder unless it holds other files; return False while a run uses it."""
    from filelock import FileLock, Timeout

    from bcnn.training.feature_store import OURS, files

    try:
        with FileLock(folder.with_suffix(".lock"), timeout=0):
            for path in files(folder, *OURS):
                path.unlink()
            with suppress(OSError):
                folder.rmdir()
    except Timeout:
        return False
    folder.with_suffix(".lock").unlink(missing_ok=True)
    console.print(f"removed {folder.name}")
    return True
