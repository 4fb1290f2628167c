"""`bcnn cache`: the descriptors that training keeps on disk."""

import shutil
from typing import Annotated

import typer

from bcnn.utils.console import console, printable
from bcnn.utils.errors import UserError

REMOVE = typer.Option(metavar="KEY|all", help="Remove one cache, or all.")


def cache(remove: Annotated[str | None, REMOVE] = None) -> None:
    """List the cached descriptors with size and origin, or remove them.

    They are in $BCNN_STORES, or in bcnn/stores in $XDG_CACHE_HOME or ~/.cache.
    """
    from filelock import FileLock, Timeout

    from bcnn.training.feature_store import ABOUT, KEY, read_about, stores_dir

    folders = {path.parent.name: path.parent for path in sorted(stores_dir().glob(f"*/{ABOUT}"))}
    caches = {key: folder for key, folder in folders.items() if KEY.fullmatch(key)}
    if remove is None:
        console.print(f"{len(caches)} caches in {stores_dir()}")
        for key, folder in caches.items():
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            console.print(printable(f"{key}  {size:9.1f} MB  {read_about(folder).get('about', '?')}"))
        return
    if remove not in (*caches, "all"):
        raise UserError(f"--remove {remove}: no such cache; bcnn cache lists them")
    for key, folder in caches.items():
        if remove in (key, "all"):
            lock = folder.with_suffix(".lock")
            try:
                with FileLock(lock, timeout=0):
                    shutil.rmtree(folder)
            except Timeout:
                raise UserError(f"a run is using {key}: remove it when the run has ended") from None
            lock.unlink(missing_ok=True)
            console.print(f"removed {key}")
