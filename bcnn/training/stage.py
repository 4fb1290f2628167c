"""One stage: fit it, keep its best weights, test them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor, nn

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.evaluation.inference import predict_split
from bcnn.evaluation.metrics import headline
from bcnn.evaluation.neighbours import nearest_images
from bcnn.evaluation.plots import plot_curves
from bcnn.evaluation.report import MISTAKES, NEIGHBOURS
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.callbacks import (
    DivergenceMonitor,
    EpochTable,
    Float16,
    SeededEpochs,
    TrainingDiverged,
)
from bcnn.training.checkpointing import AtomicCheckpointIO, BestOrLastCheckpoint
from bcnn.training.config import STAGES, validate_batches
from bcnn.training.convex_stage import run_convex_stage
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.logging import close, log_options, log_results, make_loggers
from bcnn.training.module import BCNNModule
from bcnn.training.network import load_weights
from bcnn.training.pca import fit_principal_axes
from bcnn.training.run_state import RunState, StageResult
from bcnn.utils.console import logger
from bcnn.utils.device import about_device, no_memory
from bcnn.utils.errors import UserError

Data = FineGrainedDataModule | CachedFeatureDataModule


def run_stage(
    cfg: DictConfig,
    state: RunState,
    stage: str,
    model: BCNN,
    data: FineGrainedDataModule,
    start: Path | None,
) -> StageResult:
    """Train a stage, or resume it, leave its best weights in `model`, and test them.

    Args:
        cfg: the whole configuration; the options of the stage are at `cfg[stage]`.
        state: of the run.
        stage: "last" or "finetune".
        model: the weights to start from; changed in place.
        data: set up already.
        start: the file that holds these weights, if any.
    """
    L.seed_everything(cfg.seed, workers=True, verbose=False)  # a stage alone does the same
    folder = state.folder / stage
    loggers = make_loggers(cfg, folder, f"{state.identity}-{stage}")
    log_options(loggers, cfg, stage)
    convex = stage == "last" and cfg.last.solver == "convex"
    fit = _fit_convex if convex else _fit_by_gradient
    try:
        result, trainer, tested = fit(cfg, state, stage, model, data, start, loggers)
        if trainer.is_global_zero:
            model.to(trainer.strategy.root_device)
            ends = (stage == STAGES[cfg.stage][-1] or bool(result.failure)) and trainer.world_size == 1
            _test(result, trainer, model, data, tested, state.precision, ends)
            log_results(loggers, result.metrics, result.predictions)
    finally:
        close(loggers)
    if trainer.is_global_zero:
        if (folder / "metrics.csv").is_file():
            plot_curves(folder / "metrics.csv", folder / "curves.png")
        result.write(state.folder)
    trainer.strategy.barrier()
    return result


Fitted = tuple[StageResult, L.Trainer, Data]


def _fit_convex(
    cfg: DictConfig,
    state: RunState,
    stage: str,
    model: BCNN,
    data: FineGrainedDataModule,
    start: Path | None,
    loggers: list[Logger],
) -> Fitted:
    """Solve stage `last` for its optimum on stored descriptors."""
    trainer = _trainer(cfg, state, stage, [], loggers)
    _fit_projection(cfg, trainer, model, data, state.precision)
    features = CachedFeatureDataModule(data, model, state.precision)
    loss = _loss(cfg.last, data, balanced=data.sampler == "balanced")
    solved = run_convex_stage(
        trainer,
        model,
        features,
        l2=list(cfg.last.l2),
        loss=loss,
        folds=cfg.last.folds,
        folder=state.folder / stage,
    )
    result = StageResult(stage, solved.checkpoint, solved.metrics, held_out=solved.held_out)
    return result, trainer, features


def _fit_by_gradient(
    cfg: DictConfig,
    state: RunState,
    stage: str,
    model: BCNN,
    data: FineGrainedDataModule,
    start: Path | None,
    loggers: list[Logger],
) -> Fitted:
    """Train a stage by stochastic gradient descent, from the state of an interrupted one if any."""
    options = cfg[stage]
    validated = 0 if cfg.trainer.get("limit_val_batches") == 0 else len(data.val)
    checkpoint = BestOrLastCheckpoint(state.folder / stage, validated)
    resumes = checkpoint.state.is_file()
    advice = f"try {stage}.optimizer.lr={options.optimizer.lr / 10:g}"
    callbacks: list[L.Callback] = [
        checkpoint,
        SeededEpochs(cfg.seed),
        EpochTable(checkpoint, cfg.trainer.get("enable_progress_bar", True)),
        DivergenceMonitor(len(data.classes), checkpoint, advice),
        Float16(),
        *(instantiate(each) for each in (cfg.callbacks or {}).values()),
    ]
    limits = {
        "max_epochs": options.epochs,
        "accumulate_grad_batches": options.accumulate,
        # A fine-tune that begins validates what it starts from.
        "num_sanity_val_steps": -1 if stage == "finetune" and validated and not resumes else 0,
    }
    trainer = _trainer(cfg, state, stage, callbacks, loggers, **limits)
    if stage == "last":
        _fit_projection(cfg, trainer, model, data, state.precision)
    data.batch_size = options.batch_size
    module = _module(cfg, stage, model, data)
    fitted: Data = data
    if stage == "last" and options.store:
        fitted = CachedFeatureDataModule(data, model, state.precision)
    try:
        trainer.fit(module, datamodule=fitted, ckpt_path=checkpoint.state if resumes else None)
        failure = ""
    except TrainingDiverged as error:
        failure = f"stage {stage}: {error}"
    except torch.OutOfMemoryError as error:
        raise UserError(no_memory(stage)) from error
    result = _kept(checkpoint, stage, model, start, failure, advice)
    return result, trainer, fitted


def _trainer(
    cfg: DictConfig,
    state: RunState,
    stage: str,
    callbacks: list[L.Callback],
    loggers: list[Logger],
    **limits: Any,
) -> L.Trainer:
    """Return Lightning's Trainer with the options of the configuration and those of the stage."""
    monitors = [LearningRateMonitor("step")] if loggers and callbacks else []
    options = {
        "callbacks": [*callbacks, *monitors],
        "logger": loggers,
        "plugins": [AtomicCheckpointIO(), *instantiate(cfg.trainer.get("plugins", []))],
        "default_root_dir": state.folder / stage,
        "precision": state.precision,
        "enable_model_summary": False,
        "enable_progress_bar": False,  # the table of epochs has its own
        "enable_checkpointing": bool(callbacks),
        "use_distributed_sampler": False,  # the data module shares images among the ranks
        **limits,
    }
    trainer: L.Trainer = instantiate(cfg.trainer, **options)
    if trainer.precision != state.precision:
        raise UserError(
            f"trainer.precision={state.precision}: this device computes in {trainer.precision}; use auto"
        )
    validate_batches(cfg, trainer.world_size)
    device = about_device(trainer.strategy.root_device, state.precision, trainer.world_size)
    logger.info("")
    logger.info(f"stage {stage}: {device}")
    return trainer


