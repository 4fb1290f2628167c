"""Run the stages that a configuration names, each from the best weights of the one before."""

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
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from bcnn import terminal
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
from bcnn.training.callbacks import CollapseGuard, KeepEpoch
from bcnn.training.mistakes import STAGES, refuse_mistakes
from bcnn.training.plan import build_model, plan
from bcnn.training.tracking import close, log_configuration, log_results

say = rank_zero_only(terminal.say)


@dataclass
class Result:
    """What a stage ended with: the file of its best weights, their figures, and what went wrong."""

    stage: str
    checkpoint: Path
    metrics: dict[str, float]
    predictions: Predictions | None = None  # of test or validation images; on rank zero
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
    images.step, images.least = model.backbone.stride, model.backbone.smallest
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
    cfg: DictConfig, name: str, images: ImageFolderData, model: BCNN, origin: Path | None
) -> Result:
    """Train one stage, leave its best weights in `model`, and test them.

    Args:
        cfg: the whole configuration.
        name: of the stage; its options are at `cfg[name]`.
        images: set up already.
        model: the weights to start from; changed in place.
        origin: the file that holds these weights, if any.
    """
    say("", f"stage {name}")
    folder, precision = Path(cfg.output) / name, chosen_precision(cfg.trainer)
    images.batch_size = cfg[name].get("batch_size", images.batch_size)
    module, data, limits = plan(name, cfg[name], images, model, precision)
    keep = KeepEpoch(folder, len(images.val))
    loggers = [instantiate(each, save_dir=folder) for each in (cfg.get("logger") or {}).values()]
    settings = {
        "callbacks": [keep, *_callbacks(cfg, name, images, keep)],
        "logger": loggers,
        "precision": precision,
        "default_root_dir": folder,
        "num_sanity_val_steps": -1 if name == "finetune" and images.val else 0,  # what it starts from
        "enable_model_summary": False,
        **limits,
    }
    trainer = instantiate(cfg.trainer, **settings)
    log_configuration(loggers, cfg, name)
    try:
        module.train()  # Lightning keeps the mode that it finds
        trainer.fit(module, datamodule=data)
        result = _kept(cfg, name, images, model, keep, origin)
        if trainer.is_global_zero:
            model.to(trainer.strategy.root_device)
            result.predictions = _predictions(images, data, model, precision)
            result.metrics |= _test_figures(result.predictions if images.test else None)
            log_results(loggers, result.metrics, result.predictions)
    finally:
        close(loggers)
    if trainer.is_global_zero and (folder / "metrics.csv").is_file():
        plot_curves(folder / "metrics.csv", folder / "curves.png")
    trainer.strategy.barrier()
    return result


def _callbacks(
    cfg: DictConfig, name: str, images: ImageFolderData, keep: KeepEpoch
) -> list[L.Callback]:
    """What watches a stage beside the one that keeps its weights."""
    found: list[L.Callback] = [*map(instantiate, (cfg.get("callbacks") or {}).values())]
    if cfg.trainer.get("enable_progress_bar", True):
        found.append(RichProgressBar())
    if cfg.get("logger"):
        found.append(LearningRateMonitor("step"))
    if "optimizer" in cfg[name]:
        found.append(CollapseGuard(len(images.classes), keep, _advice(cfg, name)))
    return found


def _kept(
    cfg: DictConfig,
    name: str,
    images: ImageFolderData,
    model: BCNN,
    keep: KeepEpoch,
    origin: Path | None,
) -> Result:
    """Leave in `model` what the stage ends with: its own weights or, if they are worse, its start's."""
    start, metrics = keep.start, keep.metrics
    # Worse is less often right and less sure of it: one image of few can go either way, and label
    # smoothing's probabilities have the larger loss however right they are. Also where both are nan.
    right = not start or metrics["val_top1"] >= start["val_top1"]
    if right or metrics["val_loss"] <= start["val_loss"] or origin is None:
        checkpoint = Path(keep.best_model_path)
        model.load_state_dict(load_model(checkpoint).state_dict())
        return Result(name, checkpoint, dict(metrics))
    say(f"no epoch of this stage was better than its start: keeping {origin}")
    model.load_state_dict(load_model(origin, images.classes, cfg.model.normalization).state_dict())
    failure = (
        f"stage {name} ended worse than it started (validation top-1 at best "
        f"{metrics['val_top1']:.1%}, at its start {start['val_top1']:.1%}): {_advice(cfg, name)}"
    )
    return Result(name, origin, dict(start), failure=failure)


def _predictions(
    images: ImageFolderData, data: L.LightningDataModule, model: BCNN, precision: str
) -> Predictions | None:
    """Of the test images, or of those to validate where there are none."""
    samples = images.test or images.val
    if not samples:
        return None
    loader = data.test_dataloader() if images.test else data.val_dataloader()
    batches = (data.on_before_batch_transfer(batch, 0) for batch in loader)
    return predict_split(model, samples, batches, precision)


def _test_figures(predictions: Predictions | None) -> dict[str, float]:
    if predictions is None:
        return {}
    figures = headline(predictions)
    names = {"test_top1": "top1", "test_top5": "top5", "test_loss": "nll"}
    return {key: figures[name].value for key, name in names.items()}


def _advice(cfg: DictConfig, name: str) -> str:
    return f"try {name}.optimizer.lr={cfg[name].optimizer.lr / 10:g}"


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
