"""`model/pooling=auto`: solve stage `last` for several poolings of the same maps, and keep the best.

Which pooling is best depends on the images. Each candidate's optimum is cross-validated on the training
images. The narrowest wins whose loss is at most a standard error above the lowest (Breiman et al.,
"Classification and Regression Trees", 1984, §3.4.3): one of the difference, on the same images.
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
HEADING = ("pooling", "width", "loss", "above lowest", "top-1", "time", "")


def make_candidates(
    model: BCNN,
    choices: Sequence[Mapping[str, Any]],
    largest: int,
    data: FineGrainedDataModule,
    device: torch.device,
    precision: str,
) -> list[CachedFeatureDataModule]:
    """Return descriptors by networks on the layers of `model`, with the poolings that suit it.

    Args:
        model: a network without projection.
        choices: name and options of each pooling, and `project`, the axes to project to.
        largest: width of the widest descriptor. Wider ones are left out, and as many axes as channels.
    """
    found = []
    for options in choices:
        pooling = dict(options)
        project = pooling.pop("project", None)
        if project is not None and project >= model.backbone.channels:
            continue
        network = model.with_pooling(pooling, project)
        if network.pooling.width > largest:
            continue
        if project is not None:
            fit_principal_axes(network.backbone, data, device, precision)
        found.append(CachedFeatureDataModule(data, network, precision))
    if not found:
        raise UserError("model.pooling.candidates: none suits this backbone")
    return found


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
    widths = [each.features.store.width for each in found]
    best = min((width, k) for k, width in enumerate(widths) if means[k] <= errors[k])[1]
    names = [described(each.features.model.chosen) for each in found]
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
    logger.info(f"poolings, by cross-validation on {len(losses[0])} training images:")
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


def described(chosen: Mapping[str, Any]) -> str:
    """Return pooling and projection of a network in a few words."""
    axes = [f"{chosen['project']} axes"] if chosen["project"] else []
    return ", ".join([*map(str, chosen["pooling"].values()), *axes])
