"""Train a bilinear CNN: `python train.py`, `python train.py --help`, or see the README."""

import sys

from bcnn.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
