"""Every option has an effect, or is refused by name before training."""

from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
from conftest import FINETUNE, SMALL, configure, run, toy

from bcnn.models.checkpoint import load_model
from bcnn.training.config import validate, validate_batches, validate_network
from bcnn.training.schema import absolute_paths
from bcnn.utils.errors import UserError

MINE = "+callbacks.mine._target_=lightning.pytorch.callbacks."
TEACHER = "finetune.teacher=a.ckpt"
REFUSED = {
    "seed=5000000000": r"seed=5e\+09: choose a number from 0",
    "stage=lst": "stage=lst: choose from both, last, finetune",
    "+stag=last": "no option stag:",
    "+last.sotre=false": r"no option last\.sotre:",
    "+finetune.epoch=3": r"no option finetune\.epoch:",
    "+model.heads=2": r"no option model\.heads:",
    "+data.siez=64": r"data: .*siez",
    "+finetune.optimizer.betas=[0.9,0.99]": r"finetune\.optimizer: .*betas",
    "+finetune.scheduler.warmpu=0.1": r"finetune\.scheduler: .*warmpu",
    "finetune.optimizer._target_=torch.optim.SDG": r"finetune\.optimizer: .*SDG",
    "finetune.polyak=0": r"finetune\.polyak=0: choose",
    "optimizer@finetune.optimizer=adam": r"polyak has no effect .*Adam: add finetune\.polyak=null",
    "finetune.batch_size=2": "too small for finetune.centering: use 4 or more",
    "last.folds=1": r"last\.folds=1: choose a number from 2",
    "last.l2=[]": r"last\.l2=\[\]: give one number above zero",
    "last=sgd last.batch_size=0": r"last\.batch_size=0",
    "data.size=9000": "data.size=9000: choose a number from 1 to 8192",
    "+trainer.callbacks=[]": r"trainer\.callbacks is set by the stage: use callbacks=",
    "+trainer.max_epochs=3": r"trainer\.max_epochs .*finetune\.epochs",
    "stage=last +trainer.gradient_clip_val=1": "gradient_clip_val has no effect on last=convex",
    "stage=last +trainer.limit_val_batches=1": "limit_val_batches has no effect on last=convex",
    "trainer.precision=bf16-true": "choose from auto, 32-true, bf16-mixed, 16-mixed",
    "+callbacks.mine.patience=2": r"name its class by callbacks\.mine\._target_=",
    f"stage=last {MINE}Timer": "no effect on last=convex",
    f"{MINE}BatchSizeFinder": r"BatchSizeFinder .* use finetune\.batch_size$",
    "stage=finetune": "starts from a checkpoint of stage=last: add ckpt=PATH",
    "ckpt=best.ckpt model.weights=random": r"model\.weights has no effect: .* from best\.ckpt",
    "model/pooling=auto last=sgd": "model/pooling=auto compares solutions of last=convex",
    "model/pooling=auto last.folds=null": "model/pooling=auto compares solutions of last=convex",
    "model/pooling=auto model.project=2": "model.project=2 has no effect on model/pooling=auto",
    "data.sampler=balanced finetune.class_weights=true": r"=balanced and finetune\.class_weights",
    "data.sampler=balanced stage=last last.class_weights=true": r"=balanced and last\.class_weights",
    f"{TEACHER} finetune.class_weights=true": "class_weights=true has no effect",
    f"{TEACHER} stage=last": "teaches stage finetune: choose stage=both",
    f"{TEACHER} finetune.loss.label_smoothing=0.1": "loss.* has no effect",
    "data.unlabelled=other": "add finetune.teacher=CKPT",
    f"data.unlabelled=other {TEACHER} last=sgd model/pooling=sqrt": "with last=convex",
}
ACCEPTED = ("ckpt=best.ckpt", "model/pooling=auto", f"data.unlabelled=other {TEACHER}")


