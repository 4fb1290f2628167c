"""The two checkpoints of a stage: the best weights, and the full state that a stage resumes from."""

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from bcnn.data.sampler import current_epoch
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.console import logger
from bcnn.utils.files import atomic_write

EVERY = 60  # seconds from one state to the next at least: writing one can take as long as an epoch
SAVED = ("start", "train", "last", "metrics", "stopped", "rows")  # attributes that a state keeps
WEIGHTS = ("epoch", "global_step", "pytorch-lightning_version", "state_dict", "hyper_parameters")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically and read without running code from them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *_: Any, **__: Any) -> None:
        content = io.BytesIO()  # torch's own writer ends the process where a disk is full
        torch.save(checkpoint, content)
        with atomic_write(Path(path)) as part:
            part.write_bytes(content.getbuffer())

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state


class BestOrLastCheckpoint(ModelCheckpoint):
    """Keeps the best weights of a stage in `folder/best.ckpt`, and its state in `folder/last.ckpt`.

    The best epoch is that of the least validation loss: of a hundred images, top-1 sees the one that
    just changed sides, the loss sees them all. Without validation `images` there is no best.ckpt.
    last.ckpt is the full state after an epoch `EVERY` seconds ago at most. A stage resumed from it
    (`Trainer.fit(ckpt_path=…)`) ends with the same weights.
    """

    def __init__(self, folder: Path, images: int) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor="val_loss" if images else None,
            save_top_k=1 if images else 0,
            save_weights_only=True,
            enable_version_counter=False,
        )
        self.state, self.images = folder / "last.ckpt", images
        self.start: dict[str, float] = {}  # validated before step 1, with `num_sanity_val_steps=-1`
        self.train: dict[str, float] = {}  # training figures of the latest epoch
        self.last: dict[str, float] = {}  # its validation figures
        self.metrics: dict[str, float] = {}  # those of the epoch that `kept` holds
        self.stopped = False  # another callback ended the stage with this epoch
        self.rows: list[dict[str, str]] = []  # of metrics.csv
        self.resumed = False
        self._keeps_last = not images
        self._saved_at = -math.inf

    @property
    def kept(self) -> Path | None:
        """The file that the stage ends with, by the rule `no_worse`; None where none was written."""
        file = self.state if self._keeps_last else Path(self.best_model_path)  # "" is a folder
        return file if file.is_file() else None

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = _metrics(trainer, "val_")
        for each in trainer.loggers:
            each.log_metrics(self.start, step=0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Lightning steps a plateau schedule after the state of its epoch was saved.
        for each in trainer.lr_scheduler_configs if self.resumed else ():
            if each.reduce_on_plateau:
                each.scheduler.step(self.last["val_loss"])  # type: ignore[call-arg,arg-type]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        best_score = self.best_model_score
        super().on_train_epoch_end(trainer, pl_module)  # after the epoch's validation
        self.train = _metrics(trainer, "train_") | {"epoch": trainer.current_epoch}
        self.last = _metrics(trainer, "val_")
        if self.best_model_score is not best_score:
            self.metrics = self.last
        self.stopped = trainer.should_stop
        ended = current_epoch(trainer) == trainer.max_epochs or trainer.global_step == trainer.max_steps
        due = ended or self.stopped or time.monotonic() - self._saved_at >= EVERY
        if trainer.strategy.broadcast(due) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_state(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose between best and last; also where a resumed stage has no epoch left to train."""
        if self.start and self.last and self.metrics is not self.last:
            last, start, best = (each["val_top1"] for each in (self.last, self.start, self.metrics))
            if no_worse(last, start, best, self.images):
                self._keeps_last, self.metrics = True, self.last
                logger.info("kept: the last epoch, which validation cannot tell from the best")

    @rank_zero_only
    def finish(self) -> None:
        """Drop the optimizer's state, once the stage's result is written and nothing resumes it."""
        if self.kept != self.state:
            self.state.unlink(missing_ok=True)
            return
        files = AtomicCheckpointIO()
        content = files.load_checkpoint(self.state)
        files.save_checkpoint({name: content[name] for name in WEIGHTS}, self.state)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {name: getattr(self, name) for name in SAVED}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore what Lightning does too late or not at all: the epoch, early stopping, logs."""
        self.resumed = True
        state = checkpoint["callbacks"][self.state_key]  # which Lightning loads after this
        for name in SAVED:
            setattr(self, name, state[name])
        # No public way: a schedule asks for the number of steps, which has workers draw an epoch's
        # images, before Lightning restores the number of that epoch.
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        trainer.fit_loop.epoch_progress.load_state_dict(progress)
        trainer.should_stop = self.stopped
        best, step = self.state.with_name("best.ckpt"), checkpoint["global_step"]
        if (
            best.is_file()
            and torch.load(best, "cpu", weights_only=True, mmap=True)["global_step"] > step
        ):
            self.metrics = {}  # of a later epoch, which on a GPU will have other figures
            state |= super().state_dict()
        elif state["best_model_path"]:  # the folder may have been moved
            state["best_model_path"] = state["kth_best_model_path"] = str(best)
            state["best_k_models"] = {str(best): state["best_model_score"]}
        state["dirpath"] = self.dirpath
        for each in trainer.loggers:
            if isinstance(each, CSVLogger):  # which begins its file anew
                each.experiment.metrics.extend(self.rows)
            # The training figures of an epoch are logged after its state is saved.
            each.log_metrics(self.train, step=step - 1)

    def _save_state(self, trainer: L.Trainer) -> None:
        self._saved_at = time.monotonic()
        for each in trainer.loggers:
            each.save()
        log = self.state.with_name("metrics.csv")
        if log.is_file():
            with log.open(newline="") as lines:
                self.rows = list(csv.DictReader(lines))
        trainer.save_checkpoint(self.state, weights_only=False)
        if not self.images and trainer.is_global_zero:  # no best.ckpt that wandb could upload
            self.last_model_path = str(self.state)
            for each in trainer.loggers:
                each.after_save_checkpoint(self)


def add_calibration(model: BCNN, checkpoint: Path) -> None:
    """Write the calibration of a model into a checkpoint of the same weights."""
    files = AtomicCheckpointIO()
    content = files.load_checkpoint(checkpoint)
    state = {f"model.{name}": tensor.cpu() for name, tensor in model.state_dict().items()}
    content["state_dict"] |= {name: state[name] for name in state if "calibration." in name}
    content["hyper_parameters"]["calibration"] = model.description()["calibration"]
    files.save_checkpoint(content, checkpoint)


def no_worse(last: float, start: float, best: float, images: int) -> bool:
    """Return whether a fine-tune keeps its last epoch rather than its best one, by their top-1.

    The best of several epochs is best by luck too. The last is kept unless its validation accuracy is
    below that of the start, or below that of the best by more than a standard error: Breiman et al.,
    "Classification and Regression Trees", 1984, §3.4.3; with two right and two wrong added, since all
    right would else have none: Agresti & Coull, The American Statistician 52, 1998.
    """
    share = (best * images + 2) / (images + 4)
    return last >= max(start, best - math.sqrt(share * (1 - share) / (images + 4)))


def _metrics(trainer: L.Trainer, prefix: str) -> dict[str, float]:
    metrics: dict[str, Any] = trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items() if name.startswith(prefix)}
