"""Every option is obeyed, or refused by name before an image is read."""

from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
from conftest import configure, toy
from omegaconf import OmegaConf

from bcnn.models.checkpoint import load_model
from bcnn.training.run import run
from bcnn.utils.errors import UserError

CALLBACKS = "+trainer.callbacks=[{_target_:lightning.pytorch.callbacks.Timer}]"
MINE = "+callbacks.mine._target_=lightning.pytorch.callbacks."
DDP = ["trainer=ddp", "trainer.accelerator=cpu"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["output=null"], "output is missing"),
        (["~last"], "last is missing"),
        (["seed=null"], "seed is missing"),
        (["seed=5000000000"], r"seed=5000000000: a whole number, 0 at least and under 4294967296"),
        (["seed=1.5"], r"seed=1\.5: a whole number, 0 at least"),
        (["stage=lst"], "stage=lst: choose from both, last, finetune"),
        (["+stag=last"], "no option stag: .*stage"),
        (["+last.epochs=3"], r"last\.epochs is an option of last=sgd, and last=convex is chosen"),
        (["+last.optimizer.lr=3"], r"last\.optimizer is an option of last=sgd"),
        (["+last.sotre=false"], r"no option last\.sotre: .*last\.l2"),
        (["+finetune.epoch=3"], r"no option finetune\.epoch"),
        (["+data.siez=64"], r"data: .*siez"),
        (["+model.heads=2"], r"no option model\.heads"),
        (["model.pooling.name=average"], "there is no pooling average: choose from bilinear"),
        (["+finetune.optimizer.betas=[0.9,0.99]"], r"finetune\.optimizer: .*betas"),
        (["+finetune.scheduler.warmpu=0.1"], r"finetune\.scheduler: .*warmpu"),
        (["+logger.csv.flush=3"], r"logger\.csv: .*flush"),
        (["finetune.optimizer.lr=-1"], "finetune: .*learning rate.*-1"),
        (["finetune.loss.label_smoothing=2"], "finetune: .*smoothing"),
        (["finetune.epochs=0"], r"finetune\.epochs=0: 1 at least"),
        (["finetune.epochs=2.5"], r"finetune\.epochs: .*2\.5"),
        (["finetune.polyak=many"], r"finetune\.polyak: .*many"),
        (["finetune.polyak=0"], r"finetune\.polyak=0: a number over zero"),
        (["optimizer@finetune.optimizer=adam"], r"finetune\.polyak .*Adam.*add finetune\.polyak=null"),
        (
            ["finetune.optimizer={_target_:torch.optim.RMSprop,_partial_:true,lr:0.1}"],
            r"finetune\.polyak .*RMSprop.*add finetune\.polyak=null",
        ),
        (["last.folds=1"], r"last\.folds=1: 2 or more, or null"),
        (["last.l2=[]"], r"last\.l2=\[\]: one number over zero"),
        (["last=sgd", "last.batch_size=0"], r"last\.batch_size=0"),
        (["~finetune.epochs"], r"finetune\.epochs is missing"),
        ([CALLBACKS], r"trainer\.callbacks does not go with the stages: use callbacks="),
        (["+trainer.max_epochs=3"], r"trainer\.max_epochs .*finetune\.epochs"),
        (["+trainer.max_steps=2"], r"trainer\.max_steps .*finetune\.epochs"),
        (["+trainer.fast_dev_run=true"], r"trainer\.fast_dev_run .*data\.classes=2"),
        (["+trainer.limit_val_batches=0"], r"trainer\.limit_val_batches .*data\.val_fraction"),
        (["+trainer.check_val_every_n_epoch=2"], r"trainer\.check_val_every_n_epoch .*each"),
        (["+trainer.enable_checkpointing=false"], r"trainer\.enable_checkpointing"),
        (["+trainer.accumulate_grad_batches=2"], r"finetune\.accumulate"),
        (["+trainer.logger=false"], r"use logger=NAME"),
        (["+trainer.overfit_batches=1"], r"trainer\.overfit_batches .*accelerator, benchmark"),
        (["+trainer.gradient_clip_val=1"], r"trainer\.gradient_clip_val .*last=convex takes none"),
        (["+trainer.limit_train_batches=1"], r"last=convex takes none"),
        (["trainer.precision=bf16-true"], "choose from auto, 32-true, bf16-mixed, 16-mixed"),
        ([*DDP, "trainer.devices=3"], r"finetune\.batch_size=16 .* 3 devices: choose 15 or 18"),
        ([*DDP, "trainer.devices=24"], r"finetune\.batch_size=16 .* 24 devices: choose 24, or"),
        (["trainer.precision=16-mixed"], "this device computes in bf16-mixed"),
        (["trainer.accelerator=abacus"], "trainer: .*abacus"),
        (["trainer.devices=many"], "trainer: .*devices"),
        (
            ["+callbacks.mine.patience=2"],
            r"callbacks\.mine: say which one by callbacks\.mine\._target_=",
        ),
        ([f"{MINE}LearningRateFinder"], "LearningRateFinder .* use finetune.optimizer.lr, the most"),
        ([f"{MINE}BatchSizeFinder"], r"callbacks\.mine: BatchSizeFinder .* use finetune\.batch_size$"),
        ([f"{MINE}RichProgressBar"], r"RichProgressBar .* use nothing: a run has its own bar"),
        ([f"{MINE}EarlyStopping"], r"callbacks\.mine: .*monitor"),
        ([f"{MINE}StochasticWeightAveraging"], "use EMAWeightAveraging: .* not kept"),
        (["finetune.optimizer._target_=torch.optim.SDG"], r"finetune\.optimizer: .*SDG"),
    ],
)
def test_mistakes_are_told_before_an_image_is_read(
    tmp_path: Path, options: list[str], sentence: str
) -> None:
    missing = toy(tmp_path / "missing", f"output={tmp_path / 'out'}", *options)
    with pytest.raises(UserError, match=sentence) as refusal:
        run(configure(*missing))
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_a_run_without_data() -> None:
    with pytest.raises(UserError, match="data is missing: a run cannot do without"):
        run(configure("~data", "output=here"))


