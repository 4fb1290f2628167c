"""Train a bilinear CNN: `python train.py`, `python train.py --help`, or see the README."""

import logging
import math
import sys
import warnings

import hydra
from omegaconf import DictConfig

from bcnn.errors import UserError
from bcnn.options import literal, print_any_text
from bcnn.terminal import say
from bcnn.training.sweep import in_sweep, note_failure


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run the stages of the configuration; returns validation top-1, for sweeps to maximise."""
    from bcnn.training.stages import (
        run,  # torch and Lightning take seconds that --help need not wait for
    )

    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torch.utils.data")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        return run(cfg)
    except UserError as error:
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
    sweep = not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(sys.argv)
    # `data.root=2024` is a folder, not a number.
    sys.argv[1:] = [literal(word, sweep) for word in sys.argv[1:]]
    main()