def _fit_projection(
    cfg: DictConfig, trainer: L.Trainer, model: BCNN, data: FineGrainedDataModule, precision: str
) -> None:
    if cfg.model.project is not None:
        fit_principal_axes(model.backbone, data, trainer.strategy.root_device, precision)


def _module(cfg: DictConfig, stage: str, model: BCNN, data: FineGrainedDataModule) -> BCNNModule:
    """Return the LightningModule of a stage."""
    options = cfg[stage]
    tuning = {}
    if stage == "finetune":
        tuning = {name: options[name] for name in ("centering", "polyak", "unfreeze_from")}
        model.backbone.grad_checkpointing = options.grad_checkpointing
        model.backbone.compiling = options.compile
    return BCNNModule(
        model,
        stage,  # type: ignore[arg-type]
        optimizer=instantiate(options.optimizer),
        scheduler=instantiate(options.scheduler),
        loss=_loss(options, data),
        **tuning,
    )


def _loss(options: DictConfig, data: FineGrainedDataModule, balanced: bool = False) -> nn.Module:
    """Return the loss of a stage; `balanced` weighs classes where they cannot be drawn equally often."""
    weight = data.class_weights() if options.class_weights or balanced else None
    loss: nn.Module = instantiate(options.loss)(weight=weight)
    return loss


