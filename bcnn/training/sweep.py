"""Sweeps: each job records its outcome in its folder; at the end, the jobs are ranked."""

import json
import math
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bcnn.evaluation.sweep_page import Job, print_ranking, write_sweep
from bcnn.utils.console import console, logger, setup_logging
from bcnn.utils.environment import cores
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write

JOB = "job.json"  # in a job's folder: the fields of `Job`
COMMAND = "multirun.yaml"  # in the sweep's folder: its configuration, written by the sweeper
GROUPS = ("launcher", "hparams_search")  # configuration groups that only sweeps use

_locks: list[FileLock] = []  # on the folder of the sweep that this process runs


def in_sweep() -> bool:
    """Return whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run_job(cfg: DictConfig, overrides: list[str]) -> float:
    """Train one job of a sweep and record its outcome in `job.json`.

    A job that has finished is not trained again; one that was interrupted is resumed. A failure is
    logged and recorded, so that the other jobs still run.

    Returns:
        Validation top-1; nan if the job failed or there are no validation images.
    """
    from bcnn.training.config import STAGES  # imports torch, which takes seconds
    from bcnn.training.run import train
    from bcnn.training.run_state import RUN, StageResult

    setup_logging()  # a launcher may run the job in a process of its own
    file = Path(HydraConfig.get().runtime.output_dir, JOB)
    job = Job(file.parent, [word for word in overrides if word.partition("=")[0] not in GROUPS])
    output, begun = Path(cfg.output).expanduser(), False
    if file.is_file() and (earlier := _read(file)).overrides == job.overrides:
        if earlier.seconds is not None:
            return earlier.metrics.get("val_top1", math.nan)
        begun = (output / RUN).is_file()
    _write(job)
    start = time.monotonic()
    try:
        train(cfg, job.overrides, resume=begun)
        for result in filter(None, (StageResult.read(output, stage) for stage in STAGES["both"])):
            job.metrics, job.checkpoint = result.metrics, str(result.checkpoint or "")
    except (UserError, OSError) as error:
        job.failure = str(error)
    except Exception as error:
        traceback.print_exc()
        job.failure = f"{type(error).__name__}: {error}"
    if job.failure:
        logger.error(job.failure)
    job.seconds = time.monotonic() - start
    _write(job)
    return job.metrics.get("val_top1", math.nan)


class SweepCallback(Callback):
    """Check, before anything is trained, that a sweep can run.

    Hydra turns exceptions of callbacks into warnings, but not `SystemExit`.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        for group in GROUPS:
            if choice := config.hydra.runtime.choices.get(group):
                sys.exit(f"error: {group}={choice} is for sweeps: add -m")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        plugin = ".".join(config.hydra.launcher._target_.split(".")[:2])
        if find_spec(plugin) is None:  # Hydra would call it an unknown class
            package = plugin.partition(".")[2].replace("_", "-")
            sys.exit(f"error: this launcher needs {package}: pip install {package}")
        _locks.append(_lock(Path(config.hydra.sweep.dir), config.hydra.overrides.task))


@contextmanager
def ranked(words: list[str]) -> Iterator[None]:
    """Rank the jobs of a sweep when the block ends or is interrupted; exit with 1 if a job failed.

    Args:
        words: of the command, to show how to continue an interrupted sweep.
    """
    interrupted = True
    try:
        yield
        interrupted = False
    finally:
        succeeded = not _locks or _report(_locks.pop(), words if interrupted else None)
    if not succeeded:
        sys.exit(1)


def _report(lock: FileLock, interrupted: list[str] | None) -> bool:
    """Rank the jobs in a sweep's folder on the screen and in files, and unlock the folder.

    Args:
        lock: on the folder.
        interrupted: words of the command, if the sweep was interrupted.

    Returns:
        Whether all jobs succeeded.
    """
    folder = Path(lock.lock_file).parent
    lock.release()
    files = sorted(folder.glob(f"**/{JOB}"), key=lambda file: (len(str(file)), file))  # 10 after 2
    jobs = [_read(file) for file in files]
    if not jobs:
        return True
    print_ranking(jobs)
    table, page = write_sweep(folder, jobs)
    console.print(f"table: {table}\npage: {page}")
    for job in jobs:
        if job.failure:
            logger.error(f"{job.folder} failed ({shlex.join(job.overrides)}): {job.failure}")
        elif job.seconds is None:
            logger.warning(f"{job.folder} has not finished")
    if interrupted:
        words = [word for word in interrupted if not word.startswith("hydra.sweep.dir=")]
        command = shlex.join(["bcnn", "train", *words, f"hydra.sweep.dir={folder}"])
        console.print(f"continue the sweep: {command}")
    return all(job.succeeded for job in jobs)


def _lock(folder: Path, overrides: Sequence[str]) -> FileLock:
    """Lock the folder of a sweep, which is new or holds jobs of the same command."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        sys.exit(f"error: hydra.sweep.dir={folder}: another sweep is running there")
    if any(folder.glob(f"**/{JOB}")):
        earlier = OmegaConf.load(folder / COMMAND).hydra.overrides.task
        here, there = (
            [word for word in words if not word.startswith("launcher=")]
            for words in (overrides, earlier)
        )
        if here != there:
            sys.exit(f"error: hydra.sweep.dir={folder} holds a sweep with other options: name another")
    return lock


def _read(file: Path) -> Job:
    return Job(file.parent, **json.loads(file.read_text()))


def _write(job: Job) -> None:
    record = {name: value for name, value in vars(job).items() if name != "folder"}
    with atomic_write(job.folder / JOB) as part:
        part.write_text(json.dumps(record, indent=1))


def gpus() -> int:
    """Return the number of GPUs of this machine."""
    import torch  # takes seconds

    return torch.cuda.device_count()


# For conf/launcher.
for name, resolver in {
    "jobs_at_once": lambda: 1 if gpus() else cores(),
    "gpus_per_job": lambda: min(1, gpus()),
    "cores_per_job": lambda: max(1, cores() // (gpus() or cores())),
}.items():
    OmegaConf.register_new_resolver(name, resolver, replace=True)
