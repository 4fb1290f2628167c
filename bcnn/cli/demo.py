"""`bcnn demo`: a page on this machine to drop images on."""

import socket
from pathlib import Path
from typing import Annotated

import typer

from bcnn.cli.arguments import Checkpoint
from bcnn.utils.console import console, progress

IMAGES = typer.Option(exists=True, help="Training images, to show the nearest of: a folder or list.")
HOST = typer.Option(help="Another address of this machine opens the page to its network.")
PORT = typer.Option(min=0, max=65535, help="0: any free one.")


def demo(
    ckpt: Checkpoint,
    images: Annotated[Path | None, IMAGES] = None,
    host: Annotated[str, HOST] = "127.0.0.1",
    port: Annotated[int, PORT] = 8000,
) -> None:
    """Serve a page to drop images on, until Ctrl-C (pip install 'bcnn\\[demo]').

    It shows the likeliest classes, what speaks for this class and not that, and the nearest training
    images. Images stay in memory and are not kept.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:  # first: the port may be taken
        with progress("loading PyTorch"):
            from bcnn.cli.demo_server import Gallery, build_server, compute_gallery
            from bcnn.evaluation.inference import open_model
            from bcnn.evaluation.results import open_split
            from bcnn.utils.device import best_device

        gallery: Gallery = ([], [])
        if images is None:
            model = open_model(ckpt).to(best_device())
        else:
            data, samples, model = open_split(ckpt, images, "train")
            model.to(best_device())
            gallery = compute_gallery(model, samples, data.evaluation_dataloader(samples))
        name = f"[{host}]" if ":" in host else host
        server = build_server(model, gallery, ckpt.name, name)
        console.print(f"drop images on http://{name}:{listener.getsockname()[1]} (Ctrl-C ends it)")
        server.run([listener])
