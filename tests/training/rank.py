"""One of two processes that train together: see `test_distributed.py`."""

import json
import os
import signal
import sys

from conftest import configure, register_tiny

from bcnn.cli.errors import exit_code_of
from bcnn.training.module import BCNNModule
from bcnn.training.run import train


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    register_tiny()
    *jobs, last = json.loads(sys.argv[1])
    for overrides in jobs:
        train(configure(*overrides))
    if os.environ["LOCAL_RANK"] == "1":
        BCNNModule.training_step = die  # type: ignore[method-assign,assignment]
    sys.exit(exit_code_of(lambda: bool(train(configure(*last)))))
