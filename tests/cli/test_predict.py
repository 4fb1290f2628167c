"""`bcnn predict`: the images that it finds, the rows that it writes, its errors."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from conftest import ROOT, Bcnn, write_images
from PIL import Image, ImageOps

from bcnn.evaluation.writers import Prediction
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import save_model


@pytest.fixture
def ckpt(tiny: BCNN, tmp_path: Path) -> Path:
    torch.nn.init.normal_(tiny.backbone.features.weight)  # no image is all zeros to it
    tiny.head.weight.data.mul_(10)
    tiny.classes = ["blue", "green", "red, or so"]
    save_model(tiny, tmp_path / "best.safetensors")
    return tmp_path / "best.safetensors"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with photos/{blue,green,red}/{0,1}.png and a text in it."""
    write_images(tmp_path / "photos", 2)
    (tmp_path / "photos" / "notes.txt").write_text("not an image, and not named like one")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def jsonl(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("words", [["photos/blue", "photos/gr*/0.png"], ["-"]])
def test_folders_patterns_and_a_list(
    bcnn: Bcnn, ckpt: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    paths = ["photos/blue/0.png", "photos/blue/1.png", "photos/green/0.png"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(paths).encode())))
    outcome = bcnn("predict", ckpt, "--format", "jsonl", *words)
    assert outcome.code == 0 and [row["image"] for row in jsonl(outcome.out)] == paths


def test_probabilities_are_the_models_in_every_format(
    bcnn: Bcnn, ckpt: Path, tiny: BCNN, photos: Path
) -> None:
    path = "photos/red/0.png"
    expected = tiny.predict(path)[0].sort(descending=True)
    classes = [tiny.classes[k] for k in expected.indices]
    (row,) = jsonl(bcnn("predict", ckpt, path, "--format", "jsonl").out)
    assert [entry["class"] for entry in row["predictions"]] == classes  # 3 classes, though the top 5
    values = torch.tensor([entry["probability"] for entry in row["predictions"]])
    torch.testing.assert_close(values, expected.values, atol=1e-5, rtol=0)

    _, cells = csv.reader(bcnn("predict", ckpt, path, "--format", "csv", "--top-k", 2).out.splitlines())
    assert [*cells[:2], cells[5], cells[7]] == [path, *classes[:2], ""]
    assert float(cells[2]) == pytest.approx(values[0].item(), abs=1e-5)

    heading, line = bcnn("predict", ckpt, path, "--top-k", "1").out.splitlines()
    assert line.startswith(path) and f"{values[0]:.1%}" in line
    assert line[heading.index("class") :].startswith(classes[0])


