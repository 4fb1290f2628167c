"""A stage's loggers, and what they are told beside the curves: the configuration, hard images."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import wandb
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from bcnn.data.image_io import load_image
from bcnn.evaluation.predictions import Predictions

PHOTOGRAPHS = 100  # in the table of predictions
THUMBNAIL = 256  # px, their longer side
COLUMNS = ["photograph", "class", "predicted", "confidence", "of_class", "path"]


def make_loggers(options: Mapping[str, Any] | None, folder: Path, identity: str) -> list[Logger]:
    """Those of a configuration, writing to `folder`.

    By `identity` wandb knows the stage, which goes on in the same wandb run when it is resumed.
    """
    loggers: list[Logger] = []
    for each in (options or {}).values():
        named = (
            {"id": identity} if each["_target_"].endswith("WandbLogger") and "id" not in each else {}
        )
        loggers.append(instantiate(each, save_dir=folder, **named))
    return loggers


@rank_zero_only
def log_configuration(loggers: Iterable[Logger], cfg: DictConfig, stage: str) -> None:
    """What was composed, with the name of the stage that these loggers follow."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    for logger in loggers:
        logger.log_hyperparams({**values, "stage": stage})


@rank_zero_only
def log_results(
    loggers: Iterable[Logger], metrics: Mapping[str, float], predictions: Predictions | None
) -> None:
    """The test figures; to wandb also the confusion matrix, and the photographs that it is least right
    about: those whose true class got least probability."""
    for logger in loggers:
        if predictions and isinstance(logger, WandbLogger):
            logger.log_metrics({"confusion": _confusion(predictions)})
            logger.log_table("predictions", columns=COLUMNS, data=_hardest(predictions))
        logger.log_metrics({key: v for key, v in metrics.items() if key.startswith("test")})


def close(loggers: Iterable[Logger]) -> None:
    """Let every logger write what it has; a stage's wandb run ends with the stage."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _confusion(predictions: Predictions) -> Any:
    """As `wandb.plot.confusion_matrix` draws it, from the cells that are not zero.

    That function lists every cell, and wandb cuts a table off after 10,000 rows: at 100 classes.
    """
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
    names, rows = predictions.classes, []
    for index in predictions.of_truth.argsort(stable=True)[:PHOTOGRAPHS].tolist():
        thumbnail = load_image(predictions.paths[index])
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        rows.append(
            [
                wandb.Image(thumbnail, file_type="jpg"),
                names[predictions.labels[index]],
                names[predictions.predicted[index]],
                float(predictions.confidence[index]),
                float(predictions.of_truth[index]),
                predictions.paths[index],
            ]
        )
    return rows
