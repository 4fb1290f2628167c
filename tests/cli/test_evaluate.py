"""`bcnn evaluate`: from a checkpoint and a folder to figures and files."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from bcnn.cli.evaluate import USAGE, Options, main
from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.data.transforms import Preprocessing
from bcnn.evaluation.heatmap import Box
from bcnn.evaluation.inference import predict_split
from bcnn.evaluation.predictions import Predictions
from bcnn.evaluation.report import MISTAKES, THUMBNAIL
from bcnn.evaluation.results import evidence_pictures, kept_predictions, logged_stages
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import save_model
from bcnn.models.third_party import to_original
from bcnn.utils.options import command


@pytest.fixture
def model() -> BCNN:
    """Random weights that disagree about the toy images, with an order of classes of their own."""
    torch.manual_seed(0)
    model = BCNN(["red", "blue", "green"], Preprocessing(32))
    model.backbone.set_normalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.nn.init.normal_(model.head.weight, std=30)
    return model


@pytest.fixture
def checkpoint(model: BCNN, tmp_path: Path) -> Path:
    """As Lightning writes it."""
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    about = {**model.description(), "stage": "last"}
    path = tmp_path / "run" / "last" / "best.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": state, "hyper_parameters": about}, path)
    return path


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bcnn.utils.device.fastest_precision", lambda *_: "32-true")


def evaluate(*words: str) -> int:
    return command(Options, main, USAGE, words)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_files_agree_with_each_other_and_with_the_model(
    checkpoint: Path, model: BCNN, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(images / "test", 4, seed=5)
    out = tmp_path / "out"
    assert evaluate(f"ckpt={checkpoint}", f"data={images}", f"output={out}") == 0
    table = rows(out / "predictions.csv")
    figures = json.loads((out / "figures.json").read_text())
    saved = np.load(out / "predictions.npz")
    assert len(table) == figures["images"] == len(saved["paths"]) == 12
    assert all(Path(row["path"]).parent.name == row["class"] for row in table)
    correct = [row["class"] == row["predicted"] for row in table]
    assert 0 < sum(correct) < 12
    assert figures["top1"]["value"] == pytest.approx(np.mean(correct))
    assert saved["classes"].tolist() == model.classes
    assert (saved["probabilities"].argmax(1) == saved["labels"]).tolist() == correct
    recall = {row["class"]: float(row["recall"]) for row in rows(out / "classes.csv")}
    assert np.mean(list(recall.values())) == pytest.approx(figures["macro_top1"]["value"], abs=1e-4)
    printed = capsys.readouterr().out
    assert f"{np.mean(correct):.1%}" in printed and "95 % interval" in printed
    assert str(out / "report.html") in printed

    data = FineGrainedDataModule(images, size=32, num_workers=0)
    data.setup()
    batch = next(iter(data.evaluation_dataloader([(path, 0) for path in saved["paths"].tolist()])))
    with torch.no_grad():
        expected = model.eval()(batch[0]).softmax(1)
    torch.testing.assert_close(torch.from_numpy(saved["probabilities"]), expected)


def test_mirror_takes_the_mean_logits_of_both(
    checkpoint: Path, model: BCNN, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(images / "test", 2, seed=5)
    out = tmp_path / "out"
    words = [f"ckpt={checkpoint}", f"data={images}", f"output={out}", "mirror=true"]
    assert evaluate(*words) == 0
    saved = np.load(out / "predictions.npz")
    data = FineGrainedDataModule(images, size=32, num_workers=0)
    data.setup()
    batch = next(iter(data.evaluation_dataloader([(path, 0) for path in saved["paths"].tolist()])))
    with torch.no_grad():
        expected = ((model.eval()(batch[0]) + model(batch[0].flip(-1))) / 2).softmax(1)
    torch.testing.assert_close(torch.from_numpy(saved["probabilities"]), expected)
    text = (out / "report.html").read_text()
    assert text.count("32 px (keep, crop_pct 1, bilinear)") == 2  # in the card and the configuration
    assert "mirror: True" in text and f"torch {torch.__version__.split('+')[0]}" in text


@pytest.mark.slow
def test_the_original_pth_says_the_same(
    checkpoint: Path, model: BCNN, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bcnn.evaluation.results.evidence_pictures", lambda *_: {})  # slow at 448 px
    order = [1, 2, 0]  # it names no classes: they are the folder's, in their order
    model.head.weight.data = model.head.weight.data[order]
    model.head.bias.data = model.head.bias.data[order]
    torch.save(to_original(model), tmp_path / "bcnn.pth")
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["preprocessing"]["size"] = 448  # the original's
    torch.save(content, checkpoint)
    (images / "val" / "red").mkdir(parents=True)
    (images / "test" / "red" / "0.png").rename(images / "val" / "red" / "0.png")
    found = []
    for path in (checkpoint, tmp_path / "bcnn.pth"):
        out = tmp_path / path.stem
        assert evaluate(f"ckpt={path}", f"data={images}", "split=val", f"output={out}") == 0
        saved = np.load(out / "predictions.npz")
        found.append(dict(zip(saved["classes"], saved["probabilities"][0], strict=True)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0]["red"] not in (found[0]["blue"], found[0]["green"])


def test_descriptors_predict_what_their_images_do(model: BCNN, images: Path) -> None:
    data = FineGrainedDataModule(images, size=32, num_workers=0)
    data.setup()
    loader = data.test_dataloader()
    by_images = predict_split(model, data.test, loader, "32-true")
    with torch.no_grad():
        descriptors = [(model.descriptor(batch), labels) for batch, labels in loader]
    by_descriptors = predict_split(model, data.test, descriptors, "32-true")
    torch.testing.assert_close(by_images.probabilities, by_descriptors.probabilities)
    assert by_images.paths == [path for path, _ in data.test]


def test_evidence_of_mistakes_is_the_logits_of_both_classes(
    model: BCNN, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def note(picture: Image.Image, box: Box, shares: np.ndarray, limit: float) -> Image.Image:
        assert max(picture.size) <= THUMBNAIL and abs(shares).max() <= limit
        drawn.append(float(shares.sum()))
        return picture

    monkeypatch.setattr("bcnn.evaluation.results.overlay", note)
    data = FineGrainedDataModule(images, size=32, num_workers=0)
    data.setup()
    predictions = predict_split(model, data.test, data.test_dataloader(), "32-true")
    mistakes = predictions.confident_mistakes(MISTAKES)
    assert mistakes and list(evidence_pictures(model, predictions)) == mistakes
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch, _ in data.test_dataloader()])
    called, truth = predictions.predicted[mistakes], predictions.labels[mistakes]
    expected = torch.stack([logits[mistakes, called], logits[mistakes, truth]], dim=1)
    assert drawn == pytest.approx(expected.flatten().tolist(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("split", "count"), [("train", 18), ("all", 24)])
def test_other_splits(checkpoint: Path, images: Path, tmp_path: Path, split: str, count: int) -> None:
    words = (f"ckpt={checkpoint}", f"data={images}", f"split={split}", f"output={tmp_path / 'out'}")
    assert evaluate(*words) == 0
    assert len(rows(tmp_path / "out" / "predictions.csv")) == count


@pytest.fixture
def odd_folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Labelled images that nobody could train on."""
    folder = tmp_path / "odd"
    if request.param == "test alone":
        write_images(folder / "Testing", 2)
    elif request.param == "one image a class":
        write_images(folder, 1)
    elif request.param == "one class":
        write_images(folder, 3)
        shutil.rmtree(folder / "red")
        shutil.rmtree(folder / "green")
    elif request.param == "one broken":
        write_images(folder, 2)
        (folder / "red" / "0.png").write_bytes(b"broken")
    elif request.param == "list of test lines":
        write_images(folder, 1)
        lines = [f"{path},{path.parent.name},test" for path in sorted(folder.rglob("*.png"))]
        folder = tmp_path / "odd.csv"
        folder.write_text("\n".join(["path,label,split", *lines]))
    return folder


