"""`bcnn evaluate`: from a checkpoint and labelled images to metrics and files."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Bcnn, read_csv, save_checkpoint, set_up, write_images
from PIL import Image

from bcnn.data.image_io import load_image
from bcnn.evaluation.inference import infer
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import save_model
from bcnn.utils.errors import Interruption


@pytest.fixture
def model(tiny: BCNN) -> BCNN:
    """Disagrees about the toy images, with an order of classes of its own."""
    tiny.classes = ["red", "blue", "green"]
    torch.manual_seed(3)
    torch.nn.init.normal_(tiny.backbone.features.weight)
    tiny.head.weight.data.mul_(30)
    return tiny


@pytest.fixture
def ckpt(model: BCNN, tmp_path: Path) -> Path:
    return save_checkpoint(model, tmp_path / "run" / "last" / "best.ckpt")


@pytest.mark.parametrize("mirror", [False, True])
def test_files_agree_with_each_other_and_with_the_model(
    bcnn: Bcnn, ckpt: Path, model: BCNN, images: Path, tmp_path: Path, mirror: bool
) -> None:
    write_images(images / "test", 4, seed=5)
    out = tmp_path / "out"
    outcome = bcnn("evaluate", ckpt, images, "--output", out, *["--mirror"] * mirror)
    assert outcome.code == 0, outcome.err
    table = read_csv(out / "predictions.csv")
    saved = np.load(out / "predictions.npz")
    assert len(table) == len(saved["paths"]) == 12 and saved["classes"].tolist() == model.classes
    assert all(Path(row["image"]).parent.name == row["class"] for row in table)
    correct = [row["class"] == row["top1"] for row in table]
    assert 0 < sum(correct) < 12
    assert (saved["probabilities"].argmax(1) == saved["labels"]).tolist() == correct
    assert f"{np.mean(correct):.1%}" in outcome.out and "95 % interval" in outcome.out
    assert "32 px (keep, crop_pct 1, bilinear)" in (out / "report.html").read_text()
    samples = [(path, 0) for path in saved["paths"].tolist()]
    ((pixels, _),) = set_up(images).evaluation_dataloader(samples)
    with torch.no_grad():
        logits = (model(pixels) + model(pixels.flip(-1))) / 2 if mirror else model(pixels)
    torch.testing.assert_close(torch.from_numpy(saved["probabilities"]), logits.softmax(1))


@pytest.mark.parametrize("mirror", [False, True])
def test_images_of_no_known_class_are_told_from_the_others(
    bcnn: Bcnn, calibrated: BCNN, images: Path, tmp_path: Path, mirror: bool
) -> None:
    generator = np.random.default_rng(0)
    for path in images.glob("test/*/*"):  # as noisy as what the model was calibrated with
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    (tmp_path / "unknown").mkdir()
    for value in range(0, 250, 10):
        image = Image.new("RGB", (32, 32), (value, 255 - value, 90))
        image.paste("navy", (0, 0, 13, 22))  # unlike its mirror image
        image.save(tmp_path / "unknown" / f"{value}.png")
    save_model(calibrated, tmp_path / "model.safetensors")
    words = ["evaluate", tmp_path / "model.safetensors", images, "--unknown", tmp_path / "unknown"]
    outcome = bcnn(*words, "--output", tmp_path / "out", *["--mirror"] * mirror)
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    known = torch.from_numpy(np.load(tmp_path / "out" / "predictions.npz")["novelty"])
    paths = sorted((tmp_path / "unknown").iterdir())
    pixels = torch.stack([calibrated.preprocessing.evaluation()(load_image(path)) for path in paths])
    unknown = infer(calibrated, pixels, "32-true", mirror).novelty
    auroc = (unknown[:, None] > known).double().mean()
    assert found["unknown"]["auroc"] == pytest.approx(float(auroc), abs=1e-6)
    assert found["unknown"]["fpr95"] == float((unknown <= np.quantile(known, 0.95)).double().mean())
    assert found["unknown"]["accepted"]["value"] == float((unknown <= 0).double().mean())
    table = read_csv(tmp_path / "out" / "predictions.csv")
    held = np.mean([row["class"] in row["prediction_set"].split("; ") for row in table])
    assert found["coverage"]["value"] == pytest.approx(held)
    sizes = [float(row["set_size"]) for row in read_csv(tmp_path / "out" / "classes.csv")]
    assert found["set_size"]["value"] == pytest.approx(np.mean(sizes))
    assert "Images of no known class" in (tmp_path / "out" / "report.html").read_text()


def test_rows_have_the_sets_and_marks_of_predict(
    bcnn: Bcnn, calibrated: BCNN, images: Path, tmp_path: Path
) -> None:
    ckpt = tmp_path / "model.safetensors"
    save_model(calibrated, ckpt)
    for index, value in enumerate(range(0, 250, 50)):
        Image.new("RGB", (32, 32), (value, 255 - value, 90)).save(images / "test/red" / f"{index}.png")
    assert bcnn("evaluate", ckpt, images, "--output", tmp_path / "out").code == 0
    evaluated = {row["image"]: row for row in read_csv(tmp_path / "out" / "predictions.csv")}
    words = ["predict", ckpt, images / "test", "--format", "csv"]
    predicted = {row["image"]: row for row in csv.DictReader(bcnn(*words).out.splitlines())}
    assert evaluated.keys() == predicted.keys()
    for path, row in predicted.items():
        assert row["top1"] == evaluated[path]["top1"]
        for column in ("prediction_set", "unlike_training"):
            assert row[column] == evaluated[path][column]
    assert {row["unlike_training"] for row in predicted.values()} == {"yes", "no"}
    assert max(len(row["prediction_set"].split("; ")) for row in predicted.values()) > 1


def test_a_model_that_is_not_calibrated_knows_nothing_of_unknown_images(
    bcnn: Bcnn, ckpt: Path, images: Path
) -> None:
    outcome = bcnn("evaluate", ckpt, images, "--unknown", images)
    assert outcome.code == 1 and "--unknown: this model is not calibrated" in outcome.err


def test_images_that_nobody_could_train_on_can_be_evaluated(
    bcnn: Bcnn, ckpt: Path, tmp_path: Path
) -> None:
    """Of test alone, without a class of the model, and one of them broken."""
    write_images(tmp_path / "Testing", 2)
    shutil.rmtree(tmp_path / "Testing" / "green")
    (tmp_path / "Testing" / "red" / "0.png").write_bytes(b"broken")
    assert bcnn("evaluate", ckpt, tmp_path, "--output", tmp_path / "out").code == 0
    assert len(read_csv(tmp_path / "out" / "predictions.csv")) == 3


def png(image: Image.Image, path: Path) -> None:
    image.save(path.with_suffix(".png"), optimize=True)


def quality_60(image: Image.Image, path: Path) -> None:
    image.save(path.with_suffix(".jpg"), quality=60)


def smaller(image: Image.Image, path: Path) -> None:
    image.resize([round(0.9 * edge) for edge in image.size]).save(path.with_suffix(".png"))


@pytest.mark.parametrize("save_again", [png, quality_60, smaller])
def test_training_images_are_left_out_if_they_were_saved_again(
    bcnn: Bcnn, model: BCNN, tmp_path: Path, save_again: Callable[[Image.Image, Path], None]
) -> None:
    write_images(tmp_path / "images", 12)
    data = set_up(tmp_path / "images")
    model.split = data.split
    ckpt = save_checkpoint(model, tmp_path / "best.ckpt")
    again, all_in_test = tmp_path / "again", tmp_path / "all" / "test"
    for path, label in (*data.train, *data.val, *data.test):
        with Image.open(path) as image:
            for folder in (again, all_in_test):
                (folder / data.classes[label]).mkdir(parents=True, exist_ok=True)
                save_again(image, folder / data.classes[label] / Path(path).name)
    tested = {(data.classes[label], Path(path).stem) for path, label in data.test}
    for folder in (again, all_in_test.parent):
        out = tmp_path / f"of-{folder.name}"
        outcome = bcnn("evaluate", ckpt, folder, "--output", out)
        assert outcome.code == 0 and "36 of 36 images look the same as some that the" in outcome.out
        found = [Path(row["image"]) for row in read_csv(out / "predictions.csv")]
        assert {(path.parent.name, path.stem) for path in found} == tested
    assert f"{len(data.train)} of 36 images in test were trained on: left out" in outcome.out
    assert f"{len(data.val)} of 36 images in test were validated on: left out" in outcome.out


def test_a_warning_comes_before_the_figures_where_no_image_is_recorded(
    bcnn: Bcnn, model: BCNN, images: Path, tmp_path: Path
) -> None:
    model.split = set_up(images).split
    write_images(tmp_path / "others", 2, seed=9)
    outcome = bcnn("evaluate", save_checkpoint(model, tmp_path / "best.ckpt"), tmp_path / "others")
    assert outcome.code == 0 and "the checkpoint records none of these images" in outcome.err


def test_a_second_evaluation_overwrites_nothing(
    bcnn: Bcnn, ckpt: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "figures.json").write_text("precious")
    outcome = bcnn("evaluate", ckpt, images, "--output", tmp_path)
    assert outcome.code == 1 and "exists: name a new folder" in outcome.err
    assert (tmp_path / "figures.json").read_text() == "precious"


def test_an_interrupted_evaluation_leaves_nothing_and_can_be_repeated(
    bcnn: Bcnn, ckpt: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results" / "out"
    out.mkdir(parents=True)  # an empty one
    with monkeypatch.context() as patch:
        patch.setattr("bcnn.evaluation.results.write_report", Mock(side_effect=Interruption(2)))
        assert bcnn("evaluate", ckpt, images, "--output", out).code == 130
    assert list(out.parent.iterdir()) == []
    assert bcnn("evaluate", ckpt, images, "--output", out).code == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    files = {"classes.csv", "figures.json", "predictions.csv", "predictions.npz", "report.html"}
    assert {path.name for path in out.iterdir()} == files


def test_no_images_and_unknown_classes_are_errors(bcnn: Bcnn, ckpt: Path, images: Path) -> None:
    shutil.rmtree(images / "test")
    outcome = bcnn("evaluate", ckpt, images)
    assert outcome.code == 1 and "has no images for split=test" in outcome.err
    (images / "train" / "red").rename(images / "train" / "rose")
    outcome = bcnn("evaluate", ckpt, images, "--split", "train")
    assert outcome.code == 1 and "does not know: rose" in outcome.err


def test_a_finetuned_checkpoint_stands_beside_the_one_it_began_with(
    bcnn: Bcnn, ckpt: Path, images: Path, tmp_path: Path
) -> None:
    finetuned = tmp_path / "run" / "finetune" / "best.ckpt"
    finetuned.parent.mkdir()
    shutil.copy(ckpt, finetuned)
    assert bcnn("evaluate", ckpt, images, "--output", tmp_path / "before").code == 0
    shutil.copy(tmp_path / "before" / "predictions.npz", ckpt.parent)
    for split, count in (("test", 6), ("all", 24)):
        out = tmp_path / split
        assert bcnn("evaluate", finetuned, images, "--split", split, "--output", out).code == 0
        assert len(read_csv(out / "predictions.csv")) == count
        assert ("From last to" in (out / "report.html").read_text()) == (split == "test")
