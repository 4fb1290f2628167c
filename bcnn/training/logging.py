"""What a run logs: to Lightning's loggers beside the curves; figures and the next commands."""

import logging
import re
import shlex
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.image_io import load_image
from bcnn.evaluation.predictions import Predictions
from bcnn.training.run_state import RUN, RunState, StageResult
from bcnn.utils.console import logger

TABLE_IMAGES = 100  # in wandb's table of predictions
THUMBNAIL = 256  # px, the longer side there
COLUMNS = ["image", "class", "top1", "probability", "probability_of_class", "path"]


def quiet_lightning() -> None:
    """Silence Lightning's remarks on the machine, and on how a stage uses its Trainer."""
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for module in ("lightning", "torch.utils.data"):
        warnings.filterwarnings("ignore", module=module)


def make_loggers(options: Mapping[str, Any] | None, folder: Path, run: str) -> list[Logger]:
    """Return the loggers that options at logger.* describe, writing to the folder of a stage.

    In wandb, a stage is a run of its own, which a resumed stage continues, in the group `run`.
    """
    stage = folder.name
    of_wandb = {"id": f"{run}-{stage}", "group": run, "job_type": stage}
    return [
        instantiate({**(of_wandb if _is_wandb(each) else {}), **each}, save_dir=folder)
        for each in (options or {}).values()
    ]


def _is_wandb(options: Mapping[str, Any]) -> bool:
    return str(options["_target_"]).endswith("WandbLogger")


@rank_zero_only
def log_options(loggers: Iterable[Logger], cfg: DictConfig, stage: str) -> None:
    """Log all options, with the name of the stage."""
    options: Any = OmegaConf.to_container(cfg, resolve=True)
    for each in loggers:
        each.log_hyperparams({**options, "stage": stage})


@rank_zero_only
def log_results(
    loggers: Iterable[Logger], metrics: Mapping[str, float], predictions: Predictions | None
) -> None:
    """Log the test figures; to wandb also the confusion matrix and the worst images."""
    for each in loggers:
        if predictions and isinstance(each, WandbLogger):
            each.log_metrics({"confusion": _confusion(predictions)})
            each.log_table("predictions", columns=COLUMNS, data=_hardest(predictions))
        each.log_metrics({key: value for key, value in metrics.items() if key.startswith("test")})


@rank_zero_only
def log_report(cfg: DictConfig, state: RunState, stage: str, report: Path | None) -> None:
    """Keep the report in wandb, as an artifact of the run of the last stage, which has ended."""
    of_wandb = {name: each for name, each in (cfg.logger or {}).items() if report and _is_wandb(each)}
    loggers = make_loggers(of_wandb, state.folder / stage, state.identity)
    for each in loggers:
        assert isinstance(each, WandbLogger)
        each.experiment.log_artifact(report, f"report-{state.identity}", "report")
    close(loggers)


def close(loggers: Iterable[Logger]) -> None:
    """Write what the loggers hold; a stage's wandb run ends with the stage."""
    for each in loggers:
        each.finalize("success")
        if isinstance(each, WandbLogger):
            each.experiment.finish()


def log_figures(results: list[StageResult], data: FineGrainedDataModule) -> None:
    """Log the figures of the stages, side by side."""
    logger.info("")
    logger.info(_line("", (result.stage for result in results)))
    for split, title in (("val", "validation"), ("test", "test")):
        for name in ("top1", "top5") if len(data.classes) > 5 else ("top1",):
            figures = [result.metrics.get(f"{split}_{name}") for result in results]
            if any(figure is not None for figure in figures):
                cells = ("–" if figure is None else f"{figure:.1%}" for figure in figures)
                logger.info(
                    _line(f"{title} top-{name[-1]}", cells) + f"  of {_counted(results, data, split)}"
                )
    if not data.test:
        logger.info(f"{data.root} has no test images: no test figures")


def _counted(results: list[StageResult], data: FineGrainedDataModule, split: str) -> str:
    """Return how many images the figures of a split are of."""
    if split == "val" and not data.val:  # not images that are alone in their class
        held_out = results[0].held_out
        return f"{len(held_out.paths) if held_out else 0} training images, each held out once"
    measured = results[-1].metrics.get(f"images_{split}")  # not known of a limited validation
    if measured == len(getattr(data, split)):
        return data.count(split)
    return f"{measured or 'some'} of the {data.count(split)}"


