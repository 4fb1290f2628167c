"""The benchmark's command: its options, and which part they ask for."""

import sys
from importlib import import_module

from rich.console import Console

from bcnn.utils.errors import UserError
from bcnn.utils.options import command
from bcnn.utils.progress import progress
from benchmarks.options import Options

USAGE = """
This project beside the original's plain loop, on your machine.

python -m benchmarks [OPTION=VALUE ...]

  stage=last       the original's loop, a cache of relu5_3 maps, and this project's descriptor store
  stage=finetune   a training step of the original's network, and of this project's
  stage=convex     the convex solver at growing numbers of rows, one an image
  stage=data       torchvision's plain loading of JPEGs, and this project's
  stage=predict    bcnn.cli.predict and a plain loop over photographs; PyTorch and ONNX Runtime

  device=auto      auto | cpu | cuda
  size=448         side of the images in pixels
  batch=8          images a step of a network (steps over stored features take 64)
  images=32        images that the original's loop, the cache, loading and prediction are timed over
  classes=17       of stage=finetune, stage=convex and stage=predict
  pooling=sqrt     of stage=finetune: this too, as model/pooling; and project=256, as model.project
  rows=[500,1000,2000]  of stage=convex
  epochs=55        of stage=last; 2 at least, as the first warms up
  root=FOLDER      image folder for stage=last; none: the embedded butterflies
                   any folder of photographs for stage=predict (none: the butterflies) and stage=data
                   (none: made ones of two sizes)
  weights=random   for stage=last, as model.weights
  ckpt=PATH        for stage=data: does reduced decoding change this model's answers?
"""

PARTS = ("last", "finetune", "convex", "predict", "data")  # a module each


def main(options: Options) -> int:
    """Measure, and print a table."""
    if options.stage not in PARTS:
        raise UserError(f"stage={options.stage}: choose from {', '.join(PARTS)}")
    if sys.platform == "win32":
        raise UserError("the benchmark asks Linux or macOS for the memory that is taken: use WSL")
    with progress("loading PyTorch"):  # takes seconds that --help need not wait for
        part = import_module(f"benchmarks.{options.stage}")
    Console(markup=False, emoji=False).print(part.table(options))
    return 0


if __name__ == "__main__":
    sys.exit(command(Options, main, USAGE))
