"""Run the stages that a configuration names, each from the best weights of the one before."""

import logging
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.index import listed
from bcnn.evaluation import neighbours
from bcnn.evaluation.figures import write_images
from bcnn.evaluation.inference import predict_split
from bcnn.evaluation.metrics import headline
from bcnn.evaluation.plots import plot_curves
from bcnn.evaluation.predictions import Predictions
from bcnn.evaluation.report import MISTAKES, NEIGHBOURS, Before, Neighbour
from bcnn.evaluation.results import kept_predictions, logged_stages, write_results
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training.callbacks import DivergenceMonitor, Float16, SeedEpochs, TrainingDiverged
from bcnn.training.checkpointing import BestOrLastCheckpoint, WholeCheckpoints
from bcnn.training.config import STAGES, refuse_mistakes, refuse_output, refuse_strangers
from bcnn.training.convex_stage import ConvexModule
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.logging import close, log_configuration, log_results, make_loggers
from bcnn.training.plan import build_model, plan
from bcnn.training.progress import EpochRows
from bcnn.training.run_state import RUN, RunState, StageResult, digest
from bcnn.training.summary import advice, facts, say_figures, say_how_to_go_on, say_where, since
from bcnn.utils import terminal
from bcnn.utils.device import about_device, chosen_precision, no_memory
from bcnn.utils.distributed import together
from bcnn.utils.errors import UserError
from bcnn.utils.files import remove_parts
from bcnn.utils.interruption import Interruption
from bcnn.utils.progress import progress, span
from bcnn.utils.software import software

LOG = "train.log"  # in the output folder: all that was said

