"""Train a bilinear CNN: `python train.py`, `python train.py --help`, or see the README."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bcnn.interruption import Interruption, raise_interruptions
from bcnn.options import literal, print_any_text
from bcnn.training.sweep import told


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run the stages of the configuration; returns validation top-1, for sweeps to maximise."""
    # Not at the top: torch and Lightning take seconds that --help need not wait for.
    from bcnn.training.stages import run

    return told(run, cfg, list(HydraConfig.get().overrides.task))


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
            from bcnn.training.stages import resume

            told(resume, Path(resumed[0].removeprefix("resume=")).expanduser())
        else:
            # `data.root=2024` is a folder, not a number.
            sys.argv[1:] = [literal(word, sweep) for word in words]
            main()
    except Interruption as error:
        print(f"interrupted ({error})", file=sys.stderr)
        sys.exit(error.exit_code)