def accept(options: str) -> None:
    words = ["data=folder", "data.root=images", "output=out", *options.split()]
    validate(configure(*words), words)


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_do_not_go_together(options: str) -> None:
    with pytest.raises(UserError, match=REFUSED[options]) as refusal:
        accept(options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("options", ACCEPTED)
def test_options_that_go_together(options: str) -> None:
    accept(options)


def test_a_text_option_that_looks_like_a_number_is_text() -> None:
    assert configure("data=folder", "data.root=2024").data.root == "2024"


def test_ranks_share_a_batch_equally() -> None:
    cfg = configure("output=out")
    validate_batches(cfg, ranks=4)
    with pytest.raises(UserError, match=r"finetune\.batch_size=16: 3 devices .*; use 18"):
        validate_batches(cfg, ranks=3)


def test_paths_become_absolute_and_names_of_weights_stay(tmp_path: Path) -> None:
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "own.pth").touch()
    cfg = configure("data=folder", "data.root=images", "output=run", "ckpt=best.ckpt")
    found = absolute_paths(cfg, tmp_path)
    paths = [str(tmp_path / name) for name in ("images", "run", "best.ckpt")]
    assert [found.data.root, found.output, found.ckpt] == paths
    assert found.model.weights == "imagenet" and cfg.data.root == "images"
    own = absolute_paths(configure("output=run", "model.weights=own.pth"), tmp_path)
    assert own.model.weights == str(tmp_path / "own.pth")
    (tmp_path / "run" / "last").mkdir(parents=True)
    (tmp_path / "run" / "last" / "result.json").write_text('{"checkpoint": "last/best.ckpt"}')
    found = absolute_paths(configure("output=new", "ckpt=run", "model.weights=run"), tmp_path)
    assert found.ckpt == found.model.weights == str(tmp_path / "run" / "last" / "best.ckpt")


class Counted(L.Callback):
    """Counts how often it is made and which stages it sees."""

    made: ClassVar[int] = 0
    stages: ClassVar[list[str]] = []

    def __init__(self) -> None:
        type(self).made += 1

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stages.append(str(pl_module.stage))


@pytest.mark.usefixtures("tiny")
def test_a_callback_of_ones_own_is_made_once_a_stage(images: Path, tmp_path: Path) -> None:
    Counted.made, Counted.stages[:] = 0, []
    mine = "+callbacks.mine._target_=test_config.Counted"
    run(images, tmp_path / "a", SMALL, *FINETUNE, "last=sgd", "last.epochs=1", mine)
    assert (Counted.made, Counted.stages) == (2, ["last", "finetune"])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "options",
    [
        "+trainer.deterministic=true +trainer.profiler=simple ~logger.csv",
        "last=sgd last.epochs=1 +trainer.gradient_clip_val=1 +trainer.limit_train_batches=1",
        "~logger.csv +trainer.enable_progress_bar=false +trainer.detect_anomaly=true",
        "+trainer.limit_test_batches=1 +trainer.limit_val_batches=1 +trainer.max_time=00:00:10:00",
        "last=sgd last.epochs=1 +trainer.overfit_batches=1",
        f"{MINE}ModelCheckpoint",
        "scheduler@finetune.scheduler=plateau callbacks=early_stopping",
    ],
)
def test_options_of_lightning_s(images: Path, tmp_path: Path, options: str) -> None:
    run(images, tmp_path / "out", SMALL, *FINETUNE, *options.split())
    assert (tmp_path / "out" / "finetune" / "result.json").is_file()
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.usefixtures("tiny")
def test_fast_dev_run_keeps_no_checkpoint(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "out", SMALL, *FINETUNE, "last=sgd", "+trainer.fast_dev_run=true")
    assert not [*tmp_path.rglob("*.ckpt")]


@pytest.mark.usefixtures("tiny")
def test_a_finetune_has_the_network_of_its_checkpoint(images: Path, tmp_path: Path) -> None:
    network = [SMALL, "model/pooling=sqrt", "model.project=3"]
    run(images, tmp_path / "a", *network, "stage=last")
    start = ["stage=finetune", f"ckpt={tmp_path / 'a'}", *FINETUNE]  # the folder of a run
    for wrong, sentence in (
        (["model/pooling=newton_schulz"], r"model\.pooling is .*newton_schulz.*has .*sqrt"),
        (["model.project=2"], r"model\.project is 2, and .* has 3: leave it out"),
        (["model/pooling=sqrt", "model.pooling.power=0.25"], r"model\.pooling is .*0\.25"),
        (["finetune.grad_checkpointing=true"], "this backbone does not support it"),
        (["finetune.unfreeze_from=conv5_1"], r"unfreeze_from=conv5_1: choose from null, features"),
        (["data.size=6"], r"data\.size=6: this backbone takes 8 or more"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(images, tmp_path / "c", *start, *wrong)
    model = load_model(tmp_path / "a")
    for default in ("model/pooling=bilinear", "model.project=null"):  # asked for, not left open
        cfg = configure(*toy(images, *start, SMALL, default))
        validate_network(cfg, model)
        with pytest.raises(UserError, match="leave it out"):
            validate_network(cfg, model, [default])
    run(images, tmp_path / "b", *start)
    report = (tmp_path / "b" / "report.html").read_text()
    assert "name: tiny" in report and "name: sqrt" in report
    assert load_model(tmp_path / "b").chosen["pooling"]["name"] == "sqrt"
