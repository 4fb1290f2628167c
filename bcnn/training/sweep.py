"""Sweeps: each job records its outcome in its folder; at the end, the jobs are ranked."""

import json
import math
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bcnn.evaluation.ranking import Job
from bcnn.evaluation.sweep_page import print_ranking, write_sweep
from bcnn.utils.console import console, logger, setup_logging
from bcnn.utils.environment import cores
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, read_json

JOB = "job.json"  # in a job's folder: the fields of `Job`
COMMAND = "multirun.yaml"  # in the sweep's folder: its configuration, written by the sweeper
GROUPS = ("launcher", "hparams_search")  # configuration groups that only sweeps use

_locks: list[FileLock] = []  # on the folder of the sweep that this process runs


def in_sweep() -> bool:
    """Return whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run_job(cfg: DictConfig, overrides: list[str]) -> float:
    """Train one job of a sweep, record its outcome in `job.json`, return validation top-1 or nan.

    A job that has finished is not trained again; one that was interrupted is resumed. A failure is
    logged and recorded, so that the other jobs still run.
    """
    from bcnn.training.config import STAGES
    from bcnn.training.run import train  # imports torch, which takes seconds
    from bcnn.training.run_state import RUN, StageResult

    setup_logging()  # a launcher may run the job in a process of its own
    folder = Path(HydraConfig.get().runtime.output_dir)
    job = Job(folder, [word for word in overrides if word.partition("=")[0] not in GROUPS])
    output, begun = Path(cfg.output).expanduser(), False
    if (folder / JOB).is_file() and (earlier := _read(folder / JOB)).overrides == job.overrides:
        if earlier.seconds is not None:
            return earlier.metrics.get("val_top1", math.nan)
        begun = (output / RUN).is_file()
    _write(job)
    start = time.monotonic()
    try:
        train(cfg, job.overrides, resume=begun)
    except Exception as error:
        job.failure = str(error)
        if not isinstance(error, UserError | OSError):
            traceback.print_exc()
            job.failure = f"{type(error).__name__}: {error}"
        logger.error(job.failure)
    if result := StageResult.read(output, STAGES[cfg.stage][-1]):  # also of one that ended worse
        job.metrics, job.checkpoint = result.metrics, str(result.checkpoint or "")
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
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            sys.exit(f"error: hydra.sweep.dir={folder}: another sweep is running there")
        if any(folder.glob(f"**/{JOB}")):
            configurations = config, OmegaConf.load(folder / COMMAND)
            words = [each.hydra.overrides.task for each in configurations]
            here, there = ([w for w in each if not w.startswith("launcher=")] for each in words)
            if here != there:
                sys.exit(f"error: hydra.sweep.dir={folder} holds a sweep with other options")
        _locks.append(lock)


@contextmanager
def ranked(words: list[str]) -> Iterator[None]:
    """Rank the jobs of a sweep when the block ends or is interrupted; exit with 1 if a job failed.

    The words of the command show how to continue an interrupted sweep.
    """
    finished, jobs = False, []
    try:
        yield
        finished = True
    finally:
        if _locks:
            lock = _locks.pop()
            lock.release()
            folder = Path(lock.lock_file).parent
            jobs = _report(folder)
            if jobs and not finished:
                others = [word for word in words if not word.startswith("hydra.sweep.dir=")]
                command = shlex.join(["bcnn", "train", *others, f"hydra.sweep.dir={folder}"])
                console.print(f"continue the sweep: {command}")
    if not all(job.succeeded for job in jobs):
        sys.exit(1)


def _report(folder: Path) -> list[Job]:
    """Rank the jobs in a sweep's folder on the screen and in files; return them."""
    files = sorted(folder.glob(f"**/{JOB}"), key=lambda file: (len(str(file)), file))  # 10 after 2
    jobs = [_read(file) for file in files]
    if jobs:
        print_ranking(jobs)
        console.print(f"tables: {folder}\npage: {write_sweep(folder, jobs)}")
    for job in jobs:
        if job.failure:
            logger.error(f"{job.folder} failed ({shlex.join(job.overrides)}): {job.failure}")
        elif job.seconds is None:
            logger.warning(f"{job.folder} has not finished")
    return jobs


def _read(file: Path) -> Job:
    return Job(**read_json(file) | {"folder": file.parent})


def _write(job: Job) -> None:
    with atomic_write(job.folder / JOB) as part:
        part.write_text(json.dumps(vars(job), indent=1, default=str))


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
