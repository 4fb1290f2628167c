"""Train a bilinear CNN: `python train.py`, `python train.py --help`, or see the README."""

import logging
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bcnn.errors import UserError
from bcnn.interruption import Interruption, raise_interruptions
from bcnn.options import literal, print_any_text
from bcnn.terminal import say
from bcnn.training.sweep import in_sweep, note_failure


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run the stages of the configuration; returns validation top-1, for sweeps to maximise."""
    from bcnn.training.stages import (
        run,
    )  # torch and Lightning take seconds that --help need not wait for

    return obey(lambda: run(cfg, list(HydraConfig.get().overrides.task)))


def go_on(folder: Path) -> float:
    """Go on with a run that was interrupted."""
    from bcnn.training.stages import resume

    return obey(lambda: resume(folder))


def obey(act: Callable[[], float]) -> float:
    """Do it; a mistake is told in a sentence, with exit code 1, or noted for the end of a sweep."""
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torch.utils.data")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        return act()
    except (UserError, OSError) as error:  # OSError: such as a disk that is full
        sentence = str(error)
        say(f"error: {sentence}", file=sys.stderr)
    except Exception as error:
        if not in_sweep():
            raise
        logging.exception("job failed")
        sentence = f"{type(error).__name__}: {error}"
    if not in_sweep():
        sys.exit(1)
    note_failure(sentence)
    return math.nan


if __name__ == "__main__":
    print_any_text()
    raise_interruptions()
    words = sys.argv[1:]
    sweep = not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(words)
    try:
        resumed = [word for word in words if word.startswith("resume=")]
        if resumed and words[1:]:
            sys.exit(f"error: {resumed[0]} goes on with the options of that run: give no others")
        elif resumed:
            go_on(Path(resumed[0].removeprefix("resume=")).expanduser())
        else:
            # `data.root=2024` is a folder, not a number.
            sys.argv[1:] = [literal(word, sweep) for word in words]
            main()
    except Interruption as error:
        print(f"interrupted ({error})", file=sys.stderr)
        sys.exit(error.exit_code)
