"""Run the stages that a configuration names, each from the best weights of the one before."""

import math
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from bcnn.convex import MAX_ROWS, ConvexModule
from bcnn.data.folder import ImageFolderData
from bcnn.descriptors import DescriptorData
from bcnn.errors import UserError
from bcnn.guard import CollapseGuard
from bcnn.model import BCNN, LAYERS
from bcnn.module import BCNNModule
from bcnn.precision import fastest_precision
from bcnn.report import plot_curves
from bcnn.store import VIEWS, stores_dir
from bcnn.weights import initialise_features, load_model

SGD_OPTION = re.compile(
    r"\W*(schedule@)?stage\.(last\.)?(epochs|batch_size|accumulate|optimizer|scheduler)\b"
)

CHOICES = {"store": ("auto", "on", "off"), "solver": ("auto", "convex", "sgd")}

say = rank_zero_only(print)


@dataclass
class Result:
    """What a stage ended with: the file of its best weights, their figures, and what went wrong."""

    stage: str
    checkpoint: Path
    metrics: dict[str, float]
    failure: str = ""


def run(cfg: DictConfig) -> float:
    """Train the stages, test them, and say where the results are.

    Returns:
        Validation top-1 of the last stage's best weights, for sweeps to maximise (nan without
        validation images).

    Raises:
        UserError: a mistake in the configuration, the images or the weights; or, after all is saved
            and said, a finetune that ended worse than it started.
    """
    stages = [cfg.stage.last, cfg.stage.finetune] if cfg.stage.name == "both" else [cfg.stage]
    for stage in stages:
        for option, choices in CHOICES.items():
            if stage.get(option, "auto") not in choices:
                raise UserError(f"stage.{option}={stage[option]}: choose from {', '.join(choices)}")
    if stages[0].name == "finetune" and cfg.ckpt is None:
        raise UserError(
            "stage=finetune starts from what stage=last saved: add ckpt=PATH, or train both stages "
            "with stage=both"
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
    images: ImageFolderData = instantiate(cfg.data)
    images.prepare_data()
    images.setup()
    say(
        f"{images.root}: {len(images.classes)} classes, {len(images.train)} images to train on, "
        f"{len(images.val)} to validate, {len(images.test)} to test"
    )
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    model = _build_model(cfg, images)
    results: list[Result] = []
    checkpoint = Path(cfg.ckpt) if cfg.ckpt else None
    for stage in stages:
        # Seeded again, so that a stage does the same alone as after the other.
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        images.batch_size = stage.batch_size
        results.append(run_stage(cfg, stage, images, model, checkpoint))
        checkpoint = results[-1].checkpoint
    _summarise(results, images)
    if results[-1].failure:
        raise UserError(results[-1].failure)
    return results[-1].metrics.get("val_top1", math.nan)


def run_stage(
    cfg: DictConfig, stage: DictConfig, images: ImageFolderData, model: BCNN, origin: Path | None
) -> Result:
    """Train one stage, leave its best weights in `model`, and test them.

    Args:
        cfg: the whole configuration.
        stage: the stage's part of it.
        images: set up already.
        model: the weights to start from; changed in place.
        origin: the file that holds these weights, if any.
    """
    say(f"\nstage {stage.name}")
    folder = Path(cfg.output) / stage.name
    precision = str(cfg.trainer.precision)
    if precision == "auto":
        precision = fastest_precision(cfg.trainer.accelerator)
    module, data, limits = _plan(stage, images, model, precision)
    convex = isinstance(module, ConvexModule)
    validates = len(images.val) > 0
    best = ModelCheckpoint(
        folder,
        filename="best" if validates else "last",
        monitor=("val_loss" if convex else "val_score") if validates else None,
        mode="min" if convex else "max",
        save_weights_only=True,
    )
    loggers = [instantiate(logger, save_dir=folder) for logger in cfg.logger.values()]
    settings = {
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
    }
    evaluator = instantiate(
        cfg.trainer,
        precision=precision,
        callbacks=[RichProgressBar()],
        logger=False,
        enable_checkpointing=False,
        **settings,
    )

    def validate() -> dict[str, float]:
        if not validates:
            return {}
        return dict(evaluator.validate(module, datamodule=data, verbose=False)[0])

    start = validate() if stage.name == "finetune" else {}
    for logger in loggers:
        logger.log_metrics(start, step=0)
    rate = f"stage.{stage.name}." if cfg.stage.name == "both" else "stage."
    advice = f"try {rate}optimizer.lr={stage.optimizer.lr / 10:g}"
    guard = CollapseGuard(len(images.classes), start.get("val_top1"), advice)
    trainer = instantiate(
        cfg.trainer,
        callbacks=[best, guard, LearningRateMonitor("step"), RichProgressBar()],
        logger=loggers,
        **{"precision": precision, **limits, **settings},
    )
    module.train()  # Lightning keeps the mode that it finds
    trainer.fit(module, datamodule=data)
    checkpoint, failure = Path(best.best_model_path), ""
    model.load_state_dict(load_model(checkpoint).state_dict())
    metrics = validate()
    if start and origin and not metrics["val_score"] >= start["val_score"]:  # also where it is nan
        if not metrics["val_top1"] >= start["val_top1"]:
            failure = (
                f"stage {stage.name} ended worse than it started (validation top-1 at best "
                f"{metrics['val_top1']:.1%}, at its start {start['val_top1']:.1%}): {advice}"
            )
        say(f"no epoch of this stage was better than its start: keeping {origin}")
        checkpoint, metrics = origin, start
        start_model = load_model(origin, images.classes, cfg.model.normalization)
        model.load_state_dict(start_model.state_dict())
    if images.test:
        metrics |= evaluator.test(module, datamodule=data, verbose=False)[0]
    for logger in loggers:
        logger.log_metrics({key: v for key, v in metrics.items() if key.startswith("test")})
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # the next stage is a run of its own
    if trainer.is_global_zero:
        plot_curves(folder / "metrics.csv", folder / "curves.png")
    return Result(stage.name, checkpoint, metrics, failure)


def _plan(
    stage: DictConfig, images: ImageFolderData, model: BCNN, precision: str
) -> tuple[BCNNModule, L.LightningDataModule, dict[str, Any]]:
    """What to fit, on what, and the trainer's limits that go with it."""
    loss = instantiate(stage.loss)
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
    return ConvexModule(model, data, stage.l2, loss), data, limits


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


def _build_model(cfg: DictConfig, images: ImageFolderData) -> BCNN:
    if cfg.ckpt is None:
        model = BCNN(images.classes, images.size, images.resize)
        initialise_features(model, cfg.model.weights, cfg.model.normalization)
        return model
    model = load_model(cfg.ckpt, images.classes, cfg.model.normalization)
    if model.classes != images.classes:
        raise UserError(
            f"{cfg.ckpt} was trained on other classes ({', '.join(model.classes[:3])}, …) than "
            f"{images.root} holds ({', '.join(images.classes[:3])}, …): train stage=last on them first"
        )
    if (model.size, model.resize) != (images.size, images.resize):
        say(
            f"{cfg.ckpt} was trained at {model.size} px ({model.resize}); "
            f"going on at {images.size} px ({images.resize})"
        )
    model.size, model.resize = images.size, images.resize
    return model


def _summarise(results: list[Result], images: ImageFolderData) -> None:
    say("")
    for result in results:
        for split, count in (("val", len(images.val)), ("test", len(images.test))):
            if f"{split}_top1" in result.metrics:
                top1, top5 = (result.metrics[f"{split}_{name}"] for name in ("top1", "top5"))
                name = {"val": "validation", "test": "test"}[split]
                say(f"{result.stage:9}{name:>11}: top-1 {top1:.1%}, top-5 {top5:.1%} ({count} images)")
    if not images.test:
        say(f"{images.root} has no test/ folder: no test figures")
    say(f"best checkpoint: {results[-1].checkpoint}")
    if HydraConfig.initialized():
        say(f"next: {_next_command(results[-1])}")


def _next_command(result: Result) -> str:
    """Fine-tune what `last` saved; or go on from a finetune at a tenth of its rate."""
    given = HydraConfig.get().overrides.task
    kept = [o for o in given if not re.match(r"\W*(stage|ckpt|experiment|output)\b", o)]
    words = ["python", "train.py", "stage=finetune", f"ckpt={result.checkpoint}", *kept]
    if result.stage == "finetune":
        words.append("stage.optimizer.lr=1e-4")
    return shlex.join(words)
