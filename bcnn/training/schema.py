"""The options of a run and their types, which Hydra checks when it composes a configuration.

Values and what they mean are in conf/; a group there names its types first in its defaults list.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bcnn.utils.files import RESULT, checkpoint_of
from bcnn.utils.hub import SCHEME

# Options that may name a file.
CHECKPOINTS = ("ckpt", "model.weights", "finetune.teacher")
WORDS = ("model.weights", "data.taxonomy")  # files, or words with a meaning
PATHS = ("output", "data.root", "data.list", "data.taxonomy", "data.unlabelled", *CHECKPOINTS)


@dataclass
class ModelOptions:
    """Options at model.*"""

    weights: str
    project: int | None
    normalization: str | None
    backbone: dict[str, Any]
    pooling: dict[str, Any]


@dataclass
class DataOptions:
    """Options at data.*, of `bcnn.data.datamodule.FineGrainedDataModule`."""

    _target_: str
    root: str | None
    list: str | None
    size: int | None
    resize: str | None
    crop_pct: float | None
    interpolation: str | None
    train_scale: float | None
    classes: Any  # names, or how many
    taxonomy: Any  # a file, names of columns, or folders
    train_fraction: float
    val_fraction: float
    test_fraction: float | None
    unlabelled: str | None
    group: str | None
    near_duplicates: str | None
    on_invalid_image: str
    sampler: str | None
    cache: bool
    num_workers: int | None
    seed: int


@dataclass
class ConvexOptions:
    """Options at last.* of last=convex."""

    solver: str
    l2: list[float]
    folds: int | None
    class_weights: bool
    loss: dict[str, Any]


@dataclass
class GradientOptions:
    """Options of a stage that steps along gradients."""

    epochs: int
    batch_size: int
    accumulate: int
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    class_weights: bool
    loss: dict[str, Any]


@dataclass
class SGDOptions(GradientOptions):
    """Options at last.* of last=sgd."""

    solver: str
    store: bool


@dataclass
class FinetuneOptions(GradientOptions):
    """Options at finetune.*"""

    unfreeze_from: str | None
    grad_checkpointing: bool
    compile: bool
    centering: bool
    polyak: float | None
    teacher: str | None


@dataclass
class RunOptions:
    """The whole configuration."""

    stage: str
    ckpt: str | None
    seed: int
    output: str
    model: ModelOptions
    data: Any
    last: Any
    finetune: FinetuneOptions
    trainer: Any
    callbacks: Any
    logger: Any


for name, options in {
    "run": RunOptions,
    "data": DataOptions,
    "convex": ConvexOptions,
    "sgd": SGDOptions,
}.items():
    ConfigStore.instance().store(group="schema", name=name, node=options)


def working_folder() -> Path:
    """Return the folder that relative paths begin at, which `hydra.job.chdir=true` leaves."""
    return Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()


def absolute_paths(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return a copy: relative paths begin at a folder, checkpoints are files (see `checkpoint_of`)."""
    copy = cfg.copy()
    OmegaConf.set_struct(copy, False)
    OmegaConf.resolve(copy)
    for key in PATHS:
        value = OmegaConf.select(copy, key)
        if key in CHECKPOINTS and str(value).startswith(SCHEME):
            value = str(checkpoint_of(value))
        path = folder / Path(str(value)).expanduser()
        is_path = key not in WORDS or path.is_file() or any(path.glob(f"*/{RESULT}"))
        if isinstance(value, str) and is_path:
            found = checkpoint_of(path) if key in CHECKPOINTS else path
            OmegaConf.update(copy, key, str(found))
    return copy
