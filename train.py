"""Train a bilinear CNN: `python train.py`, `python train.py --help`, or see the README."""

import logging
import sys
import warnings

import hydra
from omegaconf import DictConfig

from bcnn.errors import UserError
from bcnn.options import literal, print_any_text


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run the stages of the configuration; returns validation top-1, for sweeps to maximise."""
    from bcnn.stages import run  # torch and Lightning take seconds that --help need not wait for

    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torch.utils.data")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        return run(cfg)
    except UserError as error:
        # From a data-loading worker it comes with that process's traceback before the sentence.
        sys.exit(
            f"error: {str(error).strip().splitlines()[-1].removeprefix('bcnn.errors.UserError: ')}"
        )


if __name__ == "__main__":
    print_any_text()
    sweep = not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(sys.argv)
    # `data.root=2024` is a folder, not a number.
    sys.argv[1:] = [literal(word, sweep) for word in sys.argv[1:]]
    main()
