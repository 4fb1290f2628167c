"""What a stage fits: the network to start from, the module around it, and its data."""

import shutil
from math import isqrt
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.index import listed
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import initialise_backbone, load_model
from bcnn.training.convex_stage import ConvexModule
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.feature_store import made_stores_dir, stores_dir
from bcnn.training.logistic_regression import MAX_ENTRIES
from bcnn.training.module import BCNNModule, reduce_on_plateau
from bcnn.training.pca import fit_projection
from bcnn.utils import terminal
from bcnn.utils.errors import UserError

say = rank_zero_only(terminal.say)


def build_model(cfg: DictConfig, images: FineGrainedDataModule, device: torch.device) -> BCNN:
    """The network that the first stage starts from: new, or that of `ckpt`, whose splits it brings.

    Args:
        cfg: the whole configuration; where `ckpt` is of another network, that is written into it.
        images: set up already.
        device: to compute on what the weights depend on; the network is on the CPU.

    Raises:
        UserError: the weights cannot be had, or `ckpt` was trained on other classes.
    """
    chosen: Any = OmegaConf.to_container(cfg.model, resolve=True)
    if cfg.ckpt is None:
        project = chosen.get("project")
        network = (chosen["backbone"], chosen["pooling"], project)
        model = BCNN(images.classes, images.preprocessing, *network)
        images.resize_for(model.backbone.interpolation)
        model.preprocessing = images.preprocessing
        initialise_backbone(model, cfg.model.weights, cfg.model.normalization)
        if cfg.model.weights == "pretrained":
            say(f"weights as published: licence {model.backbone.licence or 'not stated'}")
        if project is not None:
            fit_projection(model.backbone, images, device, cfg.trainer.precision)
        model.split = images.split
        return model
    model = load_model(cfg.ckpt, images.classes, cfg.model.normalization)
    if model.classes != images.classes:
        raise UserError(
            f"{cfg.ckpt} was trained on other classes than {images.root} holds "
            f"({_difference(model.classes, images.classes)}): train stage=last on them first"
        )
    own = {part: model.chosen.get(part) for part in ("backbone", "pooling", "project")}
    if own != {part: chosen.get(part) for part in own}:
        say(f"the network is that of {cfg.ckpt}: {model.chosen}")
        for part, choice in own.items():
            OmegaConf.update(cfg, f"model.{part}", choice, merge=False, force_add=True)
    images.resize_for(model.preprocessing.interpolation)
    if model.preprocessing != images.preprocessing:
        say(f"{cfg.ckpt} was trained at {model.preprocessing}; going on at {images.preprocessing}")
    model.preprocessing = images.preprocessing
    if model.split is None:
        say(
            f"{cfg.ckpt} has no record of the images it was trained on: some may be among those that "
            "validate and test it here"
        )
    else:
        images.follow(model.split)
    model.split = images.split
    return model


def plan(
    name: str, options: DictConfig, images: FineGrainedDataModule, model: BCNN, precision: str
) -> tuple[BCNNModule, FineGrainedDataModule | CachedFeatureDataModule, dict[str, Any]]:
    """What to fit in a stage, on what, and the trainer's limits that go with it.

    Args:
        name: of the stage.
        options: those at `last` or `finetune`.
        images: set up already.
        model: the weights to start from.
        precision: Lightning's name.

    Raises:
        UserError: there is no room for the descriptors, there are too many rows for the convex solver,
            or a schedule waits for a validation that there is not.
    """
    # The convex solver takes every row once: to draw classes equally often is to weigh them equally.
    convex = name == "last" and options.solver == "convex"
    balanced = options.class_weights or (convex and images.sampler == "balanced")
    loss: nn.Module = instantiate(options.loss)(weight=images.class_weights() if balanced else None)
    if convex:
        rows = len(images.train)
        if rows * min(rows, model.pooling.width) > MAX_ENTRIES:
            raise UserError(
                f"{rows} training images are more than the {isqrt(MAX_ENTRIES)} that last=convex "
                f"takes: choose last=sgd, or rows of at most {MAX_ENTRIES // rows} numbers "
                "(model.project, model/pooling=compact model.pooling.width)"
            )
        data = CachedFeatureDataModule(images, model, precision)
        _refuse_full_disk(data)
        # One "epoch" a λ, one step an epoch, and nothing in it that half precision could speed up.
        limits = {"max_epochs": len(options.l2), "limit_train_batches": 1, "precision": "32-true"}
        module = ConvexModule(
            model,
            *data.means(images.train),
            options.l2,
            loss,
            folds=options.get("folds"),
            choose=not images.val,
        )
        if module.cross_validates:
            say(
                f"no validation images: λ is chosen by {module.folds}-fold cross-validation in training"
            )
        return module, data, limits
    limits = {"max_epochs": options.epochs, "accumulate_grad_batches": options.accumulate}
    scheduler = instantiate(options.scheduler)
    if getattr(scheduler, "func", None) is reduce_on_plateau and not images.val:
        raise UserError(
            f"{name}.scheduler=plateau waits for the validation loss, and there are no validation "
            f"images: set data.val_fraction, or choose schedule@{name}.scheduler=cosine"
        )
    steps = {"optimizer": instantiate(options.optimizer), "scheduler": scheduler, "loss": loss}
    if name == "finetune":
        model.backbone.grad_checkpointing = options.grad_checkpointing
        model.backbone.compiling = options.get("compile", False)
        tuning = {key: options[key] for key in ("centering", "polyak", "unfreeze_from")}
        return BCNNModule(model, "finetune", **steps, **tuning), images, limits
    if not options.store:
        return BCNNModule(model, "last", **steps), images, limits
    data = CachedFeatureDataModule(images, model, precision)
    _refuse_full_disk(data)
    return BCNNModule(model, "last", **steps), data, limits


@rank_zero_only
def _refuse_full_disk(data: CachedFeatureDataModule) -> None:
    """Say where the descriptors will be, or that there is no room for them."""
    free = shutil.disk_usage(made_stores_dir()).free
    size = f"{data.store.rows} rows of {len(data.paths)} images, {data.store.nbytes / 1e9:.2f} GB"
    if not data.store.folder.exists() and data.store.nbytes > free:
        raise UserError(
            f"no room for descriptors ({size}): {free / 1e9:.2f} GB are free in {stores_dir()}; set "
            "BCNN_STORES to a folder on another disk, or choose last=sgd last.store=false"
        )
    say(f"descriptor store {data.store.folder}: {size}")


def _difference(before: list[str], now: list[str]) -> str:
    """What one list of classes has and the other has not."""
    sides = (("new here", now, before), ("missing here", before, now))
    found = [
        f"{title}: {listed(name for name in names if name not in others)}"
        for title, names, others in sides
        if set(names) - set(others)
    ]
    return "; ".join(found) or "the same names in another order"