say, log = rank_zero_only(terminal.say), rank_zero_only(terminal.log)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on the machine, and on what a stage means to do."""
    remarks = [logging.getLogger(f"lightning.{part}") for part in ("fabric", "pytorch")]
    levels = [each.level for each in remarks]
    for each in remarks:
        each.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for module in ("lightning", "torch.utils.data"):
                warnings.filterwarnings("ignore", module=module)
            yield
    finally:
        for each, level in zip(remarks, levels, strict=True):
            each.setLevel(level)


@_quiet()
def run(cfg: DictConfig, words: list[str] | None = None) -> float:
    """Train the stages, test them, and say where the results are.

    Args:
        cfg: the whole configuration.
        words: the overrides it was composed from, for the command that is said at the end.

    Returns:
        Validation top-1 of the last stage's best weights, for sweeps to maximise (nan without
        validation images).

    Raises:
        UserError: a mistake in the configuration, the images or the weights; or, after all is saved
            and said, a stage that ended worse than it started or diverged.
    """
    for place in ("output", "ckpt"):
        if cfg.get(place) is not None:
            cfg[place] = str(Path(str(cfg[place])).expanduser())
    refuse_mistakes(cfg)
    # SLURM runs the same command again in a job that it puts back into its queue.
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and Path(cfg.output, RUN).is_file():
        return resume(Path(cfg.output))
    refuse_output(Path(cfg.output))
    cfg.trainer.precision = chosen_precision(cfg.trainer)
    return _run(RunState(cfg, words))


@_quiet()
def resume(folder: Path) -> float:
    """Go on with a run that was interrupted, to the same weights as if it had not been.

    Raises:
        UserError: the folder holds no such run, its images have changed, or as for `run`.
    """
    record = RunState.read(folder)
    refuse_strangers(record.cfg, folder)
    refuse_mistakes(record.cfg)
    remove_parts(folder)
    for state in folder.glob("*/hpc_ckpt_*.ckpt"):  # Lightning's, of the midst of an epoch
        state.unlink()
    return _run(record)


def _run(record: RunState) -> float:
    cfg, output = record.cfg, Path(record.cfg.output)
    began, resumed = time.monotonic(), record.images != ""
    made_with = software()  # a clone may be altered before the run ends
    with terminal.logged(output / LOG):
        log(f"{datetime.now():%Y-%m-%d %H:%M:%S}: {shlex.join(sys.argv)}")
        try:
            trainer: L.Trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False)
            device = trainer.strategy.root_device
            computed_on = about_device(device, trainer.precision, trainer.world_size)
            say(computed_on)
            images, model = _prepared(record, device)
            results = _train(record, images, model)
            say_figures(results, images)
            took = span(time.monotonic() - began)
            circumstances = {"computed on": computed_on, "training took": took, **made_with}
            report = _report(record, results, images, model, since(circumstances, resumed))
            rank_zero_only(results[-1].write)(output)  # first: what is finished is not gone on with
            rank_zero_only(record.finish)()
        except (Interruption, UserError, OSError) as error:
            log(f"{type(error).__name__}: {error}")
            say_how_to_go_on(output)
            raise
        say_where(record, results, report)
        if results[-1].failure:
            log(results[-1].failure)
            raise UserError(results[-1].failure)
    return results[-1].metrics.get("val_top1", math.nan)


def _prepared(record: RunState, device: torch.device) -> tuple[FineGrainedDataModule, BCNN]:
    """The images, set up, and the network that the first stage starts from.

    Args:
        record: of the run.
        device: that it computes on.
    """
    cfg = record.cfg
    images: FineGrainedDataModule = instantiate(cfg.data)
    images.prepare_data()
    images.setup()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    model = build_model(cfg, images, device)
    images.step, images.least = model.backbone.stride, model.backbone.min_size
    before, record.images = record.images, digest(images.split)
    if before not in ("", record.images):
        raise UserError(
            f"the images of {images.root} are not those that {cfg.output} was begun with: put them "
            "back, or begin anew"
        )
    say(
        f"{images.root}: {len(images.classes)} classes ({listed(images.classes, 3)}), "
        f"{len(images.train)} images to train on, {len(images.val)} to validate, "
        f"{len(images.test)} to test"
    )
    return images, model


@together()
def _train(record: RunState, images: FineGrainedDataModule, model: BCNN) -> list[StageResult]:
    """Run the stages that have not ended already; ends with the first that fails."""
    cfg, output = record.cfg, Path(record.cfg.output)
    results: list[StageResult] = []
    checkpoint = Path(cfg.ckpt) if cfg.ckpt else None
    for stage in STAGES[cfg.stage]:
        # Seeded again, so that a stage does the same alone as after the other.
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        if ended := StageResult.read(output, stage):
            say("", f"stage {stage} has ended already: {ended.checkpoint}")
            _load(model, ended.checkpoint, cfg)
            results.append(ended)
        else:
            results.append(run_stage(record, stage, images, model, checkpoint))
        checkpoint = results[-1].checkpoint
        if results[-1].failure:
            break
        if stage != STAGES[cfg.stage][-1]:  # which ends with the report
            rank_zero_only(results[-1].write)(output)
    return results


def _load(model: BCNN, file: Path, cfg: DictConfig) -> None:
    model.load_state_dict(load_model(file, model.classes, cfg.model.normalization).state_dict())


def run_stage(
    record: RunState, name: str, images: FineGrainedDataModule, model: BCNN, origin: Path | None
) -> StageResult:
    """Train one stage, or go on with it, leave its best weights in `model`, and test them.

    Args:
        record: of the run; the stage's options are at `record.cfg[name]`.
        name: of the stage.
        images: set up already.
        model: the weights to start from; changed in place.
        origin: the file that holds these weights, if any.
    """
    cfg, folder = record.cfg, Path(record.cfg.output) / name
    say("", f"stage {name}")
    images.batch_size = cfg[name].get("batch_size", images.batch_size)
    module, data, limits = plan(name, cfg[name], images, model, cfg.trainer.precision)
    rank_zero_only(record.write)()
    l2, crossed = (
        (module.l2, module.cross_validates) if isinstance(module, ConvexModule) else ((), False)
    )
    keep = BestOrLastCheckpoint(folder, len(images.train if crossed else images.val))
    loggers = make_loggers(cfg.get("logger"), folder, f"{record.identity}-{name}")
    rows = EpochRows(keep, l2, cfg.trainer.get("enable_progress_bar", True))
    trainer = _trainer(cfg, name, images, keep, rows, loggers, limits)
    log_configuration(loggers, cfg, name)
    try:
        failure = _fit(trainer, module, data, keep)
        if keep.last and keep.metrics is keep.last and not rows.improved:
            say("kept: the last epoch, which validation does not tell from the best")
        result = _kept(cfg, name, model, keep, origin, failure)
        if isinstance(module, ConvexModule):
            result.held_out = module.held_out_predictions(images.train)
        if trainer.is_global_zero:
            model.to(trainer.strategy.root_device)
            # Other ranks would wait for it too long.
            ends = (name == STAGES[cfg.stage][-1] or failure) and trainer.world_size == 1
            _test(result, images, data, model, cfg.trainer.precision, bool(ends))
            log_results(loggers, result.metrics, result.predictions)
    finally:
        close(loggers)
    if trainer.is_global_zero and (folder / "metrics.csv").is_file():
        plot_curves(folder / "metrics.csv", folder / "curves.png")
    trainer.strategy.barrier()
    return result


def _trainer(
    cfg: DictConfig,
    name: str,
    images: FineGrainedDataModule,
    keep: BestOrLastCheckpoint,
    rows: EpochRows,
    loggers: list[Logger],
    limits: dict[str, Any],
) -> L.Trainer:
    """What trains a stage, and what watches it beside the callback that keeps its weights."""
    callbacks: list[L.Callback] = [keep, SeedEpochs(cfg.seed), rows]
    for key, each in (cfg.get("callbacks") or {}).items():
        callbacks.append(instantiate(each))
        waits = str(getattr(callbacks[-1], "monitor", "")).startswith("val_")
        if waits and not keep.images:
            raise UserError(
                f"callbacks.{key} waits for validation, and there are no validation images: set "
                "data.val_fraction, or leave it out"
            )
    if loggers:
        callbacks.append(LearningRateMonitor("step"))
    if "optimizer" in cfg[name]:
        callbacks += [DivergenceMonitor(len(images.classes), keep, advice(cfg, name)), Float16()]
    # A finetune that begins validates what it starts from.
    begins = name == "finetune" and images.val and not keep.state.is_file()
    settings = {
        "callbacks": callbacks,
        "logger": loggers,
        "plugins": WholeCheckpoints(),
        "default_root_dir": keep.state.parent,
        "num_sanity_val_steps": -1 if begins else 0,
        "enable_model_summary": False,
        "use_distributed_sampler": False,  # ranks share by what the data say
        "enable_progress_bar": False,  # the rows' is there
        **limits,
    }
    trainer: L.Trainer = instantiate(cfg.trainer, **settings)
    return trainer


def _fit(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: L.LightningDataModule,
    keep: BestOrLastCheckpoint,
) -> str:
    """Train, from the state that an interrupted stage left if there is one; returns what went wrong."""
    module.train()  # Lightning keeps the mode that it finds
    try:
        trainer.fit(module, datamodule=data, ckpt_path=keep.state if keep.state.is_file() else None)
    except TrainingDiverged as error:
        return f"stage {keep.state.parent.name}: {error}"
    except torch.OutOfMemoryError as error:
        raise UserError(no_memory(keep.state.parent.name)) from error
    except RuntimeError as error:
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise UserError(
            f"torch.compile fails here ({reason}): finetune.compile=false does without"
        ) from error
    return ""


def _kept(
    cfg: DictConfig,
    name: str,
    model: BCNN,
    keep: BestOrLastCheckpoint,
    origin: Path | None,
    failure: str,
) -> StageResult:
    """Leave in `model` what the stage ends with: its own weights or, if they are worse, its start's.

    Raises:
        UserError: it has none of either, for the reason `failure`.
    """
    start, metrics = keep.start, keep.metrics
    if not keep.best_model_path and origin is None:
        raise UserError(failure)
    # Worse is less often right and less sure of it: one image of few can go either way, and label
    # smoothing's probabilities have the larger loss however right they are. Also where both are nan.
    right = keep.best_model_path and (not start or metrics["val_top1"] >= start["val_top1"])
    if right or origin is None or (metrics and metrics["val_loss"] <= start["val_loss"]):
        checkpoint = Path(keep.best_model_path)
        _load(model, checkpoint, cfg)
        return StageResult(name, checkpoint, dict(metrics), failure)
    say(f"no epoch of this stage was better than its start: keeping {origin}")
    _load(model, origin, cfg)
    if not failure:
        failure = (
            f"stage {name} ended worse than it started (validation top-1 at best "
            f"{metrics['val_top1']:.1%}, at its start {start['val_top1']:.1%}): {advice(cfg, name)}"
        )
    return StageResult(name, origin, dict(start), failure)


def _test(
    result: StageResult,
    images: FineGrainedDataModule,
    data: FineGrainedDataModule | CachedFeatureDataModule,
    model: BCNN,
    precision: str,
    ends: bool,
) -> None:
    """Leave in the result what the model says of the test images, or of those to validate without any.

    Args:
        ends: the run, whose report shows what is most like the worst mistakes.
    """
    samples = images.test or images.val
    if not samples:
        return
    result.predictions = predict_split(model, samples, _batches(data, samples), precision)
    if images.test:
        figures = headline(result.predictions)
        names = {"test_top1": "top1", "test_top5": "top5", "test_loss": "nll"}
        result.metrics |= {key: figures[name].value for key, name in names.items()}
    if ends:
        result.nearest = _nearest(images, data, model, result.predictions, precision)


def _nearest(
    images: FineGrainedDataModule,
    data: FineGrainedDataModule | CachedFeatureDataModule,
    model: BCNN,
    predictions: Predictions,
    precision: str,
) -> dict[int, list[Neighbour]]:
    """The training photographs that are most like those of the worst mistakes."""
    mistakes = predictions.confident_mistakes(MISTAKES)
    if not mistakes:
        return {}
    asked = [(images.test or images.val)[index] for index in mistakes]
    queries = torch.cat([*neighbours.rows(model, _batches(data, asked), precision)])

    def known() -> Iterator[Tensor]:
        with progress("nearest training photographs", len(images.train)) as task:
            for batch in neighbours.rows(model, _batches(data, images.train), precision):
                yield batch
                task.advance(len(batch))

    distances, places = neighbours.nearest(queries, known(), NEIGHBOURS)
    return {
        index: [
            (images.train[k][0], model.classes[images.train[k][1]], apart)
            for k, apart in zip(found, far, strict=True)
        ]
        for index, found, far in zip(mistakes, places.tolist(), distances.tolist(), strict=True)
    }


def _batches(
    data: FineGrainedDataModule | CachedFeatureDataModule, samples: Sequence[tuple[str, int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a trained model sees of these images, in order."""
    return (data.on_before_batch_transfer(batch, 0) for batch in data.evaluation_dataloader(samples))