def log_where(
    cfg: DictConfig, state: RunState, results: list[StageResult], report: Path | None
) -> None:
    """Log where the files of a finished run are, and the commands that may come next."""
    checkpoint = results[-1].checkpoint
    logger.info("")
    logger.info(f"files of this run: {state.folder}")
    if report:
        logger.info(f"report: {report}")
    if not checkpoint:
        return
    logger.info(f"checkpoint: {checkpoint}")
    if state.overrides is not None:
        logger.info(f"predict: {shlex.join(['bcnn', 'predict', str(checkpoint), 'IMAGE'])}")
        purpose = "fine-tune it" if results[-1].stage == "last" else "fine-tune it further"
        logger.info(f"next, to {purpose}: {_next_command(cfg, state.overrides, results[-1])}")


def log_how_to_resume(state: RunState) -> None:
    """Log what an interrupted run leaves; nothing where it has not begun to train."""
    if (state.folder / RUN).is_file():
        code = [word for word in state.overrides or [] if "_target_" in word]
        logger.info("")
        logger.info(f"resume with: {train_command(f'resume={state.folder}', *code)}")


def train_command(*words: str) -> str:
    """Return a command that trains with these words, for a shell."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    folders = [source.path for source in sources if source.provider == "command-line"]
    return shlex.join(["bcnn", "train", *words, *(f"--config-dir={folder}" for folder in folders)])


def facts(
    cfg: DictConfig, state: RunState, result: StageResult, data: FineGrainedDataModule
) -> dict[str, str]:
    """Return how a model was made, for its report."""
    return {
        "what went wrong": result.failure,
        "command": "" if state.overrides is None else train_command(*state.overrides),
        "images": cfg.data.list or cfg.data.root,
        "preprocessing": str(data.preprocessing),
        "numbers": data.numbers(),
        "computed on": result.device,
        "checkpoint": str(result.checkpoint or ""),
    }


def _next_command(cfg: DictConfig, overrides: list[str], result: StageResult) -> str:
    """Return the command that fine-tunes the checkpoint; a fine-tuned one at a tenth of the rate.

    Options of the network are left out: the checkpoint has them.
    """
    change = {
        "stage": "finetune",
        "ckpt": QuotedString(str(result.checkpoint), Quote.double).with_quotes(),
    }
    if result.stage == "finetune":
        change["finetune.optimizer.lr"] = f"{cfg.finetune.optimizer.lr / 10:g}"
    given = OverridesParser.create().parse_overrides(overrides)
    dropped = re.compile("|".join([*map(re.escape, change), "output", "model[./].*"]))
    kept = [each.input_line for each in given if not dropped.fullmatch(each.key_or_group)]
    return train_command(*(f"{name}={value}" for name, value in change.items()), *map(str, kept))


def _line(name: str, cells: Iterable[str]) -> str:
    return f"{name:16}" + "".join(f"{cell:>12}" for cell in cells)


def _confusion(predictions: Predictions) -> Any:
    """Return wandb's confusion matrix, from the cells that are not zero.

    `wandb.plot.confusion_matrix` lists every cell, and wandb cuts a table off after 10,000 rows.
    """
    import wandb  # here, and below: it takes half a second, and most runs do without

    names, confusion = predictions.classes, predictions.confusion
    cells = [[names[i], names[j], int(confusion[i, j])] for i, j in confusion.nonzero().tolist()]
    columns: list[str | int] = ["Actual", "Predicted", "nPredictions"]
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=columns, data=cells),
        fields={str(name): name for name in columns},
        string_fields={"title": "confusion matrix"},
    )


def _hardest(predictions: Predictions) -> list[list[Any]]:
    """Return a row of `COLUMNS` for the images whose class got the least probability."""
    import wandb

    hardest = predictions.true_probability.argsort(stable=True)[:TABLE_IMAGES].tolist()
    p, rows = predictions.select(hardest), []
    columns = (p.labels, p.predicted, p.confidence, p.true_probability)
    for path, label, predicted, *shares in zip(p.paths, *map(Tensor.tolist, columns), strict=True):
        thumbnail = load_image(path, THUMBNAIL)
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        image = wandb.Image(thumbnail, file_type="jpg")
        rows.append([image, p.classes[label], p.classes[predicted], *shares, path])
    return rows
