"""One of two processes that train together: see `test_distributed.py`."""

import json
import os
import signal
import sys

from conftest import configure

from bcnn.models import backbones
from bcnn.training.module import BCNNModule
from bcnn.training.run import run
from bcnn.utils.errors import UserError


def train(overrides: list[str]) -> None:
    try:
        run(configure(*overrides))
    except UserError as error:
        sys.exit(f"error: {error}")


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder, (*jobs, last) = sys.argv[1], json.loads(sys.argv[2])
    backbones.__path__.append(folder)
    for overrides in jobs:
        train(overrides)
    if os.environ["LOCAL_RANK"] == "1":
        BCNNModule.training_step = die  # type: ignore[method-assign,assignment]
    train(last)
