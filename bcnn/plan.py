"""What a configuration asks for, checked: the network to start from, what to fit, and on what."""

import re
import shutil
from collections.abc import Sequence
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import nn

from bcnn.convex import MAX_ROWS, ConvexModule
from bcnn.data.folder import ImageFolderData
from bcnn.descriptors import DescriptorData
from bcnn.errors import UserError
from bcnn.model import BCNN, LAYERS
from bcnn.module import BCNNModule
from bcnn.store import VIEWS, stores_dir
from bcnn.weights import initialise_features, load_model

SGD_OPTION = re.compile(
    r"\W*(schedule@)?stage\.(last\.)?(epochs|batch_size|accumulate|optimizer|scheduler)\b"
)

CHOICES = {"store": ("auto", "on", "off"), "solver": ("auto", "convex", "sgd")}

say = rank_zero_only(print)


def refuse_mistakes(cfg: DictConfig, stages: Sequence[DictConfig]) -> None:
    """See to what can be seen before an image is read.

    Raises:
        UserError: options of the stages that are unknown, or do not go together.
    """
    for stage in stages:
        for option, choices in CHOICES.items():
            if stage.get(option, "auto") not in choices:
                raise UserError(f"stage.{option}={stage[option]}: choose from {', '.join(choices)}")
    if stages[0].name == "finetune" and cfg.ckpt is None:
        raise UserError(
            "stage=finetune starts from what stage=last saved: add ckpt=PATH, or train both stages "
            "with stage=both"
        )
    if stages[0].name == "finetune" and "finetune" in cfg.stage:
        raise UserError(
            f"the experiment's stage.finetune.epochs={cfg.stage.finetune.epochs} is for both stages in "
            "one run: with stage=finetune, write stage.epochs=… and the experiment's data=… "
            "model.weights=… in its place"
        )
    if stages[-1].get("centering") and stages[-1].batch_size < 4:
        raise UserError(
            f"batch_size={stages[-1].batch_size} is too small to take its mean off: use 4 or more (for "
            "larger steps in little memory, with accumulate), or finetune with centering=false"
        )
    if stages[-1].name == "finetune" and stages[-1].open_from not in (None, *LAYERS):
        raise UserError(
            f"open_from={stages[-1].open_from}: choose a layer from {', '.join(LAYERS)}, or null"
        )
    if stages[0].name == "last" and cfg.ckpt is not None:
        raise UserError("ckpt is for stage=finetune: stage=last starts from model.weights")


def build_model(cfg: DictConfig, images: ImageFolderData) -> BCNN:
    """The network that the first stage starts from: new, or that of `ckpt`.

    Raises:
        UserError: the weights cannot be had, or `ckpt` was trained on other classes.
    """
    if cfg.ckpt is None:
        model = BCNN(images.classes, images.size, images.resize, images.crop_pct)
        initialise_features(model, cfg.model.weights, cfg.model.normalization)
        return model
    model = load_model(cfg.ckpt, images.classes, cfg.model.normalization)
    if model.classes != images.classes:
        raise UserError(
            f"{cfg.ckpt} was trained on other classes ({', '.join(model.classes[:3])}, …) than "
            f"{images.root} holds ({', '.join(images.classes[:3])}, …): train stage=last on them first"
        )
    before, now = (
        f"{that.size} px ({that.resize}, crop_pct {that.crop_pct:g})" for that in (model, images)
    )
    if before != now:
        say(f"{cfg.ckpt} was trained at {before}; going on at {now}")
    model.size, model.resize, model.crop_pct = images.size, images.resize, images.crop_pct
    return model


def plan(
    stage: DictConfig, images: ImageFolderData, model: BCNN, precision: str
) -> tuple[BCNNModule, L.LightningDataModule, dict[str, Any]]:
    """What to fit, on what, and the trainer's limits that go with it."""
    loss = _loss(stage, images, balanced=stage.class_weights)
    steps = {
        "optimizer": instantiate(stage.optimizer),
        "scheduler": instantiate(stage.scheduler),
        "loss": loss,
    }
    limits: dict[str, Any] = {"max_epochs": stage.epochs, "accumulate_grad_batches": stage.accumulate}
    if stage.name == "finetune":
        model.checkpointing = stage.checkpointing
        tuning = {key: stage[key] for key in ("centering", "polyak", "open_from")}
        return BCNNModule(model, "finetune", **steps, **tuning), images, limits
    by_steps = BCNNModule(model, "last", **steps)
    if stage.store == "off":
        if stage.solver == "convex":
            raise UserError("stage.solver=convex needs the store: leave out stage.store=off")
        return by_steps, images, limits
    data = DescriptorData(images, model, precision)
    if not _fits(stage.store, data):
        return by_steps, images, limits
    if not _solves(stage.solver, images):
        return by_steps, data, limits
    # One "epoch" a λ, one step an epoch, and nothing in it that half precision could speed up.
    limits = {"max_epochs": len(stage.l2), "limit_train_batches": 1, "precision": "32-true"}
    # The solver takes every row once: to draw classes equally often is to weigh them equally.
    loss = _loss(stage, images, balanced=stage.class_weights or images.sampler == "balanced")
    return ConvexModule(model, data, stage.l2, loss), data, limits


def _loss(stage: DictConfig, images: ImageFolderData, balanced: bool) -> nn.Module:
    """The stage's loss, in which every class weighs the same if `balanced`."""
    loss: nn.Module = instantiate(stage.loss)(weight=images.class_weights() if balanced else None)
    return loss


def _fits(store: str, data: DescriptorData) -> bool:
    """Whether to use the descriptor store; says what was decided and why."""
    size = f"{len(data.paths)} images × {VIEWS} views, {data.store.nbytes / 1e9:.2f} GB"
    stores_dir().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(stores_dir()).free
    built = data.store.folder.exists()
    if store == "on" or built or data.store.nbytes < free / 2:
        say(f"descriptor store {data.store.folder}: {size}")
        return True
    say(f"no descriptor store: {size} is over half of the {free / 1e9:.2f} GB free in {stores_dir()}")
    return False


def _solves(solver: str, images: ImageFolderData) -> bool:
    """Whether stage `last` is solved as a convex problem, or by SGD; says which and why."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    for_sgd = [override for override in given if SGD_OPTION.match(override)]
    rows = len(images.train) * VIEWS
    if solver == "convex" and for_sgd:
        raise UserError(f"{for_sgd[0]} has no effect with stage.solver=convex: leave one of them out")
    if solver != "auto":
        return solver == "convex"
    if for_sgd:
        say(f"solver: sgd, since {for_sgd[0]} was given")
    elif rows > MAX_ROWS:
        say(f"solver: sgd, since {rows} rows are more than the {MAX_ROWS} that convex is used for")
    else:
        say(f"solver: convex, {rows} rows")
    return not for_sgd and rows <= MAX_ROWS
