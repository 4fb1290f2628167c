"""Rules across options: what would be dropped, or do something else, without a word is refused.

Unknown options and wrong types are refused by Hydra (see `bcnn.training.schema`).
"""

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from bcnn.models.bilinear_cnn import BCNN, DEFAULT
from bcnn.models.description import LARGEST
from bcnn.utils.device import AUTOCAST
from bcnn.utils.errors import UserError

AUTO = "auto"  # a name of a pooling: stage `last` chooses one
STAGES = {"both": ("last", "finetune"), "last": ("last",), "finetune": ("finetune",)}

# Least and largest values; null is allowed where an option may be null.
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "data.size": (1, LARGEST),
    "last.epochs": (1, 10**9),
    "last.batch_size": (1, 10**9),
    "last.accumulate": (1, 10**9),
    "last.folds": (2, 10**9),
    "finetune.epochs": (1, 10**9),
    "finetune.batch_size": (1, 10**9),
    "finetune.accumulate": (1, 10**9),
    "finetune.polyak": (1e-9, 1e9),
}

# Trainer options that a stage sets itself, some from options of its own.
OF_THE_STAGE = {
    "accumulate_grad_batches": "finetune.accumulate",
    "callbacks": "callbacks=NAME or +callbacks.NAME._target_=…",
    "default_root_dir": "output",
    "logger": "logger=NAME",
    "max_epochs": "finetune.epochs",
    **dict.fromkeys(("max_steps", "min_epochs", "min_steps"), "finetune.epochs"),
    **dict.fromkeys(("check_val_every_n_epoch", "val_check_interval"), "nothing: each epoch counts"),
    **dict.fromkeys(("enable_checkpointing", "num_sanity_val_steps"), "nothing"),
    "use_distributed_sampler": "nothing: ranks share every batch",
}
# Trainer options that only steps along gradients use.
OF_GRADIENT_STEPS = {
    *("gradient_clip_algorithm", "gradient_clip_val", "max_time", "overfit_batches"),
    *("limit_train_batches", "limit_val_batches"),
}

# Lightning's callbacks that would train otherwise than the configuration says.
UNUSABLE_CALLBACKS = {
    "BatchSizeFinder": "finetune.batch_size",
    "GradientAccumulationScheduler": "finetune.accumulate",
    "LearningRateFinder": "finetune.optimizer.lr",
    "StochasticWeightAveraging": "EMAWeightAveraging, whose weights are validated",
}

# torch's optimizers whose steps grow with the gradient, as Polyak's step size assumes.
SCALED = {"torch.optim.SGD", "torch.optim.ASGD"}


def validate(cfg: DictConfig, overrides: Iterable[str] = ()) -> None:
    """Check a configuration before anything is built; raise UserError at the first mistake.

    Args:
        overrides: those that the user wrote, as far as it was composed from any.
    """
    if cfg.stage not in STAGES:
        raise UserError(f"stage={cfg.stage}: choose from {', '.join(STAGES)}")
    _validate_names(cfg)
    _validate_limits(cfg)
    _validate_arguments(cfg)
    _validate_checkpoint(cfg, overrides)
    _validate_pooling(cfg)
    _validate_finetune(cfg.finetune)
    _validate_teacher(cfg, overrides)
    _validate_balance(cfg)
    _validate_trainer(cfg)
    _validate_callbacks(cfg)


