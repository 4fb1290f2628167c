"""`bcnn cache`: the feature stores that training keeps on disk."""

from typing import Annotated

import typer

from bcnn.utils.console import console, printable
from bcnn.utils.errors import UserError

REMOVE = typer.Option(metavar="KEY|all", help="Remove one store, or all.")


def cache(remove: Annotated[str | None, REMOVE] = None) -> None:
    """List the feature stores of stage last with size and origin, or remove them.

    They are in $BCNN_STORES, or in bcnn/stores in $XDG_CACHE_HOME or ~/.cache.
    """
    from filelock import FileLock, Timeout

    from bcnn.training.feature_store import ABOUT, KEY, read_about, remove_store, stores_dir

    folders = sorted(path.parent for path in stores_dir().glob(f"*/{ABOUT}"))
    stores = {folder.name: folder for folder in folders if KEY.fullmatch(folder.name)}
    if remove is None:
        console.print(f"{len(stores)} feature stores in {stores_dir()}")
        for key, folder in stores.items():
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            images = "; ".join(read_about(folder))
            console.print(printable(f"{key}  {size:9.1f} MB  {images}"))
        return
    if remove not in (*stores, "all"):
        raise UserError(f"--remove {remove}: no such store; bcnn cache lists them")
    for key in stores if remove == "all" else [remove]:
        folder = stores[key]
        try:
            with FileLock(folder.with_suffix(".lock"), timeout=0):
                remove_store(folder)
        except Timeout as error:
            raise UserError(f"{key}: a run adds to it; remove it when that has ended") from error
        console.print(f"removed {key}")
