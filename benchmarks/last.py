"""Stage last: the two-script original's loop beside `bcnn train stage=last`.

Further arguments are those of `bcnn train`: data=folder data.root=FOLDER model.weights=random
"""

import tempfile
from functools import partial
from pathlib import Path

from harness import Options, compare, now, original_step, parser
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

import bcnn.training.schema  # noqa: F401  # registers the types of the options
from bcnn.training.run import train

CONF = Path(__file__).parents[1] / "conf"


def config(options: Options, *overrides: str) -> DictConfig:
    """Return the configuration of the run."""
    sized = [f"data.size={options.size}", f"trainer.accelerator={options.device.type}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["stage=last", *sized, *options.train, *overrides])


def original_loop(options: Options) -> dict[str, float]:
    """Time a few of the original's steps, and multiply them out to all images and epochs."""
    step = original_step(options)["seconds"]
    return {"seconds": step * options.total * options.epochs}


def stage_last(options: Options, overrides: tuple[str, ...] = ()) -> dict[str, float]:
    """Time a run from an empty cache to the report."""
    with tempfile.TemporaryDirectory() as output:
        start = now()
        train(config(options, f"output={output}/run", *overrides))
        return {"seconds": now() - start}


if __name__ == "__main__":
    options = parser(__doc__, "size", "batch", "images", "epochs")
    options.add_argument("train", nargs="*", help="arguments of bcnn train, with one model/pooling")
    asked = options.parse_intermixed_args()
    data = instantiate(config(asked, "output=unused").data)
    data.prepare_data()
    data.setup()
    asked.total, asked.classes = len(data.train), len(data.classes)
    epochs = f"last.epochs={asked.epochs}"
    contenders = {
        f"the original (timed over {asked.images} images)": original_loop,
        "last=sgd": partial(stage_last, overrides=("last=sgd", epochs)),
        "last=convex": stage_last,
    }
    title = f"{asked.epochs} epochs of stage last on {asked.total} images of {asked.size} px"
    compare(title, contenders, asked, unit="run")
