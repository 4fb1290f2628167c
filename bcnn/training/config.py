"""What is wrong with a configuration, as far as that can be seen before an image is read."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from bcnn.models.bilinear_cnn import BCNN, DEFAULT, make_backbone, make_pooling
from bcnn.models.checkpoint import network_in
from bcnn.models.description import LARGEST
from bcnn.training.run_state import RUN
from bcnn.utils.device import AUTOCAST, chosen_precision, refuse_gpu
from bcnn.utils.errors import UserError
from bcnn.utils.files import refuse_unwritable

STAGES = {"both": ("last", "finetune"), "last": ("last",), "finetune": ("finetune",)}
GROUPS = {"model", "last", "finetune", "data", "trainer", "callbacks", "logger"}
NEEDED = ("output", "seed", "stage", "data", "model", "last", "finetune", "trainer")

# Of Lightning's Trainer: options that both stages obey, and those that only steps along gradients do.
TRAINER = {
    "accelerator",
    "benchmark",
    "detect_anomaly",
    "deterministic",
    "devices",
    "enable_progress_bar",
    "log_every_n_steps",
    "num_nodes",
    "precision",
    "profiler",
    "strategy",
}
OF_STEPS = {"gradient_clip_algorithm", "gradient_clip_val", "limit_train_batches"}
# What a configuration makes, and thus what a run is resumed with.
MADE = (
    L.Callback,
    L.LightningDataModule,
    L.Trainer,
    Logger,
    Profiler,
    nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
)
SCHEDULES = {
    f"bcnn.training.module.{name}" for name in ("warmup_cosine", "multistep", "reduce_on_plateau")
}
# Of torch's optimizers, those whose steps grow with the gradient.
SCALED = {"torch.optim.SGD", "torch.optim.ASGD"}
INSTEAD = {
    "accumulate_grad_batches": "last.accumulate (of last=sgd) and finetune.accumulate",
    "callbacks": "callbacks=NAME, or +callbacks.NAME._target_=…",
    "check_val_every_n_epoch": "nothing: which epoch is kept depends on validating each",
    "default_root_dir": "output",
    "enable_checkpointing": "nothing: checkpoints are what a stage is run for",
    "fast_dev_run": "data.classes=2 data.size=64 finetune.epochs=1 for a quick try",
    "limit_test_batches": "data.test_fraction",
    "limit_val_batches": "data.val_fraction",
    "logger": "logger=NAME",
    "max_epochs": "last.epochs (of last=sgd) and finetune.epochs",
    "max_steps": "last.epochs (of last=sgd) and finetune.epochs",
}
# Of Lightning's callbacks.
INSTEAD_OF_CALLBACKS = {
    "BackboneFinetuning": "finetune.unfreeze_from",
    "BatchSizeFinder": "finetune.batch_size",
    "GradientAccumulationScheduler": "finetune.accumulate",
    "LearningRateFinder": "finetune.optimizer.lr, the most that a step takes: Polyak's limit finds how "
    "much of it (docs/finetune.md); last=convex has no rate",
    "RichProgressBar": "nothing: a run has its own bar, and a row an epoch",
    "StochasticWeightAveraging": "EMAWeightAveraging: an average that is made after the last epoch is "
    "not validated, and not kept",
    "TQDMProgressBar": "nothing: a run has its own bar, and a row an epoch",
}


@dataclass
class Model:
    """Options at model.*"""

    weights: str
    project: Any
    normalization: str | None
    backbone: Any
    pooling: Any


@dataclass
class Convex:
    """Options at last.* of last=convex."""

    solver: str
    l2: list[float]
    folds: int | None
    class_weights: bool
    loss: Any


@dataclass
class SGD:
    """Options at last.* of last=sgd."""

    solver: str
    store: bool
    epochs: int
    batch_size: int
    accumulate: int
    optimizer: Any
    scheduler: Any
    class_weights: bool
    loss: Any


@dataclass
class Finetune:
    """Options at finetune.*"""

    epochs: int
    batch_size: int
    accumulate: int
    unfreeze_from: str | None
    grad_checkpointing: bool
    centering: bool
    polyak: float | None
    optimizer: Any
    scheduler: Any
    class_weights: bool
    loss: Any
    compile: bool = False  # runs that were begun before there was any do not say


def refuse_mistakes(cfg: DictConfig) -> None:
    """Go through every option: none is dropped, and none that will not do is found out later.

    Raises:
        UserError: an option that is unknown, of the wrong kind, or does not go with the others.
    """
    given = OmegaConf.to_container(cfg, resolve=False)
    for name in NEEDED:
        if given.get(name) is None:  # type: ignore[union-attr]
            raise UserError(f"{name} is missing: a run cannot do without (no ~{name}, {name}=null)")
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed={cfg.seed}: a whole number, 0 at least and under {2**32}")
    if cfg.stage not in STAGES:
        raise UserError(
            f"stage={cfg.stage}: choose from {', '.join(STAGES)}; options that stood at stage.last.… "
            "and stage.finetune.… are last.… (those of SGD with last=sgd) and finetune.…"
        )
    stages = STAGES[cfg.stage]
    _refuse_unknown("", cfg, GROUPS | {"stage", "ckpt", "seed", "output"})
    solvers: dict[str, type] = {"convex": Convex, "sgd": SGD}
    solver = cfg.last.get("solver")
    if solver not in solvers:
        raise UserError(f"last.solver={solver}: choose last=convex, last=sgd or last=original")
    kinds = {"model": Model, "last": solvers[solver], "finetune": Finetune}
    for part, kind in kinds.items():
        _refuse_fields(part, cfg[part], kind)
    _refuse_calls(cfg)
    _refuse_values(cfg)
    _refuse_ckpt(cfg, stages)
    _refuse_network(cfg)
    _refuse_trainer(cfg, stages, _callbacks(cfg))


def _refuse_unknown(place: str, options: Mapping[str, Any], known: set[str]) -> None:
    for name in options:
        if name not in known:
            raise UserError(
                f"there is no option {place}{name}: choose from "
                f"{', '.join(place + each for each in sorted(known))}"
            )


def _refuse_fields(part: str, options: DictConfig, kind: type) -> None:
    """Options that are not fields of a dataclass, lack, or are of another type."""
    names = {field.name for field in fields(kind)}
    of_sgd = {field.name for field in fields(SGD)} - names
    if kind is Convex and (given := of_sgd.intersection(options)):
        raise UserError(f"last.{min(given)} is an option of last=sgd, and last=convex is chosen")
    _refuse_unknown(f"{part}.", options, names)
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    for name in needed - {*options}:
        raise UserError(f"{part}.{name} is missing: write {part}.{name}=…")
    try:
        OmegaConf.merge(OmegaConf.structured(kind), options)
    except OmegaConfBaseException as error:
        raise UserError(f"{part}.{error.key}: {str(error).splitlines()[0]}") from error


def _refuse_calls(node: Any, place: str = "") -> None:
    """Arguments that a `_target_` does not take."""
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        names = [name for name in node if not str(name).startswith("_")]
        try:
            target = get_object(str(node["_target_"]))
            inspect.signature(target).bind_partial(**dict.fromkeys(map(str, names)))
        except Exception as error:  # whatever importing a user's own class raises
            raise UserError(f"{place}: {' '.join(str(error).split())}") from error
    for name in node:
        _refuse_calls(node._get_node(name), f"{place}.{name!s}".lstrip("."))


def refuse_strangers(node: Any, folder: Path) -> None:
    """Targets that a run's record has no reason to name: it may come from somebody else.

    Raises:
        UserError: one is no kind of object that a configuration makes.
    """
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        name = str(node["_target_"])
        try:
            target = get_object(name)
        except Exception as error:  # whatever importing it raises
            raise UserError(f"{folder / RUN}: there is no {name}") from error
        if name not in SCHEDULES and not (isinstance(target, type) and issubclass(target, MADE)):
            raise UserError(
                f"{folder / RUN} asks for {name}, which no configuration needs: do not trust it"
            )
    for key in node:
        refuse_strangers(node._get_node(key), folder)


def _refuse_values(cfg: DictConfig) -> None:
    """Values that optimizer, schedule or loss will not take, found by making one of each."""
    for part in STAGES["both"]:
        options = cfg[part]
        for name in ("epochs", "batch_size", "accumulate"):
            if options.get(name, 1) < 1:
                raise UserError(f"{part}.{name}={options[name]}: 1 at least")
        try:
            instantiate(options.loss)()(torch.zeros(2, 3), torch.tensor([0, 1]))
            if "optimizer" in options:
                optimizer = instantiate(options.optimizer)([torch.zeros(1, requires_grad=True)])
                if options.scheduler is not None:
                    instantiate(options.scheduler)(optimizer, total_steps=10)
        except Exception as error:  # torch raises whatever it likes
            reason = " ".join(str(error).split()).removeprefix("Error in call to target ")
            raise UserError(f"{part}: {reason}") from error
    if not cfg.last.get("l2", [1]) or min(cfg.last.get("l2", [1])) <= 0:
        raise UserError(f"last.l2={cfg.last.l2}: one number over zero, or more")
    if (folds := cfg.last.get("folds")) is not None and folds < 2:
        raise UserError(f"last.folds={folds}: 2 or more, or null for no cross-validation")
    if cfg.finetune.polyak is not None and cfg.finetune.polyak <= 0:
        raise UserError(f"finetune.polyak={cfg.finetune.polyak}: a number over zero, or null")
    kind = cfg.finetune.optimizer._target_
    if cfg.finetune.polyak is not None and kind.startswith("torch.optim.") and kind not in SCALED:
        raise UserError(
            f"finetune.polyak limits gradients, and steps of {kind} are as long whatever those are: "
            "add finetune.polyak=null"
        )
    if cfg.finetune.centering and cfg.finetune.batch_size < 4:
        raise UserError(
            f"finetune.batch_size={cfg.finetune.batch_size} is too small to take its mean off: use 4 "
            "or more (for larger steps in little memory, with finetune.accumulate), or "
            "finetune.centering=false"
        )


def _refuse_network(cfg: DictConfig) -> None:
    """What the network will not take, found by having one without memory for its weights."""
    if cfg.ckpt is None:
        with torch.device("meta"):
            backbone = make_backbone(**cfg.model.backbone, project=cfg.model.get("project"))
            make_pooling(backbone.channels, **cfg.model.pooling)
    else:
        own = network_in(cfg.ckpt)
        _refuse_another_network(cfg, own)
        backbone = own.backbone
    if cfg.finetune.grad_checkpointing and not backbone.supports_grad_checkpointing:
        raise UserError("finetune.grad_checkpointing=true: this backbone cannot: leave it out")
    if cfg.finetune.unfreeze_from not in (None, *backbone.layers):
        raise UserError(
            f"finetune.unfreeze_from={cfg.finetune.unfreeze_from}: choose a layer from "
            f"{', '.join(backbone.layers)}, or null"
        )
    size = cfg.data.size
    if not isinstance(size, int) or size < backbone.min_size or size % backbone.size_divisor:
        multiple = f", a multiple of {backbone.size_divisor}" if backbone.size_divisor > 1 else ""
        raise UserError(
            f"data.size={size}: a whole number of pixels, {backbone.min_size} at least{multiple}"
        )
    crop_pct = cfg.data.crop_pct
    if isinstance(crop_pct, int | float) and size > LARGEST * crop_pct:
        raise UserError(f"data.size={size}: images would be resized to more than {LARGEST} px")


def _refuse_another_network(cfg: DictConfig, own: BCNN) -> None:
    """A finetune goes on with the network of `ckpt`; what is asked for is that, or not said."""
    options: Any = OmegaConf.to_container(cfg.model, resolve=True)
    for part, default in {**DEFAULT, "project": None}.items():
        asked, has = options.get(part), own.chosen.get(part)
        if asked != default and _differ(asked, has):
            raise UserError(
                f"model.{part} is {asked}, and in {cfg.ckpt}, with whose network a finetune goes on, "
                f"{has}: leave it out, or train stage=last with it first"
            )


def _differ(asked: Any, has: Any) -> bool:
    """Whether one of a network's choices is another; options that one of them leaves out are alike."""
    if not isinstance(asked, dict) or not isinstance(has, dict):
        return bool(asked != has)
    return any(has[name] != asked[name] for name in has.keys() & asked.keys())


