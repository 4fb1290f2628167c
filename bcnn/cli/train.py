"""Train by Hydra's overrides: `bcnn train`, which is `python train.py`."""

import os
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import bcnn.training.schema  # noqa: F401  # registers the types of the options
from bcnn.cli.errors import exit_code_of
from bcnn.training.sweep import in_sweep, ranked, run_job
from bcnn.utils.console import is_rank_zero, logger, progress
from bcnn.utils.errors import UserError

Task = Callable[[], object]

PACKAGE = Path(__file__).parents[1]
FILES = ("data.root", "data.list", "ckpt", "output", "model.weights")
# In the package where it is installed, beside it in a clone.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _main(cfg: DictConfig) -> float:
    return train(cfg)


def main(words: list[str], task: Task = _main) -> int:
    """Train as the words of a command say; return the exit code.

    Args:
        words: Hydra's overrides and flags, or `resume=FOLDER`.
        task: a function that `hydra.main` decorates, and that calls `train`.
    """
    return exit_code_of(lambda: _main_of([word for word in words if word != "--debug"], task))


def _main_of(words: list[str], task: Task) -> None:
    if any(word.startswith("resume=") for word in words):
        resume(words)
        return
    if _started_together() and not any(
        word.startswith(("output=", "hydra.run.dir=", "hydra.sweep.dir=")) for word in words
    ):
        if not is_rank_zero():
            sys.exit(1)  # the first says why
        raise UserError("processes that are started together need one folder: add output=FOLDER")
    sys.path.insert(0, os.getcwd())  # for classes of one's own, as python -m has it
    called = sys.argv
    sys.argv = [called[0], *_own_configuration(words), *map(_quoted, words)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised, not printed
    try:
        with ranked(words):
            task()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if HydraConfig.initialized():
            raise
        raise UserError(_explained(error, words)) from error
    finally:
        sys.argv = called


def train(cfg: DictConfig) -> float:
    """Train by a configuration of Hydra's; return validation top-1, for sweeps to maximise."""
    OmegaConf.to_container(cfg, resolve=True)  # raises where ${name} stands for nothing
    overrides = list(HydraConfig.get().overrides.task)
    if in_sweep():
        return run_job(cfg, overrides)
    return _run(cfg, overrides, resume=_requeued(cfg))


def resume(words: list[str]) -> float:
    """Continue the interrupted run in FOLDER, by the words `resume=FOLDER`."""
    (word,) = (word for word in words if word.startswith("resume="))
    folder = Path(word.removeprefix("resume=")).expanduser().absolute()
    logger.info(f"resuming {folder}")
    with progress("loading PyTorch"):
        from bcnn.training.run_state import RunState, resumable_overrides
    overrides = resumable_overrides(RunState.read(folder), [other for other in words if other != word])
    cfg = compose(overrides)
    cfg.output = str(folder)
    return _run(cfg, overrides, resume=True)


def compose(overrides: list[str]) -> DictConfig:
    """Return the configuration that overrides compose, outside of a command of Hydra's."""
    search = [f"hydra.searchpath=[file://{Path('conf').absolute()}]"] if _own_configuration([]) else []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", [*search, *overrides])


def _run(cfg: DictConfig, overrides: list[str], resume: bool) -> float:
    """Say in a first line what happens, and load PyTorch, which takes seconds, after it."""
    images = OmegaConf.select(cfg, "data.list") or OmegaConf.select(cfg, "data.root")
    stages = "last, then finetune" if cfg.stage == "both" else cfg.stage
    logger.info(f"training stage {stages}; images: {images}; output: {os.path.relpath(cfg.output)}")
    with progress("loading PyTorch"):
        from bcnn.training.run import train as train_stages
    return train_stages(cfg, overrides, resume)


def _requeued(cfg: DictConfig) -> bool:
    """Return whether SLURM runs the same command again, in a job that it put back into its queue."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and Path(cfg.output, "run.yaml").is_file()


def _started_together() -> bool:
    """Return whether torchrun or srun started several processes."""
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    return torchrun or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def _quoted(word: str) -> str:
    """Quote the name of a file that Hydra would read as a number: 2024_01 is 202401 to it."""
    name, _, value = word.partition("=")
    number = re.fullmatch(r"[+-]?[\d_.]+(e[+-]?\d+)?", value, re.IGNORECASE)
    return f"{name}='{value}'" if number and name.lstrip("+") in FILES else word


def _own_configuration(words: list[str]) -> list[str]:
    """Return the flag by which Hydra also finds the user's `conf/` in the working folder."""
    given = any(word.startswith(("--config-dir", "-cd")) for word in words)
    there = Path("conf").is_dir() and not Path("conf").samefile(CONF)
    return ["--config-dir=conf"] if there and not given else []


def _explained(error: Exception, words: list[str]) -> str:
    """Return one sentence for what Hydra says of words that make no configuration."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    if found := re.match(r"Could not override '([^']+)'", text):
        return _unknown_option(found[1])
    absent = r"In '.*': Could not find '(.+)/(.+?)' Available options in '.*': (.*?) Config search"
    if found := re.match(absent, text):
        return f"there is no {found[1]}={found[2]}: choose from {', '.join(found[3].split())}"
    if folders := [word for word in words if Path(word).is_dir()]:
        return f"to train on the images of {folders[0]}, write data=folder data.root={folders[0]}"
    return text.partition(" full_key:")[0]


def _unknown_option(name: str) -> str:
    """Return what may have been meant by the name of an option that there is not."""
    parent, _, last = name.rpartition(".")
    GlobalHydra.instance().clear()
    plain, sgd = compose([]), compose(["last=sgd"])
    if OmegaConf.select(sgd, name) is not None:
        return f"{name} is an option of last=sgd: add last=sgd"
    siblings = OmegaConf.select(plain, parent) if parent else plain
    names = map(str, siblings if isinstance(siblings, DictConfig) else [])
    if near := get_close_matches(last, names, 1):
        return f"there is no option {name}: did you mean {name.removesuffix(last)}{near[0]}?"
    return f"there is no option {name}: --help lists all; +{name}=… passes it to the class at {parent}"
