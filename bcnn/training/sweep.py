"""Jobs of a sweep: each leaves word of itself in its folder, and at the end they are ranked."""

import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bcnn.utils.environment import cores
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write
from bcnn.utils.options import as_called
from bcnn.utils.terminal import say

FILE = "job.json"  # in a job's folder: what it is, how long it took, and what went wrong
COMMAND = "multirun.yaml"  # in the sweep's folder: what it was begun with, by Hydra's sweeper
HOW = {"launcher", "sweep"}  # groups that say how jobs are run, not what is trained
# What a launcher or sweeper is loaded from, and the package that brings it.
PACKAGES = {
    "hydra_plugins.hydra_joblib_launcher": "hydra-joblib-launcher",
    "hydra_plugins.hydra_submitit_launcher": "hydra-submitit-launcher",
    "hydra_plugins.hydra_ray_launcher": "hydra-ray-launcher",
    "hydra_plugins.bcnn_optuna": "optuna",
}

T = TypeVar("T")

_begun: list[FileLock] = []  # in the folder of the sweep that this process leads


def told(act: Callable[..., T], *arguments: Any) -> T:
    """Do it; a mistake is a sentence and ends the program with exit code 1."""
    try:
        return act(*arguments)
    except (UserError, OSError) as error:  # OSError: such as a disk that is full
        _say_mistake(error)
        sys.exit(1)


def run_job(room: ModuleType, cfg: DictConfig, words: list[str]) -> float:
    """Train as a job of a sweep, or go on with one; a mistake is noted, and the others run.

    Args:
        room: `bcnn.training.run`.
        cfg: the whole configuration.
        words: the overrides it was composed from.

    Returns:
        Validation top-1; nan where there is none.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    words = [word for word in words if word.partition("=")[0] not in HOW]
    kept = json.loads((folder / FILE).read_text()) if (folder / FILE).is_file() else {}
    if kept.get("overrides") == words and kept["seconds"] is not None:
        return float(kept["value"])
    note: dict[str, Any] = {"overrides": words, "output": str(cfg.output), "value": math.nan}
    _write(folder, note | {"seconds": None, "failure": ""})
    begun, failure = time.monotonic(), ""
    try:
        goes_on = kept.get("overrides") == words and Path(str(cfg.output), room.RUN).is_file()
        note["value"] = room.resume(Path(cfg.output)) if goes_on else room.run(cfg, words)
    except (UserError, OSError) as error:
        failure = _say_mistake(error)
    except Exception as error:
        logging.exception("job failed")
        failure = f"{type(error).__name__}: {error}"
    _write(folder, note | {"seconds": time.monotonic() - begun, "failure": failure})
    return float(note["value"])


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


class Sweep(Callback):
    """Refuses, before anything is trained, what is not installed, not for a sweep, or in its way."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        told(_refuse_how, config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        told(_refuse_missing, config)
        _begun.append(told(_claimed, Path(config.hydra.sweep.dir), config.hydra.overrides.task))


@contextmanager
def ranked(words: list[str]) -> Iterator[None]:
    """However a sweep that runs in the block ends, rank its jobs; those that failed are exit code 1.

    Args:
        words: of the command, for one that goes on with it.
    """
    try:
        yield
    except BaseException:
        _end(words, interrupted=True)
        raise
    if not _end(words, interrupted=False):
        sys.exit(1)


def _end(words: list[str], interrupted: bool) -> bool:
    if not _begun:
        return True
    from bcnn.training.ranking import say_ranking  # with torch, which takes seconds

    lock = _begun.pop()
    try:
        return told(say_ranking, Path(lock.lock_file).parent, words if interrupted else None)
    finally:
        lock.release()


def jobs_at_once() -> int:
    """On this machine, by processes that know nothing of each other: one a core, or one on a GPU."""
    return 1 if gpus() else cores()


def gpus() -> int:
    """Of this machine."""
    import torch  # takes seconds

    return torch.cuda.device_count()


for name, resolver in {
    "jobs_at_once": jobs_at_once,
    "gpus_a_job": lambda: min(1, gpus()),
    "cores_a_job": lambda: max(1, cores() // (gpus() or cores())),
}.items():
    OmegaConf.register_new_resolver(name, resolver, replace=True)


def _refuse_how(config: DictConfig) -> None:
    chosen = HOW.intersection(name for name, choice in config.hydra.runtime.choices.items() if choice)
    if chosen:
        name = min(chosen)
        raise UserError(f"{name}={config.hydra.runtime.choices[name]} is for sweeps: add -m")


def _refuse_missing(config: DictConfig) -> None:
    for part in ("launcher", "sweeper"):
        module = str(config.hydra[part]._target_).rpartition(".")[0]
        for plugin, package in PACKAGES.items():
            needed = package if package == "optuna" else plugin
            if module.startswith(plugin) and find_spec(needed) is None:
                raise UserError(f"this sweep needs {package}: pip install {package}")


def _say_mistake(error: Exception) -> str:
    sentence = str(error)
    traceback.clear_frames(error.__traceback__)  # what was under way there ends: its bar
    say(f"error: {as_called(sentence)}", file=sys.stderr)
    return sentence


def _write(folder: Path, note: dict[str, Any]) -> None:
    """A file, since launchers run jobs in processes of their own."""
    with atomic_write(folder / FILE) as part:
        part.write_text(json.dumps(note, indent=1))


def _claimed(folder: Path, words: list[str]) -> FileLock:
    """The lock of a sweep's folder, which is new or holds jobs of the same command."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"hydra.sweep.dir={folder}: another sweep is running there") from error
    if any(folder.glob(f"**/{FILE}")):
        there, here = (
            [word for word in each if not word.startswith("launcher=")]
            for each in (OmegaConf.load(folder / COMMAND).hydra.overrides.task, words)
        )
        if there != here:
            raise UserError(f"hydra.sweep.dir={folder} holds a sweep with other options: name another")
    return lock