def _refuse_ckpt(cfg: DictConfig, stages: tuple[str, ...]) -> None:
    if stages == ("finetune",) and cfg.ckpt is None:
        raise UserError(
            "stage=finetune starts from what stage=last saved: add ckpt=PATH, or train both stages "
            "with stage=both"
        )
    if stages[0] == "last" and cfg.ckpt is not None:
        raise UserError("ckpt is for stage=finetune: stage=last starts from model.weights")


def _callbacks(cfg: DictConfig) -> list[L.Callback]:
    """One of each, to find what they or a trainer will not take."""
    made = []
    for name, callback in (cfg.get("callbacks") or {}).items():
        if not isinstance(callback, DictConfig) or "_target_" not in callback:
            raise UserError(f"callbacks.{name}: say which one by callbacks.{name}._target_=…")
        module, _, kind = str(callback["_target_"]).rpartition(".")
        if "lightning" in module and kind in INSTEAD_OF_CALLBACKS:
            way_out = INSTEAD_OF_CALLBACKS[kind]
            raise UserError(f"callbacks.{name}: {kind} does not go with the stages: use {way_out}")
        try:
            made.append(instantiate(callback))
        except Exception as error:  # Lightning, Hydra and users raise whatever they like
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"callbacks.{name}: {reason}") from error
    return made


