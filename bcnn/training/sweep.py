"""How a job's mistake is told; in a sweep the others run, and those that failed are named."""

import logging
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from bcnn.errors import UserError
from bcnn.options import as_called
from bcnn.terminal import say

FILE = "failed.txt"  # in a job's folder: what went wrong


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def told(act: Callable[..., float], *arguments: Any) -> float:
    """Do it; a mistake is a sentence and ends the program with exit code 1, or is noted in a sweep."""
    try:
        return act(*arguments)
    except (UserError, OSError) as error:  # OSError: such as a disk that is full
        sentence = str(error)
        traceback.clear_frames(error.__traceback__)  # what was under way there ends: its bar
        say(f"error: {as_called(sentence)}", file=sys.stderr)
    except Exception as error:
        if not in_sweep():
            raise
        logging.exception("job failed")
        sentence = f"{type(error).__name__}: {error}"
    if not in_sweep():
        sys.exit(1)
    note_failure(sentence)
    return math.nan


def note_failure(sentence: str) -> None:
    """Leave word in the job's folder; a file, since launchers run jobs in processes of their own."""
    hydra = HydraConfig.get()
    overrides = " ".join(hydra.overrides.task)
    Path(hydra.runtime.output_dir, FILE).write_text(f"{overrides}: {sentence}\n", encoding="utf-8")


class Failures(Callback):
    """Names the failed jobs of a sweep when all are done, and ends it with exit code 1."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        jobs = sorted(Path(config.hydra.sweep.dir).glob(f"**/{FILE}"))
        if jobs:
            print(f"jobs that failed ({len(jobs)}):", file=sys.stderr)
            for job in jobs:
                say(f"  {job.parent}: {job.read_text(encoding='utf-8').strip()}", file=sys.stderr)
            sys.exit(1)
