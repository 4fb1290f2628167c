"""`bcnn push`: a trained model to the Hugging Face Hub."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from bcnn.cli.arguments import Checkpoint
from bcnn.utils import hub
from bcnn.utils.console import console, logger, progress

NAME = typer.Argument(metavar="NAME", help="Repository, as user/name; made if it does not exist.")
PRIVATE = typer.Option("--private", help="Make the repository private.")


def push(
    ckpt: Checkpoint,
    name: Annotated[str, NAME],
    private: Annotated[bool, PRIVATE] = False,
) -> None:
    """Put a model on the Hugging Face Hub, with a model card (pip install 'bcnn\\[hub]').

    hf://NAME is then a CKPT. Needs a token, by `hf auth login` or in HF_TOKEN. model.safetensors holds
    digests and perceptual hashes of the images that the model was trained, validated and tested on:
    they can tell whether an image that somebody has was among them.
    """
    with progress("loading PyTorch"):
        from bcnn.evaluation.card import model_card
        from bcnn.evaluation.inference import open_model
        from bcnn.models.checkpoint import save_model
        from bcnn.training.run_state import StageResult

    model, result = open_model(ckpt), StageResult.of(ckpt.absolute())
    predictions = result.predictions if result else None
    if not predictions:
        logger.warning(f"{ckpt} is not what a stage of a run ended with: the card shows no figures")
    with TemporaryDirectory() as folder:
        weights = Path(folder, hub.WEIGHTS)
        save_model(model, weights)
        card = model_card(name, model, predictions).encode()
        address = hub.upload(name, {hub.WEIGHTS: weights, "README.md": card}, private)
    console.print(f"model and card: {address}\nuse: bcnn predict {hub.SCHEME}{name} IMAGE")
