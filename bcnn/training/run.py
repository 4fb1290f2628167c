"""A run: train the stages that a configuration names, test them, and write the report."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.evaluation.moves import write_moves
from bcnn.evaluation.report import Before, ReportContent
from bcnn.evaluation.results import logged_stages, write_images, write_results
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.choose_pooling import read_poolings
from bcnn.training.config import STAGES, validate
from bcnn.training.distillation import Teacher, compare_with
from bcnn.training.logging import (
    facts,
    log_figures,
    log_how_to_resume,
    log_report,
    log_where,
    quiet_lightning,
)
from bcnn.training.network import build_model, load_teacher, load_weights
from bcnn.training.run_state import RunState, StageResult
from bcnn.training.schema import absolute_paths, working_folder
from bcnn.training.stage import Stage
from bcnn.utils.console import log_file, logger, setup_logging, span
from bcnn.utils.environment import software
from bcnn.utils.errors import UserError


def train(cfg: DictConfig, overrides: list[str] | None = None, resume: bool = False) -> float:
    """Train the stages one after the other, each from the best weights of the one before.

    Args:
        cfg: the whole configuration; it is not changed.
        overrides: what it was composed from, for the commands that the log shows.
        resume: continue the interrupted run in `cfg.output`, to the same weights.

    Returns:
        Validation top-1 of the weights that the run ends with; nan without validation images.

    Raises:
        UserError: a mistake of the user's; or, after all is written, a stage that failed.
    """
    setup_logging()
    quiet_lightning()
    validate(cfg, overrides or ())
    folder = Path(RunState.read(Path(cfg.output)).directory) if resume else working_folder()
    cfg = absolute_paths(cfg, folder)
    state = RunState.resume(cfg) if resume else RunState.create(cfg, overrides)
    if state.finished:
        logger.info(f"{state.folder}: this run has finished already")
        ended = (StageResult.read(state.folder, stage) for stage in STAGES[cfg.stage])
        return _outcome([result for result in ended if result])
    began, versions = time.monotonic(), software()  # a clone may be changed before the run ends
    log = log_file(state.folder / "train.log")
    with log as begin_log, _how_to_resume(state):
        data: FineGrainedDataModule = instantiate(cfg.data)
        data.prepare_data()
        data.setup()
        L.seed_everything(cfg.seed, workers=True, verbose=False)  # every rank draws the same weights
        teacher = load_teacher(cfg, data)
        model = build_model(cfg, data, teacher, state.overrides or ())
        state.begin(data)
        begin_log()
        results = _run_stages(cfg, state, data, model, teacher)
        log_figures(results, data)
        resumed = "time and versions are those since then" if resume else ""
        circumstances = {
            "training took": span(time.monotonic() - began),
            **versions,
            "resumed": resumed,
        }
        report = _write_report(cfg, state, results, data, model, teacher, circumstances)
        log_report(cfg, state, results[-1].stage, report)
        state.finish()
        log_where(cfg, state, results, report)
    return _outcome(results)


def _run_stages(
    cfg: DictConfig,
    state: RunState,
    data: FineGrainedDataModule,
    model: BCNN,
    teacher: Teacher | None,
) -> list[StageResult]:
    """Run the stages that have not ended yet, and return the results of all up to one that failed."""
    results: list[StageResult] = []
    for stage in STAGES[cfg.stage]:
        result = StageResult.read(state.folder, stage)
        if result is None:
            # Stage last begins with a new head, so that no file holds what it starts from.
            first = cfg.ckpt if stage == "finetune" else None
            start = results[-1].checkpoint if results else first
            result = Stage(stage, cfg, state, model, data, start and Path(start), teacher).run()
        else:
            logger.info(f"stage {stage} has ended already: {result.checkpoint}")
            load_weights(model, result.checkpoint)
        results.append(result)
        if result.failure:
            break
    return results


def _outcome(results: list[StageResult]) -> float:
    """Return the validation top-1 of a finished run; raise UserError where its last stage failed."""
    if results[-1].failure:
        raise UserError(results[-1].failure)
    return results[-1].metrics.get("val_top1", math.nan)


@contextmanager
def _how_to_resume(state: RunState) -> Iterator[None]:
    """Log how the run can be resumed where it is interrupted or fails."""
    try:
        yield
    except BaseException:
        log_how_to_resume(state)
        raise


@rank_zero_only
def _write_report(
    cfg: DictConfig,
    state: RunState,
    results: list[StageResult],
    data: FineGrainedDataModule,
    model: BCNN,
    teacher: Teacher | None,
    circumstances: dict[str, str],
) -> Path | None:
    """Write the report on what the last stage ended with; None without images to test on."""
    last = results[-1]
    held_out = next((result.held_out for result in results if result.held_out), None)
    if held_out:
        write_images(state.folder / "held_out.csv", held_out)
        write_moves(state.folder / "moves.csv", held_out)
    if last.predictions is None:
        return None
    curves = logged_stages(Path(cfg.ckpt)) if cfg.stage == "finetune" else []
    curves += [(result.stage, state.folder / result.stage / "metrics.csv") for result in results]
    used = OmegaConf.create({**cfg, "model": {**cfg.model, **model.chosen}})  # that of ckpt, if given
    before, costs = _before(cfg, results), dict[str, str]()
    started = results[-2].checkpoint if len(results) > 1 else cfg.ckpt
    if teacher and last.stage == "finetune" and str(last.checkpoint) != str(started):
        before, costs = compare_with(teacher, model, last.predictions, data, state.precision)
    content = ReportContent(
        last.predictions,
        title=f"{data.root.resolve().name}, {'test' if data.test else 'validation'}",
        stages=curves,
        configuration=OmegaConf.to_yaml(used, resolve=True),
        held_out=held_out,
        facts=facts(cfg, state, last, data) | circumstances | costs,
        before=before,
        poolings=read_poolings(state.folder / "last"),
        nearest=last.nearest,
    )
    return write_results(state.folder, model, content)


def _before(cfg: DictConfig, results: list[StageResult]) -> Before | None:
    """Return the predictions of the stage before the last one, in this run or in that of `ckpt`.

    None where they are not known, or where the last stage ended with the weights it started from.
    """
    start = results[-2] if len(results) > 1 else None
    if start is None and cfg.ckpt:
        start = StageResult.of(Path(cfg.ckpt))
    if start and start.predictions and start.checkpoint != results[-1].checkpoint:
        return start.stage, start.predictions
    return None