@rank_zero_only
def _report(
    record: RunState,
    results: list[StageResult],
    images: FineGrainedDataModule,
    model: BCNN,
    circumstances: dict[str, str],
) -> Path | None:
    """The page on what the last stage ended with, and the files of its figures."""
    cfg, kept = record.cfg, results[-1]
    predictions, output = kept.predictions, Path(cfg.output)
    held_out = next((result.held_out for result in results if result.held_out), None)
    if held_out:
        write_images(output / "held_out.csv", held_out)
    if predictions is None:
        return None
    logs = logged_stages(Path(cfg.ckpt)) if cfg.ckpt else []
    logs += [(result.stage, output / result.stage / "metrics.csv") for result in results]
    title = f"{images.root.resolve().name}, {'test' if images.test else 'validation'}"
    settings = OmegaConf.to_yaml(cfg, resolve=True)
    known = facts(record, results, images) | circumstances
    before = _before(results, cfg.ckpt)
    return write_results(
        output, model, predictions, title, logs, settings, held_out, known, before, kept.nearest
    )


def _before(results: list[StageResult], ckpt: str | None) -> Before | None:
    """What the stage before the last said, in this run or in that of `ckpt`.

    None where nobody knows, or the last one kept what it started from.
    """
    kept = results[-1].checkpoint
    if len(results) > 1:
        earlier = results[-2]
        changed = kept != earlier.checkpoint
        return (earlier.stage, earlier.predictions) if changed and earlier.predictions else None
    return kept_predictions(Path(ckpt).parent) if ckpt and kept != Path(ckpt) else None
