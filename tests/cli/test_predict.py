"""`bcnn predict`: which photographs it finds, the rows it writes, how it tells mistakes."""

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
from conftest import COLOURS, ROOT, Run, write_images
from PIL import Image
from torch import nn

from bcnn.cli.predict import USAGE, Options, main
from bcnn.data.transforms import Preprocessing
from bcnn.evaluation.inference import predict_paths
from bcnn.evaluation.writers import Prediction
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model, save_model
from bcnn.utils.cells import name_of
from bcnn.utils.options import command

CLASSES = [*COLOURS, "a class with a, comma"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = BCNN(CLASSES, Preprocessing(32))
    nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp("weights") / "best.ckpt"
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"classes": CLASSES, "size": 32}}, path)
    return path


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with photos/{blue,green,red}/{0,1}.png and a text in it."""
    write_images(tmp_path / "photos", 2)
    (tmp_path / "photos" / "notes.txt").write_text("not a photograph, and not named like one")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def predict(ckpt: Path, *words: str) -> int:
    workers = [] if any(word.startswith("workers=") for word in words) else ["workers=0"]
    return command(Options, main, USAGE, [f"ckpt={ckpt}", *workers, *words])


def paths_of(printed: str) -> list[str]:
    return [json.loads(line)["path"] for line in printed.splitlines()]


def test_files_folders_patterns_and_a_list_are_all_understood(
    ckpt: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = [f"photos/{colour}/{k}.png" for colour in sorted(COLOURS) for k in (0, 1)]
    (photos / "red" / "[1].png").write_bytes((photos / "red" / "1.png").read_bytes())
    for words, expected in (
        (["photos/red/1.png", "photos/blue/0.png"], ["photos/red/1.png", "photos/blue/0.png"]),
        (["photos/blue", "photos/green"], everything[:4]),
        (["photos/*/0.png"], everything[::2]),
        (["photos/**/1.*"], everything[1::2]),
        (["photos/gr*"], everything[2:4]),
        (["photos/red/[1].png"], ["photos/red/[1].png"]),
        (["-"], everything[:2]),
    ):
        listed = io.TextIOWrapper(io.BytesIO("\r\n".join(everything[:2]).encode()))
        monkeypatch.setattr(sys, "stdin", listed)
        assert predict(ckpt, "format=jsonl", *words) == 0
        assert paths_of(capsys.readouterr().out) == expected


def test_probabilities_are_the_model_s_own_in_every_format(
    ckpt: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "photos/red/0.png"
    expected = load_model(ckpt).predict(path)[0].sort(descending=True)
    classes = [CLASSES[k] for k in expected.indices]
    assert predict(ckpt, "format=jsonl", path) == 0
    said = json.loads(capsys.readouterr().out)["predictions"]
    assert [entry["class"] for entry in said] == classes  # 4 classes, though top=5
    values = torch.tensor([entry["probability"] for entry in said])
    torch.testing.assert_close(values, expected.values, atol=0.02, rtol=0)  # bfloat16 on some CPUs
    assert predict(ckpt, "format=csv", "top=2", path) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert [row["path"], row["class_1"], row["class_2"], row["error"]] == [path, *classes[:2], ""]
    assert float(row["probability_1"]) == pytest.approx(values[0].item(), abs=1e-5)
    assert predict(ckpt, "top=1", path) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert line.startswith(path) and classes[0] in line and f"{values[0]:.1%}" in line
    assert line[heading.index("class") :].startswith(classes[0])


def test_tasks_for_label_studio_choose_the_likeliest_class(
    ckpt: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "50 % #1.png").write_bytes((photos / "red" / "0.png").read_bytes())
    (photos / "none.png").write_bytes(b"none")
    names = ["photos/50 % #1.png", "photos/none.png"]
    assert predict(ckpt, "format=labelstudio", "top=2", *names) == 1
    sure, broken = json.loads(capsys.readouterr().out)
    value, index = load_model(ckpt).predict(names[0])[0].max(dim=0)
    (prediction,) = sure["predictions"]
    assert prediction["score"] == pytest.approx(value.item(), abs=0.02)  # bfloat16 on some CPUs
    (choice,) = prediction["result"]
    assert choice["value"] == {"choices": [CLASSES[index]]}
    configuration = (ROOT / "docs" / "labels.md").read_text()
    assert f'<Choices name="{choice["from_name"]}" toName="{choice["to_name"]}"' in configuration
    assert (
        sure["data"]["bcnn"].startswith(f"{CLASSES[index]} ") and sure["data"]["bcnn"].count("%") == 2
    )
    address = urlsplit(sure["data"]["image"])
    assert address.path == "/data/local-files/"
    assert Path("/", parse_qs(address.query)["d"][0]) == photos.resolve() / "50 % #1.png"
    assert broken["predictions"] == [] and "none.png" in broken["data"]["image"]
    assert "cannot" in broken["data"]["bcnn"]


def test_mirror_says_the_same_of_a_photograph_and_its_mirror_image(
    ckpt: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photos / "red" / "0.png"
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB").resize((32, 32))))
        pixels[:, :16] = pixels[:, :16] // 2
    Image.fromarray(pixels.numpy()).save(path)
    Image.fromarray(pixels.flip(1).numpy()).save(photos / "red" / "mirrored.png")
    model = load_model(ckpt)
    both = torch.stack([pixels, pixels.flip(1)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model(both)
    assert (logits[0] - logits[1]).abs().max() > 0.1

    def said(*words: str) -> list[float]:
        assert predict(ckpt, "format=jsonl", *words) == 0
        found = json.loads(capsys.readouterr().out)["predictions"]
        by_class = {entry["class"]: entry["probability"] for entry in found}
        return [by_class[name] for name in model.classes]

    alone, mirrored = (said(f"photos/red/{name}.png") for name in ("0", "mirrored"))
    assert alone != pytest.approx(mirrored, abs=0.01)
    for name in ("0", "mirrored"):
        together = said("mirror=true", f"photos/red/{name}.png")
        assert together == pytest.approx(logits.mean(dim=0).softmax(0).tolist(), abs=0.02)


NAMES = {
    "=1+1.png": "=1+1.png",
    "\x1b[2J.png": r"\x1b[2J.png",
    "two\nlines.png": r"two\nlines.png",
    "\u202egnp.png": r"\u202egnp.png",
    "@.png": "@.png",
}


def test_names_do_nothing_on_terminals_and_in_spreadsheets(
    ckpt: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        Path(name).write_bytes((photos / "red" / "0.png").read_bytes())
    os.mkfifo("pipe.png")
    assert predict(ckpt, *NAMES, "pipe.png", "top=1") == 1
    heading, *lines, last = capsys.readouterr().out.splitlines()
    place = heading.index("class")
    assert [line[:place].rstrip() for line in lines] == [*NAMES.values()]
    assert all(line[place - 1] == " " != line[place] for line in lines)  # a column
    assert last.startswith("pipe.png") and "(not a regular file)" in last

    assert predict(ckpt, *NAMES, "format=csv", "top=1") == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out, newline="")))
    assert [name_of(row["path"]) for row in table] == [*NAMES]
    assert [row["path"] for row in table if row["path"][0] in "=@"] == []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert predict(ckpt, *NAMES, "format=csv", "top=1") == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [*NAMES.values()]


def test_a_broken_image_has_a_row_and_does_not_stop_the_others(
    ckpt: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "green" / "0.png").write_bytes((photos / "green" / "1.png").read_bytes()[:200])
    for batch in (1, 4):  # alone in a batch, and with others
        assert predict(ckpt, "photos", f"batch={batch}", "format=jsonl") == 1
        captured = capsys.readouterr()
        rows = [json.loads(line) for line in captured.out.splitlines()]
        assert [row["path"] for row in rows if "error" in row] == ["photos/green/0.png"]
        assert len(rows) == 6 and sum("predictions" in row for row in rows) == 5
        assert "1 of them could not be read or predicted" in captured.err
    assert predict(ckpt, "photos", "format=csv", "top=1") == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [bool(row["error"]) for row in rows] == [not row["class_1"] for row in rows]
    assert predict(ckpt, "photos") == 1
    assert "photos/green/0.png  error: cannot read the image" in capsys.readouterr().out


def test_whatever_a_decoder_raises_is_told_in_its_row(
    ckpt: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: str, side: int) -> Image.Image:
        if path == "b":
            raise MemoryError
        return Image.new("RGB", (32, 32))

    monkeypatch.setattr("bcnn.evaluation.inference.load_image", load)
    rows = predict_paths(load_model(ckpt), ["a", "b", "c"], workers=0)
    assert [row.error for row in rows] == ["", "MemoryError()", ""]


def test_a_file_missing_from_a_list_is_one_broken_image(
    ckpt: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = io.TextIOWrapper(io.BytesIO(b"photos/red/0.png\nphotos/gone.png\n"))
    monkeypatch.setattr(sys, "stdin", listed)
    assert predict(ckpt, "-", "format=jsonl") == 1
    red, gone = map(json.loads, capsys.readouterr().out.splitlines())
    assert "predictions" in red and "there is no image" in gone["error"]


def test_batches_and_workers_change_nothing(ckpt: Path, photos: Path) -> None:
    model = load_model(ckpt)
    paths = sorted(map(str, photos.glob("*/*.png")))
    expected = list(predict_paths(model, paths, batch=1, workers=0))
    assert [row.path for row in expected] == paths
    for row, same in zip(predict_paths(model, paths, batch=4, workers=2), expected, strict=True):
        assert (row.path, row.classes) == (same.path, same.classes)
        assert row.probabilities == pytest.approx(same.probabilities, abs=0.02)


def test_rows_are_handed_out_before_the_list_is_through(ckpt: Path, photos: Path) -> None:
    paths = [str(photos / "red" / "0.png")] * 2 + ["never opened"]
    rows = predict_paths(load_model(ckpt), paths, batch=2, workers=0)
    assert not next(rows).error


def test_output_goes_to_a_new_file_and_never_over_an_old_one(
    ckpt: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(ckpt, "photos", "output=rows.jsonl", "format=jsonl") == 0
    content = Path("rows.jsonl").read_text()
    assert len(paths_of(content)) == 6
    captured = capsys.readouterr()
    assert captured.out == "" and "6 photographs in" in captured.err
    assert predict(ckpt, "photos", "output=rows.jsonl") == 1
    assert capsys.readouterr().err == (
        "error: output=rows.jsonl exists: remove it or name another file\n"
    )
    assert Path("rows.jsonl").read_text() == content


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "no images: nowhere"),
        (["photos/*.tif"], "no images: photos/*.tif"),
        ([], "which photographs?"),
        (["photos", "top=0"], "top=0: 1 at least"),
        (["photos", "batch=0"], "batch=0: 1 at least"),
        (["photos", "workers=-1"], "workers=-1: 0 at least"),
        (["photos", "format=xml"], "format=xml: choose from table, jsonl, csv, labelstudio"),
        (["photos", "output=photos/notes.txt/rows.csv"], "photos/notes.txt cannot be written: Not a"),
    ],
)
def test_mistakes_are_one_sentence(
    ckpt: Path, photos: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert predict(ckpt, *words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {sentence}") and captured.err.count("\n") == 1


def test_a_missing_checkpoint_leaves_no_empty_output(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(Path("gone.ckpt"), "photos", "output=rows.csv") == 1
    assert "no such file of weights: gone.ckpt" in capsys.readouterr().err
    assert not Path("rows.csv").exists()


@pytest.mark.slow
def test_as_a_command_rows_alone_reach_standard_output(python: Run, ckpt: Path, photos: Path) -> None:
    words = ["-m", "bcnn.cli.predict", f"ckpt={ckpt}", "photos", "format=csv"]
    run = python(*words, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    assert len(list(csv.DictReader(io.StringIO(run.stdout)))) == 6
    assert "6 photographs in" in run.stderr and "images/s" in run.stderr


@pytest.fixture
def overflowing(tiny: BCNN, tmp_path: Path) -> Path:
    """A model whose weights are finite, and whose logits are not but for a black photograph."""
    tiny.backbone.features.bias.data.zero_()
    tiny.backbone.features.weight.data.fill_(1e30)
    save_model(tiny, tmp_path / "huge.safetensors")
    return tmp_path / "huge.safetensors"


@pytest.mark.parametrize("form", ["table", "jsonl", "csv", "labelstudio"])
def test_an_answer_that_is_not_finite_is_an_error_in_its_row(
    overflowing: Path, photos: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    Image.new("RGB", (32, 32)).save(photos / "red" / "black.png")
    assert predict(overflowing, "photos/red", f"format={form}", "top=1") == 1
    said = capsys.readouterr()
    assert "2 of them could not be read or predicted" in said.err
    assert said.out.count("not finite numbers") == 2 and "nan" not in said.out
    assert sum("0.333" in line or "33.3%" in line for line in said.out.splitlines()) == 1


def test_an_output_that_is_not_finished_is_not_there(
    ckpt: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> Iterator[Prediction]:
        yield Prediction("photos/red/0.png", error="none")
        raise KeyboardInterrupt

    monkeypatch.setattr("bcnn.evaluation.inference.predict_paths", stopped)
    before = sorted(os.listdir())
    with pytest.raises(KeyboardInterrupt):
        predict(ckpt, "photos", "output=rows.csv", "format=csv")
    assert sorted(os.listdir()) == before


def test_what_a_folder_holds_beside_images_is_told(
    ckpt: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one.CR2", "two.CR2", "notes.txt"):
        (photos / name).write_text("")
    assert predict(ckpt, "photos") == 0
    assert "3 files left out: 2 .CR2, 1 .txt" in capsys.readouterr().err
    assert predict(ckpt, "photos", "photos/**") == 0  # twice by the folder, counted once
    assert "3 files left out: 2 .CR2, 1 .txt" in capsys.readouterr().err


def test_what_a_file_does_not_say_is_told(
    ckpt: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(ckpt)
    save_model(model, tmp_path / "other.pth")
    assert predict(tmp_path / "other.pth", "photos/green/0.png", "format=jsonl") == 0
    said = capsys.readouterr().err
    assert "other.pth does not say at which size it was trained: 448 px (keep, crop_pct 1" in said
    assert "nor what its classes are called" in said
    assert predict(ckpt, "photos/green/0.png", "format=jsonl") == 0
    assert "does not say" not in capsys.readouterr().err