def _refuse_trainer(cfg: DictConfig, stages: tuple[str, ...], callbacks: list[L.Callback]) -> None:
    for name in cfg.trainer:
        if name in OF_STEPS:
            if "last" in stages and cfg.last.solver == "convex":
                raise UserError(
                    f"trainer.{name} is for steps along gradients, and last=convex takes none: choose "
                    "last=sgd, or train stage=finetune alone"
                )
        elif name not in TRAINER | {"_target_"}:
            way_out = INSTEAD.get(name, f"another of {', '.join(sorted(TRAINER))}")
            raise UserError(f"trainer.{name} does not go with the stages: use {way_out}")
    asked = str(cfg.trainer.precision)
    if asked not in ("auto", "32-true", *AUTOCAST):
        raise UserError(f"trainer.precision={asked}: choose from auto, 32-true, {', '.join(AUTOCAST)}")
    refuse_gpu(cfg.trainer.accelerator)
    precision = chosen_precision(cfg.trainer)
    try:
        trainer: L.Trainer = instantiate(
            cfg.trainer,
            precision=precision,
            logger=False,
            enable_progress_bar=False,
            callbacks=callbacks,
        )
    except Exception as error:  # Lightning and Hydra raise whatever they like
        raise UserError(f"trainer: {' '.join(str(error.__cause__ or error).split())}") from error
    ranks = trainer.world_size
    for stage in stages:
        batch = cfg[stage].get("batch_size", ranks)
        if batch % ranks:
            choices = sorted({max(1, batch // ranks) * ranks, (batch // ranks + 1) * ranks})
            raise UserError(
                f"{stage}.batch_size={batch} cannot be shared equally by {ranks} devices: choose "
                f"{' or '.join(map(str, choices))}, or set trainer.devices"
            )
    if trainer.precision != precision:
        raise UserError(
            f"trainer.precision={precision}: this device computes in {trainer.precision} instead; "
            "leave it at auto"
        )


@rank_zero_only
def refuse_output(folder: Path) -> None:
    """Refuse a folder that holds another run's files, or that cannot be written to.

    Raises:
        UserError: it is one.
    """
    refuse_unwritable(folder)
    for name in (RUN, "figures.json", *STAGES["both"]):
        if (folder / name).exists():
            raise UserError(
                f"output={folder} holds a run already ({name}): name another folder, or go on with an "
                f"interrupted one by resume={folder}"
            )
