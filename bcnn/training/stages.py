"""Run the stages that a configuration names, each from the best weights of the one before."""

import copy
import math
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from bcnn.data.folder import ImageFolderData
from bcnn.data.layout import listed
from bcnn.errors import UserError
from bcnn.evaluation import logged_stages, write_results
from bcnn.inference import predict_split
from bcnn.model.network import BCNN
from bcnn.model.weights import load_model
from bcnn.options import literal
from bcnn.precision import chosen_precision
from bcnn.report.metrics import headline
from bcnn.report.plots import plot_curves
from bcnn.report.predictions import Predictions
from bcnn.training.guard import CollapseGuard
from bcnn.training.mistakes import STAGES, refuse_mistakes
from bcnn.training.plan import build_model, plan
from bcnn.training.tracking import log_configuration, log_predictions

say = rank_zero_only(print)


@dataclass
class Result:
    """What a stage ended with: the file of its best weights, their figures, and what went wrong."""

    stage: str
    checkpoint: Path
    metrics: dict[str, float]
    predictions: Predictions | None  # of the test images, or of those to validate; on rank zero
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
    for place in ("output", "ckpt"):
        if cfg[place] is not None:
            cfg[place] = str(Path(str(cfg[place])).expanduser())
    refuse_mistakes(cfg)
    images: ImageFolderData = instantiate(cfg.data)
    images.prepare_data()
    images.setup()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    model = build_model(cfg, images)
    say(
        f"{images.root}: {len(images.classes)} classes ({listed(images.classes, 3)}), "
        f"{len(images.train)} images to train on, {len(images.val)} to validate, "
        f"{len(images.test)} to test"
    )
    results: list[Result] = []
    checkpoint = Path(cfg.ckpt) if cfg.ckpt else None
    for stage in STAGES[cfg.stage]:
        # Seeded again, so that a stage does the same alone as after the other.
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        results.append(run_stage(cfg, stage, images, model, checkpoint))
        checkpoint = results[-1].checkpoint
    _summarise(cfg, results, images)
    _report(cfg, results, images, model)
    if results[-1].failure:
        raise UserError(results[-1].failure)
    return results[-1].metrics.get("val_top1", math.nan)


def run_stage(
    cfg: DictConfig, stage: str, images: ImageFolderData, model: BCNN, origin: Path | None
) -> Result:
    """Train one stage, leave its best weights in `model`, and test them.

    Args:
        cfg: the whole configuration.
        stage: its name.
        images: set up already.
        model: the weights to start from; changed in place.
        origin: the file that holds these weights, if any.
    """
    say(f"\nstage {stage}")
    folder = Path(cfg.output) / stage
    options = cfg[stage]
    precision = chosen_precision(cfg.trainer)
    images.batch_size = options.get("batch_size", images.batch_size)
    module, data, limits = plan(stage, options, images, model, precision)
    validates = len(images.val) > 0
    best = ModelCheckpoint(
        folder,
        filename="best" if validates else "last",
        # Of a hundred images, top-1 sees the one that just changed sides; the loss sees them all.
        monitor="val_loss" if validates else None,
        save_weights_only=True,
    )
    loggers = [instantiate(logger, save_dir=folder) for logger in (cfg.get("logger") or {}).values()]
    bars = [RichProgressBar()] if cfg.trainer.get("enable_progress_bar", True) else []
    settings = {
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
    }
    evaluator = instantiate(
        cfg.trainer,
        precision=precision,
        callbacks=bars,
        logger=False,
        enable_checkpointing=False,
        **settings,
    )

    def validate() -> dict[str, float]:
        if not validates:
            return {}
        return dict(evaluator.validate(module, datamodule=data, verbose=False)[0])

    log_configuration(loggers, cfg, stage)
    start = validate() if stage == "finetune" else {}
    for logger in loggers:
        logger.log_metrics(start, step=0)
    watching: list[L.Callback] = [best, *bars, *map(instantiate, (cfg.get("callbacks") or {}).values())]
    advice = ""
    if "optimizer" in options:
        advice = f"try {stage}.optimizer.lr={options.optimizer.lr / 10:g}"
        watching.append(CollapseGuard(len(images.classes), start.get("val_top1"), advice))
    if loggers:
        watching.append(LearningRateMonitor("step"))
    trainer = instantiate(
        cfg.trainer,
        callbacks=watching,
        logger=loggers,
        **{"precision": precision, **limits, **settings},
    )
    module.train()  # Lightning keeps the mode that it finds
    trainer.fit(module, datamodule=data)
    checkpoint, failure = Path(best.best_model_path), ""
    final = {key: float(trainer.callback_metrics[key]) for key in start}  # of the last epoch
    weights = copy.deepcopy(model.state_dict())
    model.load_state_dict(load_model(checkpoint).state_dict())
    metrics = validate()
    if start and _no_worse(final["val_top1"], start["val_top1"], metrics["val_top1"], len(images.val)):
        model.load_state_dict(weights)
        metrics = final
        trainer.save_checkpoint(checkpoint, weights_only=True)
    # Worse is less often right and less sure of it: one image of few can go either way, and label
    # smoothing's probabilities have the larger loss however right they are. Also where both are nan.
    right = start and metrics["val_top1"] >= start["val_top1"]
    if start and origin and not (right or metrics["val_loss"] <= start["val_loss"]):
        failure = (
            f"stage {stage} ended worse than it started (validation top-1 at best "
            f"{metrics['val_top1']:.1%}, at its start {start['val_top1']:.1%}): {advice}"
        )
        say(f"no epoch of this stage was better than its start: keeping {origin}")
        checkpoint, metrics = origin, start
        start_model = load_model(origin, images.classes, cfg.model.normalization)
        model.load_state_dict(start_model.state_dict())
    predictions = None
    samples = images.test or images.val
    if trainer.is_global_zero and samples:
        loader = data.test_dataloader() if images.test else data.val_dataloader()
        batches = (data.on_before_batch_transfer(batch, 0) for batch in loader)
        device = trainer.strategy.root_device
        predictions = predict_split(model, samples, batches, device, precision)
        if images.test:
            figures = headline(predictions)
            names = {"test_top1": "top1", "test_top5": "top5", "test_loss": "nll"}
            metrics |= {key: figures[name].value for key, name in names.items()}
        log_predictions(loggers, predictions)
    for logger in loggers:
        logger.log_metrics({key: v for key, v in metrics.items() if key.startswith("test")})
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # the next stage is a run of its own
    if trainer.is_global_zero and (folder / "metrics.csv").is_file():
        plot_curves(folder / "metrics.csv", folder / "curves.png")
    trainer.strategy.barrier()
    return Result(stage, checkpoint, metrics, predictions, failure)


