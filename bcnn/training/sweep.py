"""Jobs of a sweep that fail: the others run, and at the end these are named."""

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from bcnn.terminal import say

FILE = "failed.txt"  # in a job's folder: what went wrong


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


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
