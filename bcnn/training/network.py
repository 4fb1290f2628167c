"""The network that the first stage starts from: a new one, or that of a checkpoint."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.index import listed
from bcnn.data.review import cut_off, default_resize
from bcnn.data.splits import SplitRecord
from bcnn.data.taxonomy import arrange
from bcnn.models.backbones.vgg16 import PUBLISHED, normalization_of
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.models.weights import initialise_backbone
from bcnn.training.config import AUTO, validate_network
from bcnn.training.distillation import Teacher
from bcnn.utils.console import logger
from bcnn.utils.errors import UserError


def build_model(
    cfg: DictConfig,
    data: FineGrainedDataModule,
    teacher: Teacher | None = None,
    overrides: Iterable[str] = (),
) -> BCNN:
    """Return the network, on the CPU, and have the data module prepare images as it needs them.

    Preprocessing and splits are decided here, once: the network keeps them. No image that a teacher was
    trained on is tested on. `overrides` are the options that the user wrote.
    """
    model = _new_model(cfg, data) if cfg.ckpt is None else _model_of_checkpoint(cfg, data)
    if cfg.ckpt or model.split or teacher:
        record, earlier = model.split or SplitRecord(), teacher and teacher.model.split
        data.follow(record.after(earlier) if earlier else record)
    framing = model.preprocessing if cfg.ckpt else data.preprocessing  # not yet that of wide images
    data.use_preprocessing(model.preprocessing)
    validate_network(cfg, model, overrides)
    _validate_normalization(cfg.model.normalization, model)
    model.split = data.split
    model.taxonomy = data.taxonomy or model.taxonomy
    logger.info(
        f"{data.root}: {len(data.classes)} classes ({listed(data.classes, 3)}), {data.numbers()}"
    )
    for remark in cut_off(data.findings.values(), framing):
        logger.info(remark)
    return model


def load_teacher(cfg: DictConfig, data: FineGrainedDataModule) -> Teacher | None:
    """Return the network that stage `finetune` learns from; None where it learns from the labels."""
    if cfg.finetune.teacher is None:
        return None
    teacher = Teacher(load_model(cfg.finetune.teacher))
    if teacher.model.classes != data.classes:
        raise UserError(
            f"finetune.teacher={cfg.finetune.teacher} was trained on other classes than {data.root} "
            f"has ({_difference(teacher.model.classes, data.classes)}): choose another teacher"
        )
    return teacher


def load_weights(model: BCNN, checkpoint: Path | None) -> None:
    """Load the network of a checkpoint into a model of the same classes."""
    if checkpoint is not None:
        model.become(load_model(checkpoint, model.classes))


def _new_model(cfg: DictConfig, data: FineGrainedDataModule) -> BCNN:
    options: Any = OmegaConf.to_container(cfg.model, resolve=True)
    pooling = options["pooling"]
    if pooling["name"] == AUTO:  # any will do until stage `last` has chosen
        pooling = {"name": "average"}
    model = BCNN(data.classes, data.preprocessing, options["backbone"], pooling, options["project"])
    by_default = {
        "interpolation": model.backbone.interpolation,
        "resize": default_resize(data.findings.values(), data.preprocessing),
    }
    model.preprocessing = replace(model.preprocessing, **by_default | data.given_preprocessing)
    initialise_backbone(model, cfg.model.weights, cfg.model.normalization)
    if cfg.model.weights == "pretrained":
        logger.info(f"licence of the pretrained weights: {model.backbone.licence or 'not stated'}")
    return model


def _validate_normalization(asked: str | None, model: BCNN) -> None:
    """Refuse a normalisation other than that which the weights, or their file, came with."""
    if asked is None:
        return
    if asked not in PUBLISHED:
        raise UserError(f"model.normalization={asked}: choose from {', '.join(PUBLISHED)}")
    mean, std = normalization_of(asked)
    if not (torch.allclose(model.backbone.mean, mean) and torch.allclose(model.backbone.std, std)):
        raise UserError(f"model.normalization={asked}: the weights have another one; leave it out")


def _model_of_checkpoint(cfg: DictConfig, data: FineGrainedDataModule) -> BCNN:
    if cfg.stage == "finetune":
        model = load_model(cfg.ckpt, data.classes, cfg.model.normalization)
    else:
        model = load_model(cfg.ckpt, normalization=cfg.model.normalization)
        taxonomy = model.taxonomy
        model.replace_head(data.classes)
        if taxonomy and not data.taxonomy:
            model.taxonomy = arrange(taxonomy, data.classes, f"the taxonomy of {cfg.ckpt}")
    if model.classes != data.classes:
        raise UserError(
            f"{cfg.ckpt} was trained on other classes than {data.root} has "
            f"({_difference(model.classes, data.classes)}): train stage=both, or stage=last first"
        )
    logger.info(f"network of {cfg.ckpt}: {model.chosen}")
    preprocessing = replace(model.preprocessing, **data.given_preprocessing)
    if model.preprocessing != preprocessing:
        logger.info(f"{cfg.ckpt} was trained at {model.preprocessing}; this run: {preprocessing}")
    model.preprocessing = preprocessing
    return model


def _difference(before: list[str], now: list[str]) -> str:
    """Return which classes only one of the lists has."""
    sides = (("new", now, before), ("missing", before, now))
    found = [
        f"{title}: {listed(name for name in names if name not in others)}"
        for title, names, others in sides
        if set(names) - set(others)
    ]
    return "; ".join(found) or "the same names in another order"
