"""A page on this machine to drop a photograph on: the command."""

import sys
from dataclasses import dataclass
from pathlib import Path

from bcnn.cli.server import EVERYWHERE, MEGABYTES, Server, listening, own_address
from bcnn.utils.options import command
from bcnn.utils.progress import progress
from bcnn.utils.terminal import say

USAGE = """
A page on this machine to drop a photograph on: its likeliest classes, what spoke for this one and not
that, and the training photographs that are nearest.

python -m bcnn.cli.demo ckpt=FILE [OPTION=VALUE ...]

  ckpt=FILE        a checkpoint of this project's, or a .pth / .safetensors state dict
  data=FOLDER      the training photographs, as for training, or a list of `path,label[,split]`: they
                   pass the network once at the start, and their rows stay in memory (of the default
                   network, 0.26 GB for 1,000 photographs)
  host=127.0.0.1   the address to listen at; with 0.0.0.0 a phone in the same network can use the
                   page, and so can anybody else there
  port=8000        0: one that is free

Photographs that are dropped stay in memory, and are not kept. Ctrl-C ends it.
"""


@dataclass
class Options:
    """See the usage."""

    ckpt: Path
    data: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000


def main(options: Options) -> int:
    """Serve the page until a signal ends it."""
    with listening(options.host, options.port) as server:  # at first: it may be taken
        serve(options, server)
    return 0


def serve(options: Options, server: Server) -> None:
    """Load what the page needs, say where it is, and answer until a signal ends it."""
    with progress("loading PyTorch"):  # takes seconds that --help and mistakes need not wait for
        from bcnn.cli.answers import Answers, Gallery
        from bcnn.evaluation.inference import open_model
        from bcnn.evaluation.results import open_split
        from bcnn.utils.device import best_device

    device, gallery = best_device(), None
    if options.data is None:
        model = open_model(options.ckpt).to(device)
    else:
        images, samples, model = open_split(options.ckpt, options.data, "train")
        gallery = Gallery(model.to(device), samples, images.evaluation_dataloader(samples))
    answers = Answers(model, gallery)
    server.page = answers.page(options.ckpt.name, server.nonce, MEGABYTES)
    server.answer = answers.answer
    say(f"drop photographs on {server.address} (Ctrl-C ends it)")
    if options.host in EVERYWHERE:
        address = f"http://{own_address()}:{server.server_address[1]}"
        say(f"in your network, for anybody who is there: {address}")
    try:
        server.serve_forever()
    finally:
        answers.stop()


if __name__ == "__main__":
    sys.exit(command(Options, main, USAGE))
