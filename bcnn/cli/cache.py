"""`bcnn cache`: the descriptors that training keeps on disk."""

from typing import Annotated

import typer

from bcnn.utils.console import console, printable
from bcnn.utils.errors import UserError

REMOVE = typer.Option(metavar="KEY|all", help="Remove one cache, or all.")


def cache(remove: Annotated[str | None, REMOVE] = None) -> None:
    """List the cached descriptors with size and origin, or remove them.

    They are in $BCNN_STORES, or in bcnn/stores in $XDG_CACHE_HOME or ~/.cache.
    """
    from filelock import FileLock

    from bcnn.training.feature_store import ABOUT, KEY, read_about, remove_store, stores_dir

    folders = sorted(path.parent for path in stores_dir().glob(f"*/{ABOUT}"))
    caches = {folder.name: folder for folder in folders if KEY.fullmatch(folder.name)}
    if remove is None:
        console.print(f"{len(caches)} caches in {stores_dir()}")
        for key, folder in caches.items():
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            images = "; ".join(read_about(folder))
            console.print(printable(f"{key}  {size:9.1f} MB  {images}"))
        return
    if remove not in (*caches, "all"):
        raise UserError(f"--remove {remove}: no such cache; bcnn cache lists them")
    for key in caches if remove == "all" else [remove]:
        folder = caches[key]
        with FileLock(folder.with_suffix(".lock"), timeout=0):  # a run that builds the cache holds it
            remove_store(folder)
        console.print(f"removed {key}")