@pytest.mark.parametrize(
    "options",
    [
        ["data.size=64.5"],
        ["data.size=big"],
        ["data.val_fraction=some"],
        ["data.num_workers=-3"],
        ["data.seed=abc"],
    ],
)
def test_values_of_another_kind_in_data(images: Path, tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(UserError, match=options[0]):
        run(configure(*toy(images, f"output={tmp_path / 'out'}", *options)))


class Seen(L.Callback):
    stages: ClassVar[list[str]] = []

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stages.append(str(pl_module.stage))


FINETUNE = ["finetune.epochs=1", "finetune.batch_size=6"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "options",
    [
        ["+trainer.deterministic=true", "+trainer.profiler=simple", "~logger.csv"],
        ["last=sgd", "last.epochs=1", "+trainer.gradient_clip_val=1", "+trainer.limit_train_batches=1"],
        ["~logger", "+trainer.enable_progress_bar=false", "+trainer.detect_anomaly=true"],
        [f"{MINE}ModelCheckpoint"],
        [
            "schedule@finetune.scheduler=plateau",
            "callbacks=early_stopping",
            "callbacks.early_stopping.patience=1",
        ],
    ],
)
def test_options_that_are_obeyed(images: Path, tmp_path: Path, options: list[str]) -> None:
    options = ["model.backbone.name=tiny", *FINETUNE, *options, f"output={tmp_path / 'out'}"]
    assert run(configure(*toy(images, *options))) >= 0.6
    assert (tmp_path / "out" / "finetune" / "best.ckpt").is_file()
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.usefixtures("tiny")
def test_callbacks_of_the_configuration_see_both_stages(images: Path, tmp_path: Path) -> None:
    mine = "+callbacks.mine._target_=test_mistakes.Seen"
    run(configure(*toy(images, *FINETUNE, "model.backbone.name=tiny", mine, f"output={tmp_path}")))
    assert Seen.stages == ["last", "finetune"]


def test_plateau_without_validation_images(images: Path, tmp_path: Path) -> None:
    plateau = ["last=sgd", "schedule@last.scheduler=plateau", "data.val_fraction=0"]
    with pytest.raises(UserError, match=r"last\.scheduler=plateau waits for .* no validation"):
        run(configure(*toy(images, *plateau, f"output={tmp_path / 'out'}")))


@pytest.mark.usefixtures("tiny")
def test_early_stopping_without_validation_images(images: Path, tmp_path: Path) -> None:
    options = ["stage=last", "last=sgd", "callbacks=early_stopping", "data.val_fraction=0"]
    with pytest.raises(UserError, match=r"callbacks\.early_stopping waits for .* no validation images"):
        run(configure(*toy(images, "model.backbone.name=tiny", *options, f"output={tmp_path / 'out'}")))


@pytest.mark.usefixtures("tiny")
def test_a_finetune_goes_on_with_the_network_of_its_checkpoint(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ["model.backbone.name=tiny", "model/pooling=sqrt", "model.project=3"]
    run(configure(*toy(images, *network, "stage=last", f"output={tmp_path / 'a'}")))
    start = ["stage=finetune", f"ckpt={tmp_path / 'a' / 'last' / 'best.ckpt'}", *FINETUNE]
    for wrong, sentence in (
        (
            "model/pooling=newton_schulz",
            r"model\.pooling is .*newton_schulz.* goes on, .*sqrt",
        ),
        ("model.project=2", r"model\.project is 2, and in .*, 3: leave it out"),
        ("model.pooling.power=0.25", r"model\.pooling is .*0\.25"),
        ("finetune.grad_checkpointing=true", r"finetune\.grad_checkpointing=true: this backbone cannot"),
        (
            "finetune.unfreeze_from=conv5_1",
            r"finetune\.unfreeze_from=conv5_1: choose a layer from features",
        ),
    ):
        power = ["model/pooling=sqrt"] if "power" in wrong else []
        missing = toy(tmp_path / "missing", *start, *power, wrong, f"output={tmp_path / 'c'}")
        with pytest.raises(UserError, match=sentence):
            run(configure(*missing))
    capsys.readouterr()
    run(configure(*toy(images, *start, f"output={tmp_path / 'b'}")))
    assert "the network is that of" in capsys.readouterr().out
    recorded = OmegaConf.load(tmp_path / "b" / "run.yaml").cfg.model
    assert (recorded.backbone.name, recorded.pooling.name, recorded.project) == ("tiny", "sqrt", 3)
    run(configure(*toy(images, *network, *start, f"output={tmp_path / 'd'}")))
    assert "the network is that of" not in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_an_output_folder_is_used_once(images: Path, tmp_path: Path) -> None:
    options = toy(images, "stage=last", "model.backbone.name=tiny", f"output={tmp_path / 'out'}")
    run(configure(*options))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    for again in (["seed=3"], ["stage=finetune", f"ckpt={tmp_path / 'out' / 'last' / 'best.ckpt'}"]):
        with pytest.raises(UserError, match=r"output=.*out holds a run already .*name another folder"):
            run(configure(*options, *again))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


@pytest.mark.usefixtures("tiny")
def test_an_experiment_serves_one_stage_as_well_as_both(images: Path, tmp_path: Path) -> None:
    options = ["experiment=quick", "model.backbone.name=tiny", *FINETUNE]
    run(configure(*toy(images, "stage=last", f"output={tmp_path / 'a'}", *options)))
    start = f"ckpt={tmp_path / 'a' / 'last' / 'best.ckpt'}"
    run(configure(*toy(images, "stage=finetune", start, f"output={tmp_path / 'b'}", *options)))
    assert load_model(tmp_path / "b" / "finetune" / "best.ckpt").classes == ["blue", "green", "red"]


def test_too_many_rows_for_the_convex_solver(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bcnn.training.plan.MAX_ENTRIES", 100)
    with pytest.raises(UserError, match=r"12 .* more than the 10 .* choose last=sgd, .* at most 8 num"):
        run(configure(*toy(images, f"output={tmp_path}")))
    short = ["model/pooling=compact", "model.pooling.width=8", "stage=last"]
    run(configure(*toy(images, f"output={tmp_path}", *short)))


def test_no_room_for_descriptors(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 2_000_000  # room for small files

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Full)
    with pytest.raises(UserError, match=r"no room for descriptors .* BCNN_STORES .* last\.store=false"):
        run(configure(*toy(images, f"output={tmp_path}")))
