"""`bcnn demo`: a page on this machine to drop images on."""

import secrets
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bcnn.cli.arguments import Checkpoint
from bcnn.utils.console import console, progress
from bcnn.utils.errors import UserError

IMAGES = typer.Option(exists=True, help="Training images, to show the nearest of: a folder or list.")
HOST = typer.Option(help="Address to listen at; 0.0.0.0 opens the page to everybody in your network.")
PORT = typer.Option(min=0, max=65535, help="0: any free one.")


def demo(
    ckpt: Checkpoint,
    images: Annotated[Path | None, IMAGES] = None,
    host: Annotated[str, HOST] = "127.0.0.1",
    port: Annotated[int, PORT] = 8000,
) -> None:
    """Serve a page to drop images on, until Ctrl-C.

    It shows the likeliest classes, what speaks for this class and not that, and the nearest training
    images. Images stay in memory and are not kept.
    """
    try:
        from bcnn.cli import demo_server
    except ModuleNotFoundError as error:
        raise UserError(f"bcnn demo needs {error.name}: pip install 'bcnn[demo]'") from error

    with demo_server.listen(host, port) as listener:  # first: the port may be taken
        with progress("loading PyTorch"):
            from bcnn.cli import demo_page
            from bcnn.evaluation.inference import open_model
            from bcnn.evaluation.results import open_split
            from bcnn.utils.device import best_device

        gallery = None
        if images is None:
            model = open_model(ckpt).to(best_device())
        else:
            data, samples, model = open_split(ckpt, images, "train")
            batches = data.evaluation_dataloader(samples)
            gallery = demo_page.Gallery(model.to(best_device()), samples, batches)
        nonce = secrets.token_urlsafe()
        page = demo_page.render(
            model, gallery, name=ckpt.name, nonce=nonce, megabytes=demo_server.MEGABYTES
        )
        for sentence in demo_server.where(listener):
            console.print(sentence)
        answer = partial(demo_page.answer, model, gallery)
        demo_server.build_server(host, page, nonce, answer).run([listener])
