"""Both stages from a configuration, in this process, at toy size."""

import math
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import (
    FINETUNE,
    SMALL,
    configure,
    folder_data,
    quiet_trainer,
    read_csv,
    run,
    toy,
    weights,
    write_images,
)
from hydra.utils import instantiate
from PIL import Image

from bcnn.evaluation.results import open_split
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model, save_model
from bcnn.models.third_party import to_original
from bcnn.training.module import BCNNModule
from bcnn.training.network import build_model
from bcnn.utils.errors import UserError


def rows(text: str) -> list[list[str]]:
    """The cells of the table's rows: a λ, the start, or an epoch."""
    cells = (line.split() for line in text.splitlines())
    return [row for row in cells if row and re.fullmatch(r"start|\d+/\d+|0\.0001|1e-0\d", row[0])]


@pytest.mark.figures
@pytest.mark.slow
def test_both_stages_train_test_and_hand_over(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = run(images, tmp_path / "out", *FINETUNE)
    assert figure >= 0.8  # three flat colours are easy
    printed = capsys.readouterr().out
    *λs, start, epoch = rows(printed)
    path = [1e-4, 1e-5, 1e-6, 1e-7]  # as far as the loss falls
    assert len(λs) > 1 and [float(row[0]) for row in λs] == path[: len(λs)]
    logged = read_csv(tmp_path / "out" / "last" / "metrics.csv")
    losses = [float(row["val_loss"]) for row in logged if row["val_loss"]]
    assert [float(row[2]) for row in λs] == pytest.approx(losses, rel=1e-2)
    bests = [loss < min(losses[:i], default=math.inf) for i, loss in enumerate(losses)]
    assert [row[-3:] == ["best", "so", "far"] for row in λs] == bests
    assert (start[0], epoch[0], epoch[3][-1]) == ("start", "1/1", "%")
    for heading, figures in (("validation top-1", 2), ("test top-1", 2)):
        line = next(line for line in printed.splitlines() if line.startswith(heading))
        assert line.count("%") == figures
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>From last to finetune</h2>" in report and "12 images to train on" in report
    log = (tmp_path / "out" / "train.log").read_text()
    assert log.partition("\n")[2] == printed
    for stage in ("last", "finetune"):
        model = load_model(tmp_path / "out" / stage / "best.ckpt")
        assert (model.classes, model.preprocessing.size) == (["blue", "green", "red"], 32)
        assert (tmp_path / "out" / stage / "curves.png").stat().st_size > 5_000
        assert (tmp_path / "out" / stage / "metrics.csv").is_file()
    assert str(tmp_path / "out" / "finetune" / "best.ckpt") in printed


@pytest.mark.usefixtures("tiny")
def test_the_log_and_the_report_count_groups(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "out", SMALL, "stage=last", "data.group='[0-9]'")
    numbers = "12 images of 4 groups to train on, 6 images of 2 groups to validate, 6 images of 2 gr"
    for name in ("train.log", "report.html"):
        assert numbers in (tmp_path / "out" / name).read_text()


@pytest.mark.slow
def test_first_validation_of_finetune_is_the_last_of_last_in_float32(
    images: Path, tmp_path: Path
) -> None:
    def value(folder: str, row: int, key: str) -> str:
        rows = read_csv(tmp_path / folder / "metrics.csv")
        return [entry[key] for entry in rows if entry.get(key)][row]

    last = ["last=sgd", "last.store=false", "last.epochs=1"]
    run(images, tmp_path / "a", "stage=last", *last)
    finetune = [f"ckpt={tmp_path}/a/last/best.ckpt", "finetune.epochs=1", "finetune.batch_size=64"]
    run(images, tmp_path / "b", "stage=finetune", *finetune)
    for key in ("val_loss", "val_top1"):
        last_of_last = float(value("a/last", -1, key))
        assert float(value("b/finetune", 0, key)) == pytest.approx(last_of_last, rel=1e-6)


@pytest.mark.usefixtures("tiny")
def test_finetune_after_last_alone_is_the_second_half_of_both(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(images, Path("both"), SMALL, *FINETUNE)
    run(images, Path("alone"), "stage=finetune", *FINETUNE, "ckpt=both/last/best.ckpt")
    reports = [(tmp_path / name / "report.html").read_text() for name in ("both", "alone")]
    changes = [report.split("<h2>From last to finetune</h2>")[1].split("<h2>")[0] for report in reports]
    assert changes[0] == changes[1]
    both = weights(tmp_path / "both" / "finetune" / "best.ckpt")
    alone = weights(tmp_path / "alone" / "finetune" / "best.ckpt")
    assert all(torch.equal(both[key], alone[key]) for key in both)


@pytest.mark.usefixtures("tiny")
def test_without_validation_the_last_λ_is_kept(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [SMALL, "stage=last", "last.folds=null", "data.val_fraction=0"]
    assert math.isnan(run(images, tmp_path, *options))
    assert (tmp_path / "last" / "last.ckpt").is_file()
    printed = capsys.readouterr().out
    assert "test top-1" in printed
    assert re.search(r"1e-07 +\S+ +– +– +\d", printed) and "best so far" not in printed


@pytest.mark.usefixtures("tiny")
def test_without_a_test_folder_validation_alone_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images" / "train", 6)
    run(tmp_path / "images", tmp_path, SMALL, "stage=last")
    printed = capsys.readouterr().out
    assert "no test images" in printed and "validation top-1" in printed
    assert "test top-1" not in printed


@pytest.mark.slow
def test_finetune_from_the_state_dict_of_the_original(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "a", "stage=last")
    trained = load_model(tmp_path / "a" / "last" / "best.ckpt")
    torch.save(to_original(trained), tmp_path / "bcnn_lastlayer.pth")
    options = ["stage=finetune", "finetune.epochs=1", f"ckpt={tmp_path / 'bcnn_lastlayer.pth'}"]
    assert run(images, tmp_path, *options) >= 0.8


def finetune(images: Path, tmp_path: Path, *options: str) -> None:
    """Finetune by the original's optimizer, from a new stage `last`."""
    run(images, tmp_path / "start", "stage=last")
    start = f"ckpt={tmp_path / 'start' / 'last' / 'best.ckpt'}"
    short = ["finetune=original", "finetune.epochs=2", "finetune.batch_size=6"]
    run(images, tmp_path, "stage=finetune", start, *short, *options)


@pytest.mark.slow
def test_a_finetune_that_collapses_says_so_keeps_its_start_and_fails(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"worse than it started .* try finetune.optimizer.lr=0.3"):
        finetune(images, tmp_path, "finetune.optimizer.lr=3", "finetune.epochs=1")
    printed = capsys.readouterr().out
    start = tmp_path / "start" / "last" / "best.ckpt"
    assert f"keeping {start}" in printed and f"\ncheckpoint: {start}" in printed
    report = (tmp_path / "report.html").read_text()
    assert "<dt>what went wrong</dt>" in report and "<h2>From last" not in report
    assert "<dd>CPU with 1 thread, 32-true" in report


@pytest.mark.slow
def test_a_finetune_is_judged_by_its_accuracy_not_its_confidence(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsure = ["finetune.centering=true", "finetune.polyak=2", "finetune.loss.label_smoothing=0.5"]
    finetune(images, tmp_path, *unsure)
    logged = [row for row in read_csv(tmp_path / "finetune" / "metrics.csv") if row["val_loss"]]
    start, *epochs = ((float(row["val_top1"]), float(row["val_loss"])) for row in logged)
    assert all(top1 >= start[0] and loss > start[1] for top1, loss in epochs)
    assert epochs[0][1] < epochs[1][1]  # nor does the better loss of an earlier epoch count
    assert f"\ncheckpoint: {tmp_path / 'finetune' / 'last.ckpt'}" in capsys.readouterr().out
    module = BCNNModule.load_from_checkpoint(tmp_path / "finetune" / "last.ckpt")
    kept = quiet_trainer().validate(module, folder_data(images).val_dataloader(), verbose=False)[0]
    assert kept["val_loss"] == pytest.approx(epochs[1][1], rel=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_training_and_leaves_no_such_weights(
    images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"stage finetune: the (loss is|weights are) not finite after"):
        finetune(images, tmp_path, "finetune.optimizer.lr=1e30")
    assert not (tmp_path / "finetune" / "best.ckpt").exists()
    # The report is on what it started from.
    assert (tmp_path / "report.html").is_file()


@pytest.mark.usefixtures("tiny")
def test_without_validation_the_last_finite_weights_are_kept(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bcnn.training.checkpointing.EVERY", 0)
    ruin = "+callbacks.ruin._target_=test_run.Ruin"
    options = [SMALL, "stage=last", "last=sgd", "last.epochs=4", "data.val_fraction=0", ruin]
    with pytest.raises(UserError, match="not finite"):
        run(images, tmp_path / "a", *options)
    state = weights(tmp_path / "a" / "last" / "last.ckpt")
    assert all(each.isfinite().all() for each in state.values())
    assert torch.load(tmp_path / "a" / "last" / "last.ckpt", weights_only=True)["epoch"] == 1


class Ruin(L.Callback):
    """Puts a weight out of range in the third epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.current_epoch == 2:
            pl_module.model.head.weight.data[0, 0] = math.inf  # type: ignore[union-attr]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["stage=last", "last=sgd"], "set a smaller last.batch_size"),
        (FINETUNE, "set a smaller finetune.batch_size, or finetune.grad_checkpointing=true"),
    ],
)
def test_too_little_memory(images: Path, tmp_path: Path, options: list[str], advice: str) -> None:
    full = "+callbacks.full._target_=test_run.Full"
    with pytest.raises(UserError, match=f"too little memory: {advice}$"):
        run(images, tmp_path / "out", SMALL, *options, full)


class Full(L.Callback):
    """Has no memory for a step."""

    def on_train_batch_end(self, *_: object) -> None:
        raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["stage=finetune", "ckpt=missing.ckpt"], "missing.ckpt"),
        (["stage=last", "model.weights=missing.pth"], "missing.pth"),
        (["data.val_fraction=1"], "data.val_fraction=1"),
        (["model.pooling.name=mean"], "mean"),
    ],
)
def test_mistakes_are_one_sentence(
    images: Path, tmp_path: Path, options: list[str], sentence: str
) -> None:
    with pytest.raises((UserError, OSError), match=sentence):
        run(images, tmp_path / "out", *options)
    assert not (tmp_path / "out" / "run.yaml").exists()


@pytest.mark.parametrize(("chosen", "taken"), [("null", "bicubic"), ("bilinear", "bilinear")])
def test_images_are_resized_as_the_weights_were_trained_unless_an_option_says_how(
    tiny: BCNN, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, taken: str
) -> None:
    monkeypatch.setattr(type(tiny.backbone), "interpolation", "bicubic")
    file = tmp_path / "model.safetensors"

    def build(interpolation: str, *start: str) -> str:
        cfg = configure(*toy(images, SMALL, f"data.interpolation={interpolation}", *start))
        data = instantiate(cfg.data)
        data.setup()
        model = build_model(cfg, data)
        assert model.preprocessing == data.preprocessing
        save_model(model, file)
        return model.preprocessing.interpolation

    assert build(chosen) == taken
    assert open_split(file, images, "all")[0].preprocessing.interpolation == taken
    assert build("null", f"ckpt={file}") == taken
    other = "bilinear" if taken == "bicubic" else "bicubic"
    assert build(other, f"ckpt={file}") == other


def test_wide_images_are_squashed_unless_an_option_or_a_checkpoint_says_how(
    tiny: BCNN, images: Path, tmp_path: Path
) -> None:
    def build(*options: str) -> str:
        cfg = configure(*toy(images, SMALL, *options))
        data = instantiate(cfg.data)
        data.setup()
        return build_model(cfg, data).preprocessing.resize

    assert build() == "keep"
    save_model(tiny, tmp_path / "model.safetensors")
    for path in images.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((80, 44)).save(path)
    assert build() == "squash"
    assert build("data.resize=keep") == build(f"ckpt={tmp_path / 'model.safetensors'}") == "keep"


@pytest.mark.usefixtures("tiny")
def test_a_checkpoint_of_other_classes(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, SMALL, "stage=last")
    options = ["stage=finetune", f"ckpt={tmp_path / 'last' / 'best.ckpt'}"]
    for split in ("train", "test"):
        (images / split / "red").rename(images / split / "rose")
    with pytest.raises(UserError, match=r"new: rose; missing: red"):
        run(images, tmp_path / "again", *options)


@pytest.mark.usefixtures("tiny")
def test_classes_weigh_the_same_where_that_is_asked_for(images: Path, tmp_path: Path) -> None:
    for index in range(1, 5):
        (images / "train" / "red" / f"{index}.png").unlink()
    biases = []
    for i, option in enumerate(
        ["last.class_weights=false", "last.class_weights=true", "data.sampler=balanced"]
    ):
        options = [SMALL, "stage=last", "data.val_fraction=0", "last.l2=[10]", option]
        run(images, tmp_path / str(i), *options)
        biases.append(load_model(tmp_path / str(i) / "last" / "last.ckpt").head.bias.detach())
    # So strong an l2 leaves the bias alone to tell the classes apart, by how much they weigh.
    plain, weighted, drawn = (bias.softmax(0) for bias in biases)
    torch.testing.assert_close(plain, torch.tensor([6 / 14, 6 / 14, 2 / 14]), rtol=0, atol=0.01)
    torch.testing.assert_close(weighted, torch.full((3,), 1 / 3), rtol=0, atol=0.01)
    torch.testing.assert_close(drawn, weighted, rtol=0, atol=1e-4)
