"""Train a bilinear CNN: stage `last`, the classifier, then stage `finetune`, every layer.

    python train.py                                 both stages, on the embedded butterflies
    python train.py data=folder data.root=IMAGES    on images of your own, a folder a class
    python train.py stage=last                      the first stage alone
    python train.py stage=finetune ckpt=PATH        the second, from what the first saved
    python train.py resume=RUN_DIR                  continue a run that was interrupted
    python train.py -m seed=0,1,2                   a sweep: a run for each value

Options are in conf/, and what a run does is in bcnn/training/run.py.
"""

import sys

import hydra
from omegaconf import DictConfig

from bcnn.cli.train import main as run_command
from bcnn.cli.train import train


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Train by a configuration; return validation top-1, which sweeps maximise."""
    return train(cfg)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], main))
