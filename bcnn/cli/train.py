"""Train by Hydra's overrides: `bcnn train`, which is `python train.py`."""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser  # Hydra's flags are listed nowhere else
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bcnn.cli.errors import exit_code_of
from bcnn.training.schema import PATHS, absolute_paths, working_folder
from bcnn.training.sweep import in_sweep, ranked, run_job
from bcnn.utils.console import is_rank_zero, logger, progress
from bcnn.utils.errors import UserError

Task = Callable[[], object]


class _JobFailed(BaseException):
    """Carries an error past Hydra, which would print the overrides before it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


PACKAGE = Path(__file__).parents[1]
# In the package where it is installed, beside it in a clone.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _main(cfg: DictConfig) -> float:
    return train(cfg)


def main(words: list[str], task: Task = _main) -> int:
    """Train by the words of a command; return the exit code.

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
    fixed = next((w for w in words if re.fullmatch(r"output=[^$,]+", w)), None)
    if fixed and {"-m", "--multirun"} & {*words}:
        raise UserError(f"{fixed} is one folder for all jobs of a sweep: use hydra.sweep.dir=FOLDER")
    # argparse takes flags before overrides, not among them.
    arguments = sorted([*_own_configuration(), *map(_quoted, words)], key=_is_override)
    if unknown := get_args_parser().parse_known_args(arguments)[1]:
        raise UserError(_without_dashes(unknown[0], words))
    sys.path.insert(0, os.getcwd())  # for classes of one's own, as python -m has it
    called = sys.argv
    sys.argv = [called[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised, not printed
    try:
        with ranked(words):
            task()
    except _JobFailed as failure:
        raise failure.error from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if HydraConfig.initialized():
            raise
        raise UserError(_explained(error, words)) from error
    finally:
        sys.argv = called


def train(cfg: DictConfig) -> float:
    """Train by a configuration of Hydra's; return validation top-1, for sweeps to maximise."""
    try:
        cfg = absolute_paths(cfg, working_folder())  # raises where ${name} stands for nothing
        overrides = list(HydraConfig.get().overrides.task)
        return run_job(cfg, overrides) if in_sweep() else _run(cfg, overrides, resume=_requeued(cfg))
    except Exception as error:
        if in_sweep():  # Hydra's launchers carry it from one process to another
            raise
        raise _JobFailed(error) from None
    finally:  # Hydra has made a folder: if it is empty still, remove it
        os.chdir(working_folder())
        with suppress(OSError):
            os.removedirs(os.path.relpath(HydraConfig.get().runtime.output_dir))


def resume(words: list[str]) -> float:
    """Continue the interrupted run in FOLDER, by the words `resume=FOLDER [--config-dir DIR]`."""
    parsed, unknown = get_args_parser().parse_known_args(words)
    (word,) = (word for word in words if word.startswith("resume="))
    folder = Path(word.removeprefix("resume=")).expanduser().absolute()
    logger.info(f"resuming {folder}")
    with progress("loading PyTorch"):
        from bcnn.training.run_state import RunState, resumable_overrides
    others = [*unknown, *(other for other in parsed.overrides if other != word)]
    overrides = resumable_overrides(RunState.read(folder), others)
    cfg = compose(overrides, parsed.config_dir)
    cfg.output = str(folder)
    return _run(cfg, overrides, resume=True)


def compose(overrides: list[str], config_dir: str | None = None, **options: bool) -> DictConfig:
    """Return the configuration that overrides compose, outside of a command of Hydra's."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", [*_own_configuration(config_dir), *overrides], **options)


def _run(cfg: DictConfig, overrides: list[str], resume: bool) -> float:
    """Say in a first line what happens, and load PyTorch, which takes seconds, after it."""
    images = OmegaConf.select(cfg, "data.list") or OmegaConf.select(cfg, "data.root")
    stages = "last, then finetune" if cfg.stage == "both" else cfg.stage
    output = os.path.relpath(cfg.output, working_folder())
    logger.info(f"training stage {stages}; images: {images}; output: {output}")
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


def _is_override(word: str) -> bool:
    """Return whether a word sets or removes an option; the others are flags and their values."""
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


def _quoted(word: str) -> str:
    """Quote a path that Hydra could not read, or would read as a number (2024_01) or a sweep (a,b)."""
    name, _, value = word.partition("=")
    if name.lstrip("+") not in PATHS:
        return word
    try:
        read = OverridesParser.create().parse_override(word).value()
    except HydraException:
        return f"{name}={_in_quotes(value)}"
    is_path = isinstance(read, int | float) or (isinstance(read, Sweep) and Path(value).exists())
    return f"{name}={_in_quotes(value)}" if is_path else word


def _in_quotes(text: str) -> str:
    return "'" + text.replace("'", r"\'") + "'"


def _own_configuration(config_dir: str | None = None) -> list[str]:
    """Return the override by which Hydra also finds a folder, and `conf/` in the working folder."""
    there = Path("conf").is_dir() and not Path("conf").samefile(CONF)
    folders = [config_dir] * bool(config_dir) + ["conf"] * there
    quoted = ",".join(_in_quotes(f"file://{folder}") for folder in folders)
    return [f"hydra.searchpath=[{quoted}]"] * bool(folders)


def _explained(error: Exception, words: list[str]) -> str:
    """Return a sentence on words that make no configuration, from Hydra's error."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    if found := re.match(r"Could not override '([^']+)'", text):
        return _unknown_option(found[1])
    if found := re.search(r"Cannot assign \w+ to Dict.* full_key: (\S+)", text):
        groups = [each for each in _groups() if each.split("@")[-1].replace("/", ".") == found[1]]
        way = f"{groups[0]}=NAME" if groups else f"{found[1]}.OPTION=VALUE"
        return f"{found[1]} is a group of options: write {way}"
    if found := re.match(r"In '((\w+)/\S+)': ConfigKeyError .* Key '\2' not in", text):
        return f"{found[1]}.yaml has to begin with the line # @package _global_"
    absent = r"In '.*': Could not find '(.+)/(.+?)' Available options in '.*': (.*?) Config search"
    if found := re.match(absent, text):
        return f"there is no {found[1]}={found[2]}: choose from {', '.join(found[3].split())}"
    folders = [word for word in words if Path(word).is_dir()]
    if folders and isinstance(error, OverrideParseException):
        return f"to train on the images of {folders[0]}, write data=folder data.root={folders[0]}"
    return re.split(" full_key:| See https:", text)[0]


def _without_dashes(flag: str, words: list[str]) -> str:
    """Return how a flag that there is not, such as `--epochs 5`, is written as an option."""
    name, _, value = flag.lstrip("-").partition("=")
    following = words[words.index(flag) + 1 :][:1]
    value = value or next((word for word in following if re.fullmatch("[^-=][^=]*", word)), "VALUE")
    near = _similar_options(name.replace("-", "_"), _options())
    meant = f"did you mean {near[0]}={value}?" if near else "--help lists all"
    return f"{flag}: options are written OPTION=VALUE, without dashes: {meant}"


def _unknown_option(name: str) -> str:
    """Return what may have been meant by the name of an option that there is not."""
    parent, options = name.rpartition(".")[0], _options()
    if name in _options("last=sgd") and name not in options:
        return f"{name} is an option of last=sgd: add last=sgd"
    if near := _similar_options(name, options):
        return f"there is no option {name}: did you mean {' or '.join(near[:3])}?"
    of_class = f"{parent}._target_" in options
    rest = f"; +{name}=… passes it to the class at {parent}" if of_class else ""
    return f"there is no option {name}: --help lists all{rest}"


def _options(*overrides: str) -> list[str]:
    """Return the names of all options and groups."""
    return [*_groups(), *_names(OmegaConf.to_container(compose([*overrides])))]


def _similar_options(name: str, options: list[str]) -> list[str]:
    """Return what a name may stand for: groups below it, its siblings, or any option."""
    parent, _, last = name.rpartition(".")
    siblings = [each for each in options if each.rpartition(".")[0] == parent]
    below = [each for each in options if each.startswith(f"{name}/")]
    return below or _similar(last, siblings) or _similar(last, options)


def _groups() -> list[str]:
    """Return the groups of conf/ that a configuration chooses from, such as `model/pooling`."""
    choices = compose([], return_hydra_config=True).hydra.runtime.choices
    return [name for name in choices if not name.startswith("hydra/")]


def _similar(word: str, options: list[str]) -> list[str]:
    """Return the options, of any group, whose last part is the most similar to a word."""
    parts = {each: re.split("[./]", each)[-1] for each in options}
    near = get_close_matches(re.split("/", word)[-1], parts.values(), 1)
    return [each for each, part in parts.items() if part in near]


def _names(options: Any, parent: str = "") -> list[str]:
    """Return the names of all options below one, from plain values."""
    if not isinstance(options, dict):
        return [parent]
    inside = {f"{parent}.{key}".lstrip("."): value for key, value in options.items()}
    return [name for key, value in inside.items() for name in _names(value, key)]
