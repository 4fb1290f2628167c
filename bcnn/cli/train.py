"""Train a bilinear CNN: the command, `bcnn train` or `python train.py`."""

import os
import re
import sys
import traceback
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bcnn.training.sweep import in_sweep, ranked, run_job, told
from bcnn.utils.interruption import Interruption, raise_interruptions
from bcnn.utils.options import literal, print_any_text
from bcnn.utils.progress import progress
from bcnn.utils.terminal import say

PACKAGE = Path(__file__).parents[1]
# In the package where it is installed, beside it in a clone.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # over 0 in the processes of other GPUs


def main(words: list[str]) -> int:
    """Train by Hydra's overrides and flags, or go on by `resume=FOLDER`; returns the exit code."""
    print_any_text()
    raise_interruptions()
    resumed = [word for word in words if word.startswith("resume=")]
    # What follows a flag is its value.
    bare = [word for flag, word in pairwise(["", *words]) if "=" not in word and flag[:1] != "-"]
    folders = [word for word in bare if Path(word).is_dir()]
    if resumed and words[1:]:
        return _mistake(f"{resumed[0]} goes on with the options of that run: give no others")
    if not resumed and _apart(words):
        return _mistake("processes that were started together need one folder: add output=FOLDER")
    if folders:
        return _mistake(f"{folders[0]}: to train on a folder, write data=folder data.root={folders[0]}")
    try:
        if resumed:
            folder = Path(resumed[0].removeprefix("resume=")).expanduser()
            told(_stages(f"going on with {folder}").resume, folder)
        else:
            return _compose(words)
    except Interruption as error:
        traceback.clear_frames(error.__traceback__)  # what was under way there ends: its bar
        say(f"interrupted ({error})", file=sys.stderr)
        return error.exit_code
    return 0


def _apart(words: list[str]) -> bool:
    """Whether torchrun or srun started several processes, each of which names a folder by itself."""
    named = any(word.startswith(("output=", "hydra.run.dir=", "hydra.sweep.dir=")) for word in words)
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    srun = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    return (torchrun or srun) and not named


def _first() -> bool:
    """Whether this process speaks for all that train together."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def _mistake(sentence: str) -> int:
    if _first():
        say(f"error: {sentence}", file=sys.stderr)
    return 1


def _compose(words: list[str]) -> int:
    """Have Hydra make a configuration of the words, or in a sweep several, and train by each."""
    composed: list[DictConfig] = []
    sweep = not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(words)
    called = sys.argv

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def run(cfg: DictConfig) -> float:
        """Returns validation top-1, for sweeps to maximise."""
        OmegaConf.to_container(cfg, resolve=True)  # raises where ${name} stands for nothing
        composed.append(cfg)
        sys.argv = called  # by which Lightning starts the processes of other GPUs
        room = _stages(_opening(cfg))
        overrides = list(HydraConfig.get().overrides.task)
        return run_job(room, cfg, overrides) if in_sweep() else told(room.run, cfg, overrides)

    # What Hydra reads: `data.root=2024` is a folder, not a number.
    sys.argv = [called[0], *_own_configuration(words), *(literal(word, sweep) for word in words)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # mistakes are raised, not printed
    try:
        with ranked(words):
            run()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if composed:
            raise
        return _mistake(_refused(str(error)))
    return 0


def _refused(text: str) -> str:
    """In a sentence, what Hydra says of words that make no configuration."""
    text = " ".join(text.split())
    if found := re.match(r"Could not override '([^']+)'", text):
        return _unknown(found[1])
    absent = r"In '.*': Could not find '(.+)/(.+?)' Available options in '.*': (.*?) Config search"
    if found := re.match(absent, text):
        return f"there is no {found[1]}={found[2]}: choose from {', '.join(found[3].split())}"
    return text


def _unknown(name: str) -> str:
    parent, _, last = name.rpartition(".")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        plain, sgd = (hydra.compose("config", choice) for choice in ([], ["last=sgd"]))
    if OmegaConf.select(sgd, name) is not None:
        return f"{name} is an option of last=sgd, and last=convex is chosen: add last=sgd"
    there = OmegaConf.select(plain, parent) if parent else plain
    if near := get_close_matches(last, map(str, there if isinstance(there, DictConfig) else []), 1):
        return f"there is no option {name}: did you mean {name.removesuffix(last)}{near[0]}?"
    return (
        f"there is no option {name} in what is chosen: --help lists all; +{name}=… hands on what is "
        "not listed to the class that is configured"
    )


def _own_configuration(words: list[str]) -> list[str]:
    """Have what the user keeps in `conf/` of the working folder be found, too."""
    given = any(word.startswith(("--config-dir", "-cd")) for word in words)
    there = Path("conf").is_dir() and not Path("conf").samefile(CONF)
    return ["--config-dir=conf"] if there and not given else []


def _opening(cfg: DictConfig) -> str:
    """The first line; mistakes are found later."""
    stage, images, images_list, output = (
        OmegaConf.select(cfg, name) for name in ("stage", "data.root", "data.list", "output")
    )
    stages = "last, then finetune" if stage == "both" else stage
    here = str(output).removeprefix(f"{Path.cwd()}{os.sep}")
    return f"training stage {stages}; images: {images_list or images}; output: {here}"


def _stages(opening: str) -> ModuleType:
    """`bcnn.training.run`, whose torch and Lightning take seconds to load, after a first line."""
    if _first():
        say(opening)
    with progress("loading PyTorch", show=_first()):
        from bcnn.training import run
    return run
