"""Draw docs/finetune.png: first steps of a fine-tune, with the original's optimizer and the default.

python docs/finetune.py CKPT [OVERRIDE …]   from a checkpoint of stage `last`, with its run's overrides
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize
from hydra.utils import instantiate
from matplotlib.figure import Figure
from torch import Tensor

import bcnn.training.schema  # noqa: F401  # registers the types of the options
from bcnn.models.checkpoint import load_model
from bcnn.training.module import BCNNModule
from bcnn.utils.device import fastest_precision

STEPS = 20
OPTIMIZERS = {"original": "tab:red", "default": "tab:blue"}


class Movement(L.Callback):
    """Record the loss of each batch, and how far the steps have moved the descriptors of `images`."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.losses: list[float] = []
        self.common: list[float] = []  # ‖mean movement‖
        self.own: list[float] = []  # root mean square of the rest of each movement

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.start = self._descriptors(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        moved = self._descriptors(pl_module) - self.start
        common = moved.mean(dim=0)
        self.losses.append(float(outputs["loss"]))
        self.common.append(float(common.norm()))
        self.own.append(float((moved - common).square().sum(dim=1).mean().sqrt()))
        # Not `max_steps`, which would shorten the schedule.
        trainer.should_stop = trainer.global_step >= STEPS

    @torch.no_grad()
    def _descriptors(self, module: BCNNModule) -> Tensor:
        with module.trainer.precision_plugin.forward_context():
            return module.model.descriptor(self.images.to(module.device))


def main(checkpoint: str, overrides: list[str]) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, movement = figure.subplots(1, 2)
    for name, colour in OPTIMIZERS.items():
        with initialize("../conf", version_base="1.3"):
            cfg = compose("config", [f"finetune={name}", f"ckpt={checkpoint}", *overrides])
        L.seed_everything(cfg.seed, verbose=False)
        data = instantiate(cfg.data)
        data.prepare_data()
        data.setup()
        model = load_model(checkpoint).train()
        if model.split:
            data.follow(model.split)
        data.batch_size = cfg.finetune.batch_size
        images, _ = next(iter(data.evaluation_dataloader(data.test[::4], batch_size=50)))
        module = BCNNModule(
            model,
            "finetune",
            instantiate(cfg.finetune.optimizer),
            instantiate(cfg.finetune.scheduler),
            centering=cfg.finetune.centering,
            polyak=cfg.finetune.polyak,
        )
        seen = Movement(images)
        L.Trainer(
            max_epochs=cfg.finetune.epochs,
            limit_val_batches=0,
            precision=fastest_precision(),
            callbacks=[seen],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        ).fit(module, datamodule=data)
        losses.plot(range(1, len(seen.losses) + 1), seen.losses, "o-", ms=3, color=colour, label=name)
        for values, line, part in ((seen.common, "-", "in common"), (seen.own, "--", "each its own")):
            steps = range(1, len(values) + 1)
            movement.plot(steps, values, line, color=colour, label=f"{name}, {part}")
    losses.axhline(
        torch.tensor(float(len(data.classes))).log(), color="grey", lw=1, ls=":", label="guessing"
    )
    losses.set(title="cross-entropy of the batch", xlabel="step", yscale="log")
    movement.set(title="movement of the descriptors (length 1)", xlabel="step", yscale="log")
    for axes in (losses, movement):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