def validate_network(cfg: DictConfig, model: BCNN, overrides: Iterable[str] = ()) -> None:
    """Check the options that depend on the network; overrides: see `validate`."""
    preprocessing, backbone, tuning = model.preprocessing, model.backbone, cfg.finetune
    preprocessing.validate()
    size, least = preprocessing.size, backbone.min_size
    if size < least or size % backbone.size_divisor:
        divisor = f", a multiple of {backbone.size_divisor}" if backbone.size_divisor > 1 else ""
        raise UserError(f"data.size={size}: this backbone takes {least} or more{divisor}")
    if preprocessing.resize == "whole" and not backbone.locations(least + preprocessing.divisor, least):
        raise UserError(
            "data.resize=whole: this backbone takes square images alone; use keep or squash"
        )
    if tuning.unfreeze_from not in (None, *backbone.layers):
        layers = ", ".join(backbone.layers)
        raise UserError(f"finetune.unfreeze_from={tuning.unfreeze_from}: choose from null, {layers}")
    if tuning.grad_checkpointing and not backbone.supports_grad_checkpointing:
        raise UserError("finetune.grad_checkpointing=true: this backbone does not support it")
    if cfg.ckpt is not None:
        _validate_same_network(cfg, model, [*overrides])


def validate_batches(cfg: DictConfig, ranks: int) -> None:
    """Check that the ranks can share every batch equally."""
    for stage in STAGES[cfg.stage]:
        batch = cfg[stage].get("batch_size", ranks)
        if batch % ranks:
            larger = (batch // ranks + 1) * ranks
            raise UserError(
                f"{stage}.batch_size={batch}: {ranks} devices cannot share it equally; use {larger}"
            )


def _validate_names(cfg: DictConfig) -> None:
    """Refuse options that were added by `+` and that nothing reads."""
    for prefix in ("", "model", "last", "finetune"):
        part = OmegaConf.select(cfg, prefix) if prefix else cfg
        known: Any = OmegaConf.get_type(part)
        names = {field.name for field in fields(known)} if known is not dict else {*part}
        for name in {*part} - names - {"hydra"}:
            option = f"{prefix}.{name}".lstrip(".")
            raise UserError(f"there is no option {option}: --help lists all options")


def _validate_limits(cfg: DictConfig) -> None:
    for name, (least, largest) in LIMITS.items():
        value = OmegaConf.select(cfg, name)
        if value is not None and not least <= value <= largest:
            raise UserError(f"{name}={value:g}: choose a number from {least:g} to {largest:g}")
    if "l2" in cfg.last and (not cfg.last.l2 or min(cfg.last.l2) <= 0):
        raise UserError(f"last.l2={cfg.last.l2}: give one number above zero, or more")


def _validate_arguments(node: Any, name: str = "") -> None:
    """Refuse arguments that a `_target_` does not take, before hours of training lead to it."""
    if not isinstance(node, DictConfig) or node._is_none():
        return
    if "_target_" in node:
        arguments = {str(key): None for key in node if not str(key).startswith("_")}
        try:
            inspect.signature(get_object(str(node["_target_"]))).bind_partial(**arguments)
        except Exception as error:  # importing a user's class may raise anything
            raise UserError(f"{name}: {' '.join(str(error).split())}") from error
    for key in node:
        _validate_arguments(node._get_node(key), f"{name}.{key!s}".lstrip("."))


def _validate_checkpoint(cfg: DictConfig, overrides: Iterable[str]) -> None:
    if cfg.ckpt and any(word.startswith("model.weights=") for word in overrides):
        raise UserError(f"model.weights has no effect: the run starts from {cfg.ckpt}; leave one out")
    if cfg.stage == "finetune" and cfg.ckpt is None:
        raise UserError("stage=finetune starts from a checkpoint of stage=last: add ckpt=PATH")


def _validate_pooling(cfg: DictConfig) -> None:
    if cfg.model.pooling.get("name") != AUTO or cfg.ckpt or cfg.stage == "finetune":
        return
    if cfg.last.solver != "convex" or cfg.last.folds is None:
        raise UserError(
            "model/pooling=auto compares solutions of last=convex by last.folds: choose a pooling, as "
            "model/pooling=bilinear"
        )
    if cfg.model.project is not None:
        raise UserError(
            f"model.project={cfg.model.project} has no effect on model/pooling=auto, which compares "
            "projections of its own: choose a pooling"
        )


def _validate_finetune(options: DictConfig) -> None:
    kind = options.optimizer._target_
    if options.polyak is not None and kind.startswith("torch.optim.") and kind not in SCALED:
        raise UserError(
            f"finetune.polyak has no effect on the steps of {kind}: add finetune.polyak=null"
        )
    if options.centering and options.batch_size < 4:
        raise UserError(
            f"finetune.batch_size={options.batch_size} is too small for finetune.centering: use 4 or "
            "more, with finetune.accumulate, or finetune.centering=false"
        )


def _validate_teacher(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Refuse options that a teacher replaces, and unlabelled images that nothing trains on."""
    dropped = re.compile(r"finetune\.(class_weights|loss)")
    word = next(filter(dropped.match, overrides), None)
    if word and cfg.finetune.teacher:
        raise UserError(f"{word} has no effect with finetune.teacher, which replaces the labels")
    if cfg.finetune.teacher and cfg.stage == "last":
        raise UserError("finetune.teacher teaches stage finetune: choose stage=both or finetune")
    labels_needed = cfg.stage == "last" or (cfg.stage == "both" and cfg.last.solver != "convex")
    if cfg.data.get("unlabelled") and (labels_needed or not cfg.finetune.teacher):
        raise UserError(
            "data.unlabelled is for stage finetune with a teacher: add finetune.teacher=CKPT to "
            "stage=finetune, or to stage=both with last=convex"
        )


def _validate_balance(cfg: DictConfig) -> None:
    for stage in STAGES[cfg.stage]:
        if cfg.data.get("sampler") == "balanced" and cfg[stage].get("class_weights"):
            raise UserError(
                f"data.sampler=balanced and {stage}.class_weights=true would both weigh the classes: "
                "leave one out"
            )


def _validate_trainer(cfg: DictConfig) -> None:
    for name in cfg.trainer:
        if name in OF_THE_STAGE:
            raise UserError(f"trainer.{name} is set by the stage: use {OF_THE_STAGE[name]}")
        if name in OF_GRADIENT_STEPS and cfg.stage == "last" and cfg.last.solver == "convex":
            raise UserError(f"trainer.{name} has no effect on last=convex: add last=sgd")
    precision = str(cfg.trainer.precision)
    if precision not in ("auto", "32-true", *AUTOCAST):
        choices = ", ".join(("auto", "32-true", *AUTOCAST))
        raise UserError(f"trainer.precision={precision}: choose from {choices}")


def _validate_callbacks(cfg: DictConfig) -> None:
    if cfg.callbacks and cfg.stage == "last" and cfg.last.solver == "convex":
        raise UserError("callbacks have no effect on last=convex, which trains no epochs: add last=sgd")
    for name, options in (cfg.callbacks or {}).items():
        target = options.get("_target_") if isinstance(options, DictConfig) else None
        if target is None:
            raise UserError(f"callbacks.{name}: name its class by callbacks.{name}._target_=…")
        kind = str(target).rpartition(".")[2]
        if str(target).startswith("lightning.") and kind in UNUSABLE_CALLBACKS:
            raise UserError(
                f"callbacks.{name}: {kind} is not supported: use {UNUSABLE_CALLBACKS[kind]}"
            )


def _validate_same_network(cfg: DictConfig, model: BCNN, overrides: list[str]) -> None:
    """Refuse a network other than that of `ckpt`, whose network a run continues with."""
    asked: Any = OmegaConf.to_container(cfg.model, resolve=True)
    for part, default in {**DEFAULT, "project": None}.items():
        want, have = asked.get(part), model.chosen.get(part)
        if isinstance(want, dict) and isinstance(have, dict):
            differ = any(have[name] != want[name] for name in have.keys() & want.keys())
        else:
            differ = want != have
        named = any(re.match(rf"[+~]*model[./]{part}\b", word) for word in overrides)
        by_default = want == default or (part == "pooling" and want["name"] == AUTO)
        if differ and (named or not by_default):
            raise UserError(
                f"model.{part} is {want}, and {cfg.ckpt} has {have}: leave it out, or train stage=last "
                "with it and without ckpt"
            )
