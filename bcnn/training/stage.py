"""One stage: fit it, keep its best weights, test them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.evaluation.inference import predict_split
from bcnn.evaluation.metrics import headline
from bcnn.evaluation.neighbours import nearest_images
from bcnn.evaluation.plots import plot_curves
from bcnn.evaluation.report import MISTAKES, NEIGHBOURS
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.calibrate import calibrate
from bcnn.training.callbacks import (
    DivergenceMonitor,
    EpochTable,
    Float16,
    SeededEpochs,
    TrainingDiverged,
)
from bcnn.training.checkpointing import AtomicCheckpointIO, BestOrLastCheckpoint, add_calibration
from bcnn.training.choose_pooling import POOLINGS, choose_pooling, make_candidates
from bcnn.training.config import AUTO, STAGES, validate_batches
from bcnn.training.convex_stage import HeldOut, Solved, save_solution, solve_each
from bcnn.training.distillation import Teacher
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.logging import close, log_options, log_results, make_loggers
from bcnn.training.module import BCNNModule
from bcnn.training.network import load_weights
from bcnn.training.pca import fit_principal_axes
from bcnn.training.run_state import RunState, StageResult
from bcnn.utils.console import logger
from bcnn.utils.device import about_device
from bcnn.utils.errors import UserError

Data = FineGrainedDataModule | CachedFeatureDataModule


@dataclass
class Stage:
    """A stage of a run."""

    name: str  # "last" or "finetune"; its options are at `cfg[name]`
    cfg: DictConfig
    state: RunState
    model: BCNN  # the weights to start from; changed in place
    data: FineGrainedDataModule  # set up already
    start: Path | None  # the file that holds these weights, if any
    teacher: Teacher | None  # of stage `finetune`

    def run(self) -> StageResult:
        """Train the stage, or resume it, leave its best weights in `model`, and test them."""
        L.seed_everything(self.cfg.seed, workers=True, verbose=False)  # a stage alone does the same
        self.options, self.folder = self.cfg[self.name], self.state.folder / self.name
        self.loggers = make_loggers(self.cfg.logger, self.folder, self.state.identity)
        self.checkpoint: BestOrLastCheckpoint | None = None
        self.held_out: HeldOut | None = None
        self.model.calibration = None  # it was of the weights to start from
        self.data.use_preprocessing(self.model.preprocessing)  # of the layer that stage `last` chose
        log_options(self.loggers, self.cfg, self.name)
        try:
            convex = self.options.get("solver") == "convex"
            result = self._solve() if convex else self._train()
            result.device = self.device
            if self.trainer.is_global_zero:
                self._calibrate(result)
                self._test(result)
                log_results(self.loggers, result.metrics, result.predictions)
        finally:
            close(self.loggers)
        if self.trainer.is_global_zero:
            plot_curves(self.folder / "metrics.csv", self.folder / "curves.png")
            result.write(self.state.folder)
            if self.checkpoint:
                self.checkpoint.finish()
        self.trainer.strategy.barrier()
        return result

    def _solve(self) -> StageResult:
        """Find the optimum of stage `last` on stored descriptors."""
        self.trainer = self._make_trainer([])
        if self.cfg.model.pooling.name == AUTO and not self.cfg.ckpt:
            self._choose_pooling()
        self._fit_projection()
        features = CachedFeatureDataModule(self.data, self.model, self.state.precision)
        (solved,) = self._solve_each([features])
        checkpoint = save_solution(self.trainer, solved, self.folder)
        self.features: Data = features
        self.held_out = solved.held_out
        predictions = self.held_out and self.held_out.predictions(self.model.classes, self.data.train)
        return StageResult(self.name, checkpoint, solved.metrics, held_out=predictions)

    def _choose_pooling(self) -> None:
        """Give the network the pooling, and the layer, that is best on a part of the images."""
        pooling, device = self.cfg.model.pooling, self.trainer.strategy.root_device
        choices: Any = OmegaConf.to_container(pooling.candidates, resolve=True)
        options = choices, pooling.largest, self.data, device, self.state.precision
        solved = [
            each
            for candidates in make_candidates(self.model, *options)
            for each in self._solve_each(candidates)
        ]
        network = choose_pooling(solved, self.folder / POOLINGS).features.model
        network.replace_head(self.data.classes)
        self.model.become(network)
        self.data.use_preprocessing(self.model.preprocessing)

    def _solve_each(self, candidates: Sequence[CachedFeatureDataModule]) -> list[Solved]:
        # The solver sees every image once: to draw classes equally often is to weigh them equally.
        data = candidates[0].data
        loss = self._loss(data, balanced=data.sampler == "balanced")
        return solve_each(self.trainer, candidates, self.options.l2, loss, self.options.folds)

    def _train(self) -> StageResult:
        """Train by gradient descent, from the state of an interrupted stage if there is one."""
        validated = 0 if self.cfg.trainer.get("limit_val_batches") == 0 else len(self.data.val)
        self.checkpoint = checkpoint = BestOrLastCheckpoint(self.folder, validated)
        resumes = checkpoint.state.is_file()
        advice = f"try {self.name}.optimizer.lr={self.options.optimizer.lr / 10:g}"
        callbacks = [
            checkpoint,
            SeededEpochs(self.cfg.seed),
            EpochTable(checkpoint, self.cfg.trainer.get("enable_progress_bar", True)),
            DivergenceMonitor(len(self.data.classes), checkpoint, advice),
            Float16(),
            *(instantiate(each) for each in (self.cfg.callbacks or {}).values()),
        ]
        self.trainer = self._make_trainer(
            callbacks,
            max_epochs=self.options.epochs,
            accumulate_grad_batches=self.options.accumulate,
            # A fine-tune that begins validates what it starts from.
            num_sanity_val_steps=-1 if self.name == "finetune" and validated and not resumes else 0,
        )
        self._fit_projection()
        self.data.batch_size = self.options.batch_size
        module = self._module()
        self.features = self.data
        if self.options.get("store"):
            self.features = CachedFeatureDataModule(self.data, self.model, self.state.precision)
        failure, state = "", checkpoint.state if resumes else None
        try:
            self.trainer.fit(module, datamodule=self.features, ckpt_path=state)
        except TrainingDiverged as error:
            failure = f"stage {self.name}: {error}"
        except torch.OutOfMemoryError as error:
            less = ", or finetune.grad_checkpointing=true" if self.name == "finetune" else ""
            raise UserError(
                f"stage {self.name}: too little memory: set a smaller {self.name}.batch_size{less}"
            ) from error
        return self._kept(checkpoint, failure, advice)

    def _make_trainer(self, callbacks: list[L.Callback], **limits: Any) -> L.Trainer:
        """Return Lightning's Trainer, with the options of the configuration and of the stage."""
        cfg, precision = self.cfg, self.state.precision
        monitors = [LearningRateMonitor("step")] if self.loggers and callbacks else []
        options = {
            "callbacks": [*callbacks, *monitors],
            "logger": self.loggers,
            "plugins": [AtomicCheckpointIO(), *instantiate(cfg.trainer.get("plugins", []))],
            "default_root_dir": self.folder,
            "precision": precision,
            "enable_model_summary": False,
            "enable_progress_bar": False,  # the table of epochs has its own
            "enable_checkpointing": bool(callbacks),
            "use_distributed_sampler": False,  # the data module shares images among the ranks
            **limits,
        }
        trainer: L.Trainer = instantiate(cfg.trainer, **options)
        if trainer.precision != precision:
            raise UserError(
                f"trainer.precision={precision}: this device computes in {trainer.precision}; use auto"
            )
        validate_batches(cfg, trainer.world_size)
        self.device = about_device(trainer.strategy.root_device, precision, trainer.world_size)
        logger.info("")
        logger.info(f"stage {self.name}: {self.device}")
        return trainer

    def _fit_projection(self) -> None:
        """Project a new network's feature maps to their principal axes, where that is asked for."""
        if self.name == "last" and not self.cfg.ckpt and self.model.chosen["project"] is not None:
            device = self.trainer.strategy.root_device
            fit_principal_axes(self.model.backbone, self.data, device, self.state.precision)

    def _module(self) -> BCNNModule:
        tuning = {}
        if self.name == "finetune":
            self.model.backbone.grad_checkpointing = self.options.grad_checkpointing
            self.model.backbone.compiling = self.options.compile
            names = ("centering", "polyak", "unfreeze_from")
            tuning = {**{name: self.options[name] for name in names}, "teacher": self.teacher}
        return BCNNModule(
            self.model,
            self.name,  # type: ignore[arg-type]
            optimizer=instantiate(self.options.optimizer),
            scheduler=instantiate(self.options.scheduler),
            loss=self._loss(self.data),
            **tuning,
        )

    def _loss(self, data: FineGrainedDataModule, balanced: bool = False) -> nn.Module:
        weight = data.class_weights() if self.options.class_weights or balanced else None
        loss: nn.Module = instantiate(self.options.loss)(weight=weight)
        return loss

    def _kept(self, checkpoint: BestOrLastCheckpoint, failure: str, advice: str) -> StageResult:
        """Leave in `model` what the stage ends with: its own weights or, if worse, its start's.

        Raises:
            UserError: it has neither, for the reason `failure`.
        """
        before, metrics, kept = checkpoint.start, checkpoint.metrics, checkpoint.kept
        if kept is None and not failure:  # fast_dev_run keeps nothing
            return StageResult(self.name, None, dict(metrics))
        if kept is None and self.start is None:
            raise UserError(failure)
        # Worse is both fewer right and a larger loss: of few images one can go either way, and label
        # smoothing has the larger loss however right it is. Figures that are not finite are worse.
        worse = before and not (
            metrics.get("val_top1", 0.0) >= before["val_top1"]
            or metrics.get("val_loss", torch.inf) <= before["val_loss"]
        )
        if kept is not None and (self.start is None or not worse):
            if before and metrics.get("val_top1", 0.0) < before["val_top1"]:
                logger.warning("validation top-1 fell and its loss, too: these weights are kept")
            load_weights(self.model, kept)
            return StageResult(self.name, kept, dict(metrics), failure)
        logger.info(f"no epoch of this stage was better than its start: keeping {self.start}")
        load_weights(self.model, self.start)
        failure = failure or (
            f"stage {self.name} ended worse than it started (validation top-1 "
            f"{metrics['val_top1']:.1%} at best, {before['val_top1']:.1%} at its start, and a larger "
            f"loss): {advice}"
        )
        return StageResult(self.name, self.start, dict(before), failure)

    def _calibrate(self, result: StageResult) -> None:
        """Calibrate the model in the checkpoint that the stage ends with, unless it is the start's."""
        if result.checkpoint in (None, self.start):
            return
        model = self.model.to(self.trainer.strategy.root_device).eval()
        found = calibrate(model, self.data, self.features, self.held_out, self.state.precision)
        if found:
            model.calibration = found.to(model.head.bias.device)
            add_calibration(model, result.checkpoint)

    def _test(self, result: StageResult) -> None:
        """Add predictions of the test images to a result, or of the validation images without any."""
        validated = self.data.val or (result.held_out.paths if result.held_out else [])
        limit = self.trainer.limit_val_batches
        # The solver validates on all images whatever Lightning's limits are; it has no checkpoints.
        on_all = self.checkpoint is None or (isinstance(limit, float) and limit == 1)
        if "val_top1" in result.metrics and on_all:
            result.metrics["images_val"] = len(validated)
        samples = self._limited(self.data.test or self.data.val)
        if not samples:
            return
        model = self.model.to(self.trainer.strategy.root_device)
        precision = self.state.precision
        load = self.features.evaluation_dataloader  # of images, or of stored descriptors
        predictions = predict_split(model, samples, load(samples), precision)
        digests = [self.data.digests[path] for path in predictions.paths]
        split = "test" if self.data.test else "val"
        result.predictions = replace(predictions, digests=digests, split=split)
        if self.data.test:
            figures = headline(result.predictions)
            names = {"test_top1": "top1", "test_top5": "top5", "test_loss": "nll"}
            result.metrics |= {key: figures[name].value for key, name in names.items()}
            result.metrics["images_test"] = len(samples)
        is_last = result.failure or self.name == STAGES[self.cfg.stage][-1]
        mistakes = result.predictions.confident_mistakes(MISTAKES)
        if mistakes and is_last and self.trainer.world_size == 1:  # other ranks would wait too long
            asked, known = load([samples[index] for index in mistakes]), load(self.data.train)
            found = nearest_images(model, asked, known, self.data.train, NEIGHBOURS, precision)
            result.nearest = dict(zip(mistakes, found, strict=True))

    def _limited(self, samples: Sequence[tuple[str, int]]) -> Sequence[tuple[str, int]]:
        """Return the samples that `trainer.limit_test_batches` leaves, a number or a share."""
        limit = self.trainer.limit_test_batches
        if isinstance(limit, int):
            return samples[: limit * self.data.batch_size]
        return samples if limit is None else samples[: round(limit * len(samples))]
