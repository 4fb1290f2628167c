"""`model/pooling=auto`: solve stage `last` for several poolings and layers, and keep the best.

Which is best depends on the images. The candidates are solved for a part of the classes and images, as
time grows with the square of the images times the classes, and cross-validated on these. All whose
loss is at most a standard error above the lowest (Breiman et al., "Classification and Regression
Trees", 1984, §3.4.3; here that of the difference on the same images) are as good. Of these the
narrowest is kept, of the last layer if it can be: a fine-tune gains more there (docs/methods.md, "Which
layer").
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.evaluation.tables import write_csv
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.convex_stage import Solved
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.module import in_top_k
from bcnn.training.pca import fit_principal_axes
from bcnn.utils.console import logger, span
from bcnn.utils.errors import UserError

POOLINGS = "poolings.csv"  # in the folder of stage `last`
CLASSES, IMAGES = 100, 2500  # to compare on, at most
LAST = -1  # level of the last maps
HEADING = ("pooling", "width", "loss", "above lowest", "top-1", "time", "")


def make_candidates(
    model: BCNN,
    choices: Sequence[Mapping[str, Any]],
    largest: int,
    data: FineGrainedDataModule,
    device: torch.device,
    precision: str,
) -> list[list[CachedFeatureDataModule]]:
    """Return descriptors of a part of the images, by the poolings that suit `model`, for each layer.

    Args:
        model: a network without projection.
        choices: name and options of each pooling; `project`, the axes to project to; `level`, that of
            maps before the last ones of a network of timm.
        largest: width of the widest descriptor. Wider ones are left out, and as many axes as channels,
            and levels where the network has none, or one was chosen.
    """
    layers: dict[int, tuple[BCNN, list[CachedFeatureDataModule]]] = {}
    compared = model.chosen["backbone"].get("level") == LAST
    for options in choices:
        pooling = dict(options)
        project, level = pooling.pop("project", None), pooling.pop("level", LAST)
        if level != LAST and not compared:
            continue
        if level not in layers:
            layers[level] = model if level == LAST else model.at_level(level), []
        base, found = layers[level]
        if project is not None and project >= base.backbone.channels:
            continue
        network = base.with_pooling(pooling, project)
        if network.pooling.width > largest:
            continue
        part = data.part(CLASSES, IMAGES)
        part.use_preprocessing(base.preprocessing)
        if project is not None:
            fit_principal_axes(network.backbone, part, device, precision)
        network.replace_head(part.classes)
        found.append(CachedFeatureDataModule(part, network, precision))
    candidates = [found for _, found in layers.values() if found]
    if not candidates:
        raise UserError("model.pooling.candidates: none suits this backbone")
    return candidates


def choose_pooling(found: Sequence[Solved], file: Path) -> Solved:
    """Return the best of the candidates; log how they compare, and write it to a CSV file."""
    judged = [each.held_out for each in found if each.held_out]
    if len(judged) < len(found):
        raise UserError(
            "model/pooling=auto compares poolings by cross-validation, for which no class has enough "
            "training images: choose one by model/pooling"
        )
    losses = [F.cross_entropy(each.logits, each.labels, reduction="none") for each in judged]
    lowest = min(losses, key=torch.mean)
    above = [loss - lowest for loss in losses]
    means = [difference.mean().item() for difference in above]
    errors = [difference.std().item() / len(difference) ** 0.5 for difference in above]
    top1 = [in_top_k(each.logits, each.labels).mean().item() for each in judged]
    networks = [each.features.model for each in found]
    widths = [each.features.store.width for each in found]
    eligible = [k for k in range(len(found)) if means[k] <= errors[k]]
    best = min(eligible, key=lambda k: (_level(networks[k]) != LAST, widths[k]))
    names = [_described(network) for network in networks]
    rows = [
        (
            names[k],
            f"{widths[k]:,}",
            f"{losses[k].mean():.3f}",
            f"{means[k]:.3f} ± {errors[k]:.3f}",
            f"{top1[k]:.1%}",
            span(found[k].seconds),
            "kept" if k == best else "",
        )
        for k in range(len(found))
    ]
    count, classes = len(losses[0]), len(networks[0].classes)
    logger.info(f"poolings, by cross-validation on {count} training images of {classes} classes:")
    for cells in (HEADING, *rows):
        logger.info(f"{cells[0]:>24}" + "".join(f"{cell:>14}" for cell in cells[1:]))
    if "average" in names and names[best] != "average":
        gain = 100 * (top1[best] - top1[names.index("average")])
        logger.info(f"gain of {names[best]} over average: {gain:.1f} points")
    write_csv(file, HEADING, rows)
    return found[best]


def read_poolings(folder: Path) -> list[list[str]]:
    """Return heading and rows that `choose_pooling` wrote in the folder of a stage; none without it."""
    file = folder / POOLINGS
    return [*csv.reader(file.read_text("utf-8").splitlines())] if file.is_file() else []


def _described(network: BCNN) -> str:
    """Return pooling, projection and level of a network in a few words."""
    chosen, level = network.chosen, _level(network)
    axes = [f"{chosen['project']} axes"] if chosen["project"] else []
    levels = [f"level {level}"] if level != LAST else []
    return ", ".join([*map(str, chosen["pooling"].values()), *axes, *levels])


def _level(network: BCNN) -> int:
    """Return the level of a network's maps; networks that have no levels are on their last layer."""
    level: int = network.chosen["backbone"].get("level", LAST)
    return level
