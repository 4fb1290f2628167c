"""Which epoch of a stage is kept, and the state that an interrupted stage goes on from."""

import csv
import io
import math
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from bcnn.data.sampler import current_epoch
from bcnn.utils.distributed import on_rank_zero
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write

STATE = "resume.ckpt"  # beside the weights of a stage that has not ended
EVERY = 60  # seconds at least from one state to the next, which may take as long to write as an epoch
OWN = ("start", "train", "last", "metrics", "stopped", "rows")  # what `BestOrLastCheckpoint` adds to it


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's files, written whole or not at all, and read without running code from them.

    Lightning's own go through TMPDIR and are copied from there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *_: Any, **__: Any) -> None:
        content = io.BytesIO()  # torch's own writer ends the process where a disk is full
        torch.save(checkpoint, content)
        with atomic_write(Path(path)) as part:
            part.write_bytes(content.getbuffer())

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of the many kinds that a damaged file can lead to
            raise UserError(f"{path} is damaged: remove it to begin the stage anew") from error
        return state


class BestOrLastCheckpoint(ModelCheckpoint):
    """Keeps the weights of one epoch of a stage, in `folder/best.ckpt`.

    It is the epoch of the least validation loss: of a hundred images, top-1 sees the one that just
    changed sides, the loss sees them all. A finetune keeps its last epoch, whose steps were the
    smallest, unless `no_worse` tells it from the best. Without validation images it is the last, in
    `last.ckpt`.

    A trainer that validates before it trains (`num_sanity_val_steps=-1`) says what a finetune starts
    from; that is logged as of step 0.

    The trainer's whole state is in `folder/resume.ckpt`, for `Trainer.fit` to go on from to the same
    weights: as of the last epoch, or of one `EVERY` seconds ago at most. A module that steps by itself
    starts anew instead. Weights that were kept in an epoch after that state are forgotten: it is
    trained again, and on a GPU its figures are others.

    Args:
        folder: to write to.
        images: number of validation images.
    """

    def __init__(self, folder: Path, images: int) -> None:
        super().__init__(
            folder,
            filename="best" if images else "last",
            monitor="val_loss" if images else None,
            save_weights_only=True,
            enable_version_counter=False,
        )
        self.state = folder / STATE
        self.images = images
        self.start: dict[str, float] = {}  # validation figures before the first step
        self.train: dict[str, float] = {}  # training figures of the epoch just done
        self.last: dict[str, float] = {}  # its validation figures
        self.metrics: dict[str, float] = {}  # those of the epoch that is kept
        self.stopped = False  # another callback ended the stage with this epoch
        self.rows: list[dict[str, str]] = []  # of metrics.csv
        self.resumed = False
        self._saved = -math.inf  # when the state was
        self._forgets = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say before an epoch is trained that there is no room for what it leaves.

        Raises:
            UserError: the weights, the state, and either's successor beside it do not fit.
        """
        super().setup(trainer, pl_module, stage)
        weights = sum(tensor.nbytes for tensor in pl_module.state_dict().values())
        trained = sum(each.nbytes for each in pl_module.parameters() if each.requires_grad)
        needed = 2 * weights + 2 * (weights + trained) * pl_module.automatic_optimization

        def refuse_full_disk() -> None:
            self.state.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.state.parent).free
            if free < needed:
                raise UserError(
                    f"no room for checkpoints: {needed / 1e9:.2f} GB are needed in "
                    f"{self.state.parent}, and {free / 1e9:.2f} GB are free"
                )

        on_rank_zero(trainer.global_rank, trainer.strategy.broadcast, refuse_full_disk)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = _metrics(trainer, "val_")
        for logger in trainer.loggers:
            logger.log_metrics(self.start, step=0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell a plateau schedule of the epoch resumed from: Lightning does so after it has saved."""
        super().on_train_start(trainer, pl_module)
        for each in trainer.lr_scheduler_configs if self.resumed else ():
            if each.reduce_on_plateau:
                each.scheduler.step(self.last["val_loss"])  # type: ignore[call-arg,arg-type]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before = self.best_model_score
        super().on_train_epoch_end(trainer, pl_module)  # after the epoch's validation
        self.train = _metrics(trainer, "train_") | {"epoch": trainer.current_epoch}
        self.last = _metrics(trainer, "val_")
        if self.best_model_score is not before:
            self.metrics = self.last
        self.stopped = trainer.should_stop
        done = self.stopped or current_epoch(trainer) == trainer.max_epochs
        due = done or time.monotonic() - self._saved >= EVERY
        if pl_module.automatic_optimization and trainer.strategy.broadcast(due):
            self._saved = time.monotonic()
            for logger in trainer.loggers:
                logger.save()
            log = self.state.with_name("metrics.csv")
            if log.is_file():
                with log.open(newline="") as lines:
                    self.rows = list(csv.DictReader(lines))
            trainer.save_checkpoint(self.state)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Also where all epochs were done when the stage was interrupted, and none is left to train."""
        if not self.start or not self.last:
            return
        start, last, best = (each["val_top1"] for each in (self.start, self.last, self.metrics))
        if no_worse(last, start, best, self.images):
            trainer.save_checkpoint(self.best_model_path, weights_only=True)
            self.metrics = self.last

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {name: getattr(self, name) for name in OWN}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Also, have the loggers go on: the training figures of an epoch come after its state.

        And say which epoch it is: workers begin to draw its images when a schedule asks how many steps
        there are, which is before Lightning has loaded that.
        """
        self.resumed = True
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        trainer.fit_loop.epoch_progress.load_state_dict(progress)
        state = checkpoint["callbacks"][self.state_key]
        self._forgets = self._kept_step(state) > checkpoint["global_step"]
        trainer.should_stop = state["stopped"]
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):  # which begins its file anew
                logger.experiment.metrics.extend(state["rows"])
            logger.log_metrics(state["train"], step=checkpoint["global_step"] - 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in OWN:
            setattr(self, name, state_dict[name])
        if self._forgets:
            self.metrics = {}
            return
        # Where the folder is now, to which it may have been moved.
        path = str(self._kept_file(state_dict))
        here: dict[str, Any] = {"dirpath": self.dirpath, "best_model_path": path}
        if state_dict["best_k_models"]:
            here |= {
                "kth_best_model_path": path,
                "best_k_models": {path: state_dict["best_model_score"]},
            }
        super().load_state_dict(state_dict | here)

    def _kept_file(self, state_dict: dict[str, Any]) -> Path:
        return Path(str(self.dirpath), Path(state_dict["best_model_path"]).name)

    def _kept_step(self, state_dict: dict[str, Any]) -> int:
        """Steps after which the weights were kept; 0 where the file tells nothing."""
        try:
            kept = torch.load(self._kept_file(state_dict), "cpu", weights_only=True, mmap=True)
            return int(kept["global_step"])
        except Exception:  # of the many kinds that a damaged file can lead to; it is opened later
            return 0


def no_worse(last: float, start: float, best: float, images: int) -> bool:
    """Whether a finetune keeps its last epoch rather than its best one.

    The best of several epochs is so by luck as well: on few images it can be one of the first, of
    large steps and a lower test accuracy. The last is kept unless its validation accuracy is under
    that of the start, or under that of the best by more than a standard error (the rule of Breiman et
    al., "Classification and Regression Trees", 1984, §3.4.3); with two right and two wrong added, since
    all right would else have none (Agresti & Coull, The American Statistician 52, 1998).
    """
    share = (best * images + 2) / (images + 4)
    return last >= max(start, best - math.sqrt(share * (1 - share) / (images + 4)))


def _metrics(trainer: L.Trainer, prefix: str) -> dict[str, float]:
    metrics: dict[str, Any] = trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items() if name.startswith(prefix)}