def _no_worse(final: float, start: float, best: float, images: int) -> bool:
    """Whether a finetune keeps its last epoch, whose steps were the smallest, or its best one.

    The best of several epochs is so by luck as well: on few images it can be one of the first, of
    large steps and a lower test accuracy. The last is kept unless its validation accuracy is under
    that of the start, or under that of the best by more than a standard error (the rule of Breiman et
    al., "Classification and Regression Trees", 1984, §3.4.3); with two right and two wrong added, since
    all right would else have none (Agresti & Coull, The American Statistician 52, 1998).
    """
    share = (best * images + 2) / (images + 4)
    return final >= max(start, best - math.sqrt(share * (1 - share) / (images + 4)))


@rank_zero_only
def _report(cfg: DictConfig, results: list[Result], images: ImageFolderData, model: BCNN) -> None:
    """The page on what the last stage ended with, and the files of its figures."""
    predictions = results[-1].predictions
    if predictions is None:
        return
    logs = logged_stages(Path(cfg.ckpt)) if cfg.ckpt else []
    logs += [(result.stage, Path(cfg.output) / result.stage / "metrics.csv") for result in results]
    title = f"{images.root.resolve().name}, {'test' if images.test else 'validation'}"
    settings = OmegaConf.to_yaml(cfg, resolve=True)
    say(f"report: {write_results(Path(cfg.output), model, predictions, title, logs, settings)}")


def _summarise(cfg: DictConfig, results: list[Result], images: ImageFolderData) -> None:
    say("")
    for result in results:
        for split, count in (("val", len(images.val)), ("test", len(images.test))):
            if f"{split}_top1" in result.metrics:
                top1, top5 = (result.metrics[f"{split}_{name}"] for name in ("top1", "top5"))
                name = {"val": "validation", "test": "test"}[split]
                say(f"{result.stage:9}{name:>11}: top-1 {top1:.1%}, top-5 {top5:.1%} ({count} images)")
    if not images.test:
        say(f"{images.root} has no test images: no test figures")
    say(f"best checkpoint: {results[-1].checkpoint}")
    if HydraConfig.initialized():
        say(f"next: {_next_command(cfg, results[-1])}")


def _next_command(cfg: DictConfig, result: Result) -> str:
    """Fine-tune what `last` saved; or go on from a finetune at a tenth of its rate."""
    change = {"stage": "finetune", "ckpt": str(result.checkpoint.resolve())}
    if result.stage == "finetune":
        change["finetune.optimizer.lr"] = f"{cfg.finetune.optimizer.lr / 10:g}"
    given = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    kept = [each.input_line for each in given if each.key_or_group not in {*change, "output"}]
    words = [literal(f"{name}={value}", sweep=False) for name, value in change.items()]
    program = "python" if shutil.which("python") == sys.executable else sys.executable
    return shlex.join([program, sys.argv[0], *words, *map(str, kept)])