@pytest.mark.parametrize(
    ("odd_folder", "count"),
    [
        ("test alone", 6),
        ("one image a class", 3),
        ("one class", 3),
        ("one broken", 5),
        ("list of test lines", 3),
    ],
    indirect=["odd_folder"],
)
@pytest.mark.parametrize("split", ["test", "all"])
def test_whatever_labelled_images_there_are(
    checkpoint: Path,
    odd_folder: Path,
    count: int,
    split: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (f"ckpt={checkpoint}", f"data={odd_folder}", f"split={split}", f"output={tmp_path / 'out'}")
    assert evaluate(*words) == 0
    assert len(rows(tmp_path / "out" / "predictions.csv")) == count
    printed = capsys.readouterr().out
    assert ("left out 1 images that cannot be decoded" in printed) == (count == 5)
    assert "the checkpoint does not record what it was trained on" in printed
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_a_list_is_evaluated_as_its_folder_is(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    lines = [f"{path},{path.parent.name},{path.parts[-3]}" for path in sorted(images.glob("*/*/*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    figures = []
    for data in (images, tmp_path / "labels.csv"):
        output = tmp_path / data.name
        assert evaluate(f"ckpt={checkpoint}", f"data={data}", f"output={output}-figures") == 0
        figures.append((tmp_path / f"{data.name}-figures" / "figures.json").read_text())
    assert figures[0] == figures[1]


def test_names_are_printed_whole_whatever_is_in_them(
    checkpoint: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"red": "tulip [red]", "blue": "tulip [/blue]", "green": ":dog:"}
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["classes"] = list(names.values())
    torch.save(content, checkpoint)
    found = sorted(images.glob("*/*/*.png"))
    lines = [f"{path},{names[path.parent.name]},{path.parts[-3]}" for path in found]
    (tmp_path / "set [b] #2.csv").write_text("\n".join(["path,label,split", *lines]))
    assert evaluate(f"ckpt={checkpoint}", "data=set [b] #2.csv", "output=out") == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"│ {name} ") == 1 for name in names.values())
    assert "set [b] #2.csv, test: 6 images" in printed


def test_classes_that_the_model_does_not_know(
    checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        (images / split / "red").rename(images / split / "rose")
    assert evaluate(f"ckpt={checkpoint}", f"data={images}") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "does not know: rose" in error


def test_a_second_evaluation_overwrites_nothing(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"ckpt={checkpoint}", f"data={images}", f"output={tmp_path / 'out'}")
    assert evaluate(*words) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert evaluate(*words) == 1
    assert "output=" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ckpt": "missing.ckpt"}, "missing.ckpt"),
        ({"data": "nowhere"}, "nowhere"),
        ({"split": "tset"}, "test, val, train, all"),
    ],
)
def test_mistakes_are_one_sentence(
    checkpoint: Path,
    images: Path,
    options: dict[str, str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {"ckpt": checkpoint, "data": images, **options}
    assert evaluate(*(f"{name}={text}" for name, text in words.items())) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1


def test_a_folder_without_the_split(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images" / "train", 3)
    assert evaluate(f"ckpt={checkpoint}", f"data={tmp_path / 'images'}") == 1
    assert "no images for split=test" in capsys.readouterr().err


def test_logs_of_the_stages_up_to_the_checkpoint(tmp_path: Path) -> None:
    for stage in ("last", "finetune"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.csv").touch()
    names = [name for name, _ in logged_stages(tmp_path / "finetune" / "best.ckpt")]
    assert names == ["last", "finetune"]
    assert [name for name, _ in logged_stages(tmp_path / "last" / "best.ckpt")] == ["last"]
    assert logged_stages(tmp_path / "elsewhere" / "best.ckpt") == []


def test_predictions_of_a_stage_are_those_that_its_run_left(tmp_path: Path) -> None:
    last, made = tmp_path / "last", Predictions(["a"], ["x.png"], torch.tensor([0]), torch.ones(1, 1))
    assert kept_predictions(last) is None
    made.save(tmp_path / "predictions.npz")  # of a run of one stage
    found = kept_predictions(last)
    assert found and found[0] == "last" and found[1].of_same_images(made)
    (tmp_path / "finetune").mkdir()
    assert kept_predictions(last) is None  # of a run of both, these are the other's
    last.mkdir()
    for damaged in (b"", b"PK"):
        (last / "predictions.npz").write_bytes(damaged)
        assert kept_predictions(last) is None
    made.save(last / "predictions.npz")
    assert kept_predictions(last)


@pytest.mark.slow
def test_a_finetuned_checkpoint_stands_beside_what_it_began_with(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    finetuned = tmp_path / "run" / "finetune" / "best.ckpt"
    finetuned.parent.mkdir()
    shutil.copy(checkpoint, finetuned)
    before = tmp_path / "before"
    assert evaluate(f"ckpt={checkpoint}", f"data={images}", f"output={before}") == 0
    shutil.copy(before / "predictions.npz", checkpoint.parent)
    for split, shown in (("test", True), ("all", False)):
        out = tmp_path / split
        words = (f"ckpt={finetuned}", f"data={images}", f"split={split}", f"output={out}")
        assert evaluate(*words) == 0
        assert ("From last to" in (out / "report.html").read_text()) == shown


def test_an_answer_that_is_not_finite_is_a_sentence_and_no_figures(
    tiny: BCNN, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.backbone.features.weight.data.fill_(1e30)
    save_model(tiny, tmp_path / "huge.safetensors")
    words = (f"ckpt={tmp_path / 'huge.safetensors'}", f"data={images}", f"output={tmp_path / 'out'}")
    assert evaluate(*words) == 1
    said = capsys.readouterr()
    assert "test/blue/0.png: the network's answer has values that are not finite" in said.err
    assert "nan" not in said.out and not (tmp_path / "out").exists()