def _kept(
    checkpoint: BestOrLastCheckpoint,
    stage: str,
    model: BCNN,
    start: Path | None,
    failure: str,
    advice: str,
) -> StageResult:
    """Leave in `model` what the stage ends with: its own weights or, if these are worse, its start's.

    Raises:
        UserError: it has neither, for the reason `failure`.
    """
    before, metrics = checkpoint.start, checkpoint.metrics
    if failure and checkpoint.kept is None and start is None:
        raise UserError(failure)
    # Worse is both fewer right and a larger loss: of few images one can go either way, and label
    # smoothing has the larger loss however right it is. So are figures that are not finite.
    better = not before or metrics.get("val_top1", 0.0) >= before["val_top1"]
    better = better or metrics.get("val_loss", torch.inf) <= before["val_loss"]
    if checkpoint.kept is not None and (better or start is None):
        load_weights(model, checkpoint.kept)
        return StageResult(stage, checkpoint.kept, dict(metrics), failure)
    if checkpoint.kept is None and not failure:  # fast_dev_run keeps nothing
        return StageResult(stage, None, dict(metrics))
    logger.info(f"no epoch of this stage was better than its start: keeping {start}")
    load_weights(model, start)
    failure = failure or (
        f"stage {stage} ended worse than it started (validation top-1 {metrics['val_top1']:.1%} at best, "
        f"{before['val_top1']:.1%} at its start): {advice}"
    )
    return StageResult(stage, start, dict(before), failure)


def _test(
    result: StageResult,
    trainer: L.Trainer,
    model: BCNN,
    data: FineGrainedDataModule,
    tested: Data,
    precision: str,
    ends: bool,
) -> None:
    """Add predictions of the test images to a result, or of the validation images without any.

    Args:
        tested: reads images, or their stored descriptors.
        ends: the run ends with this stage: its report shows the nearest images of the worst mistakes.
    """
    samples = _limited(data.test or data.val, trainer.limit_test_batches, data.batch_size)
    if not samples:
        return
    result.predictions = predict_split(model, samples, _batches(tested, samples), precision)
    if data.test:
        figures = headline(result.predictions)
        names = {"test_top1": "top1", "test_top5": "top5", "test_loss": "nll"}
        result.metrics |= {key: figures[name].value for key, name in names.items()}
    mistakes = result.predictions.confident_mistakes(MISTAKES) if ends else []
    if mistakes:
        asked = _batches(tested, [samples[index] for index in mistakes])
        known = _batches(tested, data.train)
        found = nearest_images(model, asked, known, data.train, NEIGHBOURS, precision)
        result.nearest = dict(zip(mistakes, found, strict=True))


def _limited(
    samples: Sequence[tuple[str, int]], limit: int | float | None, batch_size: int
) -> Sequence[tuple[str, int]]:
    """Return the samples that `trainer.limit_test_batches`, a number or a share of batches, leaves."""
    if limit is None:
        return samples
    count = limit * batch_size if isinstance(limit, int) else round(limit * len(samples))
    return samples[: int(count)]


def _batches(data: Data, samples: Sequence[tuple[str, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Return what a trained model sees of these images, in order."""
    return (data.on_before_batch_transfer(batch, 0) for batch in data.evaluation_dataloader(samples))