@pytest.fixture
def two(calibrated: BCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A calibrated checkpoint, an image like the training images, and one unlike them."""
    monkeypatch.chdir(tmp_path)
    save_model(calibrated, tmp_path / "best.safetensors")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save("like.png")
    Image.new("RGB", (32, 32), "navy").save("unlike.png")
    return ["best.safetensors", "like.png", "unlike.png"]


def test_the_suffix_of_the_output_names_its_format(bcnn: Bcnn, two: list[str]) -> None:
    for name, form in {"rows.CSV": "csv", "rows.jsonl": "jsonl", "rows.txt": "table"}.items():
        assert bcnn("predict", *two, "--output", name).code == 0
        assert Path(name).read_text() == bcnn("predict", *two, "--format", form).out


@pytest.mark.parametrize("coverage", [0.5, 0.95])
def test_a_calibrated_model_gives_sets_and_marks_what_it_does_not_know(
    bcnn: Bcnn, calibrated: BCNN, two: list[str], coverage: float
) -> None:
    words = ["predict", *two, "--coverage", coverage, "--top-k", 1, "--format"]
    known, unknown = jsonl(bcnn(*words, "jsonl").out)
    assert (known["unlike_training"], unknown["unlike_training"]) == (False, True)
    shares = calibrated.predict("like.png")[0].tolist()
    limit = calibrated.calibration.threshold(coverage)
    expected = {name for name, p in zip(calibrated.classes, shares, strict=True) if p >= limit}
    assert {*known["prediction_set"]} == expected | {known["predictions"][0]["class"]}

    row, other = csv.DictReader(bcnn(*words, "csv").out.splitlines())
    assert row["prediction_set"] == "; ".join(known["prediction_set"])
    assert (row["unlike_training"], other["unlike_training"]) == ("no", "yes")
    assert row["top1"] == known["predictions"][0]["class"]

    outcome = bcnn(*words, "table")
    assert outcome.out.count("unlike the training images") == 1
    rest = len(known["prediction_set"]) - 1
    assert (f"and {rest} more in the set" in outcome.out) == (rest > 0)
    assert f"the true class for {100 * coverage:g} % of the images" in outcome.err
    _, task = json.loads(bcnn(*words, "labelstudio").out)
    assert "unlike the training images" in task["data"]["bcnn"]


def test_a_coverage_that_the_held_out_images_cannot_promise_is_named(
    bcnn: Bcnn, two: list[str]
) -> None:
    outcome = bcnn("predict", *two, "--coverage", 0.99, "--format", "jsonl")
    assert "40 held-out images calibrated the model, too few for --coverage 0.99" in outcome.err
    assert all(len(row["prediction_set"]) == 3 for row in jsonl(outcome.out))


def test_tasks_for_label_studio_choose_the_likeliest_class(
    bcnn: Bcnn, ckpt: Path, tiny: BCNN, photos: Path
) -> None:
    (photos / "50 % #1.png").write_bytes((photos / "red" / "0.png").read_bytes())
    (photos / "none.png").write_bytes(b"none")
    paths = ["photos/50 % #1.png", "photos/none.png"]
    outcome = bcnn("predict", ckpt, *paths, "--format", "labelstudio", "--top-k", "2")
    sure, broken = json.loads(outcome.out)
    value, index = tiny.predict(paths[0])[0].max(dim=0)
    (prediction,) = sure["predictions"]
    assert prediction["score"] == pytest.approx(value.item(), abs=1e-5)
    (choice,) = prediction["result"]
    assert choice["value"] == {"choices": [tiny.classes[index]]}
    configuration = (ROOT / "docs" / "labels.md").read_text()
    assert f'<Choices name="{choice["from_name"]}" toName="{choice["to_name"]}"' in configuration
    assert sure["data"]["bcnn"].startswith(f"{tiny.classes[index]} ")
    address = urlsplit(sure["data"]["image"])
    assert address.path == "/data/local-files/"
    assert Path("/", parse_qs(address.query)["d"][0]) == photos.resolve() / "50 % #1.png"
    assert broken["predictions"] == [] and "none.png" in broken["data"]["image"]


def test_mirror_gives_an_image_and_its_mirror_image_one_answer(
    bcnn: Bcnn, ckpt: Path, tiny: BCNN, photos: Path
) -> None:
    path = "photos/red/0.png"
    ImageOps.mirror(Image.open(path)).save("flipped.png")
    assert tiny.predict(path) != pytest.approx(tiny.predict("flipped.png"), abs=1e-4)
    words = ["predict", ckpt, path, "flipped.png", "--mirror", "--format", "jsonl"]
    first, second = (row["predictions"] for row in jsonl(bcnn(*words).out))
    for one, other in zip(first, second, strict=True):
        assert one["class"] == other["class"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_a_group_has_one_answer_by_the_mean_logit(bcnn: Bcnn, calibrated: BCNN, photos: Path) -> None:
    save_model(calibrated, Path("best.safetensors"))
    groups = {name: sorted(map(str, Path("photos").glob(f"*/{name}.png"))) for name in "01"}
    Path("photos/red/1.png").write_bytes(b"none")
    groups["1"].remove("photos/red/1.png")
    words = ["predict", "best.safetensors", "photos", "--by", "group", "--group", r"(\d)\.png"]
    outcome = bcnn(*words, "--format", "jsonl")
    first, broken, second = jsonl(outcome.out)
    assert outcome.code == 1 and "cannot read the image photos/red/1.png" in broken["error"]
    assert "holds the true class" not in outcome.err  # no sets: single images calibrate them
    for row, name in ((first, "0"), (second, "1")):
        shares = torch.stack([calibrated.predict(path)[0] for path in groups[name]])
        expected = shares.log().mean(dim=0).softmax(dim=0)  # logits but for a constant of each image
        found = {each["class"]: each["probability"] for each in row["predictions"]}
        values = [found[name] for name in calibrated.classes]
        assert row["image"] == name and values == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["prediction_set"] is None and row["unlike_training"] in (True, False)
    for form in ("csv", "table"):
        assert bcnn(*words, "--format", form).out.count("\n0") == 1

    Path("list.csv").write_text("path,group\n" + "".join(f"{p},0\n" for p in groups["0"]))
    words = ["predict", "best.safetensors", "list.csv", "--by", "group", "--format", "jsonl"]
    assert jsonl(bcnn(*words).out) == [first]
    with open("list.csv", "a") as file:
        file.write(f"{groups['0'][0]},1\n")  # an image of two groups counts in each
    assert [row["image"] for row in jsonl(bcnn(*words).out)] == ["0", "1"]
    assert jsonl(bcnn(*words).out)[0] == first


def test_the_checkpoint_comes_before_the_images(bcnn: Bcnn, two: list[str]) -> None:
    outcome = bcnn("predict", *reversed(two))
    assert outcome.code == 1 and "unlike.png is an image: name the checkpoint first" in outcome.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["photos"], "--by group: add --group REGEX, or name a list with a column group"),
        (["list.csv"], "list.csv has no column group"),
        (["photos", "--group", "plant"], "--group=plant finds no group in 6 of 6 paths"),
        (["photos", "--group", "blue", "--format", "labelstudio"], "a task for each image"),
    ],
)
def test_groups_that_are_not_known_are_an_error(
    bcnn: Bcnn, ckpt: Path, photos: Path, words: list[str], sentence: str
) -> None:
    Path("list.csv").write_text("path,label\nphotos/red/0.png,red\n")
    outcome = bcnn("predict", ckpt, *words, "--by", "group")
    assert outcome.code == 1 and sentence in outcome.err


NAMES = {"=1+1.png": "=1+1.png", "\x1b[2J.png": r"\x1b[2J.png", "a\n\u202eb.png": r"a\n\u202eb.png"}


def test_names_do_not_act_on_terminals(
    bcnn: Bcnn, ckpt: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        Path(name).write_bytes((photos / "red" / "0.png").read_bytes())
    heading, *lines = bcnn("predict", ckpt, *NAMES, "--top-k", "1").out.splitlines()
    column = heading.index("class")
    assert [line[:column].rstrip() for line in lines] == [*NAMES.values()]

    words = ["predict", ckpt, *NAMES, "--format", "csv", "--top-k", "1"]
    table = csv.DictReader(io.StringIO(bcnn(*words).out, newline=""))
    assert [row["image"] for row in table] == [*NAMES]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, *lines = bcnn(*words).out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [*NAMES.values()]


@pytest.mark.parametrize("form", ["table", "jsonl", "csv", "labelstudio"])
def test_an_image_without_an_answer_has_a_row_with_the_reason(
    bcnn: Bcnn, tiny: BCNN, photos: Path, form: str
) -> None:
    tiny.backbone.features.bias.data.zero_()
    tiny.backbone.features.weight.data.fill_(1e30)
    save_model(tiny, Path("huge.safetensors"))
    Image.new("RGB", (32, 32)).save("photos/red/black.png")  # whose maps are zero
    Path("photos/red/0.png").write_bytes((photos / "red" / "0.png").read_bytes()[:200])
    outcome = bcnn("predict", "huge.safetensors", "photos/red", "--format", form, "--top-k", "1")
    assert outcome.code == 1 and "3 images, of which 2 failed" in outcome.err
    assert outcome.out.count("not finite numbers") == 1 and "nan" not in outcome.out
    assert outcome.out.count("cannot read the image photos/red/0.png") == 1
    assert sum("0.333" in line or "33.3%" in line for line in outcome.out.splitlines()) == 1


def test_output_goes_to_a_new_file_and_never_over_an_old_one(
    bcnn: Bcnn, ckpt: Path, photos: Path
) -> None:
    words = ["predict", ckpt, "photos", "--output", "rows.jsonl", "--format", "jsonl"]
    outcome = bcnn(*words)
    assert outcome.code == 0 and outcome.out == ""
    assert "6 images, of which 0 failed" in outcome.err and "1 .txt" in outcome.err
    content = Path("rows.jsonl").read_text()
    assert len(jsonl(content)) == 6
    outcome = bcnn(*words)
    assert outcome.code == 1 and "rows.jsonl exists: remove it or name another file" in outcome.err
    assert Path("rows.jsonl").read_text() == content


def test_an_output_that_is_not_complete_is_not_there(
    bcnn: Bcnn, ckpt: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(**_: object) -> Iterator[Prediction]:
        yield Prediction("photos/red/0.png", error="none")
        raise OSError("stopped")

    monkeypatch.setattr("bcnn.evaluation.inference.predict_paths", stopped)
    before = sorted(os.listdir())
    assert bcnn("predict", ckpt, "photos", "--output", "rows.csv", "--format", "csv").code == 1
    assert sorted(os.listdir()) == before
