"""python -m bcnn.data: a report on a folder or a list, a contact sheet, and nothing trained."""

import io
import re
import sys
from pathlib import Path
from shutil import copyfile

import numpy as np
import pytest
from conftest import ROOT, Run, set_up, write, write_classes
from PIL import Image

from bcnn.cli.check import USAGE, Options, main
from bcnn.data.contact_sheet import contact_sheet
from bcnn.utils.options import command


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def row(printed: str, name: str) -> list[str]:
    line = next(line for line in printed.splitlines() if name in line)
    return [cell.strip() for cell in re.split("[│┃|]", line) if cell.strip()]


def test_counts_sizes_formats_and_a_contact_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "photos", **{"[cat]": 20, "dog": 10})
    write(tmp_path / "photos" / "dog" / "one.bmp", seed=5)
    assert main(Options([str(tmp_path / "photos")])) == 0
    printed = capsys.readouterr().out
    assert row(printed, "[cat]") == ["[cat]", "14", "2", "4"]
    assert row(printed, "classes: 2") == ["classes: 2", "22", "3", "6"]
    assert "formats: 30 PNG, 1 BMP" in printed and "48 × 40" in printed
    sheet = re.search("contact sheet: (.+)", printed)
    assert sheet
    with Image.open(sheet[1]) as picture:
        assert picture.format == "PNG" and np.asarray(picture).std() > 20
    assert len(list(tmp_path.glob("outputs/*/*-data/*"))) == 1


def test_copies_that_were_saved_again_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def smooth(seed: int) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
        return Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC)

    for name in ("cat", "dog"):
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True)
        for k in range(8):
            smooth(k + 100 * (name == "dog")).save(tmp_path / "train" / name / f"{k}.jpg")
            smooth(k + 200 + 100 * (name == "dog")).save(tmp_path / "test" / name / f"{k}.jpg")
    again = tmp_path / "test" / "dog"
    smooth(3).resize((200, 150)).save(again / "small.jpg", quality=40)
    smooth(4).save(again / "same.jpg")  # of the same pixels, which is said as before
    for split in ("train", "test"):
        Image.new("RGB", (40, 40), "red" if split == "test" else "blue").save(
            tmp_path / split / "cat" / "flat.png"
        )
    assert main(Options([str(tmp_path)], val_fraction=0.0)) == 0
    printed = capsys.readouterr().out
    assert "1 of 19 images in test are in train too" in printed
    assert "1 of 19 images in test look the same as one in train" in printed
    (sheet,) = tmp_path.glob("outputs/*/*-data/look_alike.png")
    with Image.open(sheet) as picture:
        halves = np.asarray(picture.convert("RGB"), np.float32)[30:150, :384].reshape(120, 2, 192, 3)
        assert np.corrcoef(halves[:, 0, :180].ravel(), halves[:, 1, :180].ravel())[0, 1] > 0.95


def test_names_that_act_on_a_terminal_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "photos", **{"evil\x1b[2J": 10, "two\nlines\u202e \udcff": 10})
    (tmp_path / "photos" / "evil\x1b[2J" / "\x1b]0;x.png").write_bytes(b"")
    assert main(Options([str(tmp_path / "photos")])) == 1
    printed = capsys.readouterr().out
    assert row(printed, r"evil\x1b[2J")[0] == r"evil\x1b[2J"
    assert row(printed, "lines")[0] == r"two\nlines\u202e \xff"
    assert r"broken: " in printed and r"\x1b]0;x.png: an empty file" in printed
    assert not {"\x1b", "\u202e", "\udcff"} & set(printed)


def test_a_list_is_reported_with_the_splits_of_the_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path, cat=10, dog=10)
    lines = (f"{name}/{n}.png,{name}\n" for name in ("cat", "dog") for n in range(10))
    (tmp_path / "labels.csv").write_text("".join(lines))
    arguments = ["labels.csv", "val_fraction=0", "test_fraction=0.5"]
    assert command(Options, main, USAGE, arguments) == 0
    assert row(capsys.readouterr().out, "cat") == ["cat", "5", "0", "5"]


def test_broken_files_and_warnings_are_all_in_the_report(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "train" / "red" / "0.png").write_bytes(b"")
    (images / "train" / "blue" / "1.png").write_text("no image")
    copy = (images / "train" / "green" / "1.png").read_bytes()
    (images / "test" / "green" / "copy.png").write_bytes(copy)
    assert main(Options([str(images)], val_fraction=0)) == 1
    printed = capsys.readouterr().out
    assert row(printed, "red")[1:] == ["5", "0", "2", "1"]
    assert f"broken: {images / 'train' / 'red' / '0.png'}: an empty file" in printed
    assert f"broken: {images / 'train' / 'blue' / '1.png'}: not an image" in printed
    assert "error: 2 images cannot be decoded" in printed
    assert "warning: 1 of 7 images in test are in train too" in printed


def test_mistakes_are_reported_and_end_with_exit_code_1(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "train" / "violet").mkdir()
    write_classes(images / "test", white=1)
    assert main(Options([str(images)])) == 1
    printed = capsys.readouterr().out
    assert "no images of the class violet" in printed and "train lacks: white" in printed
    assert row(printed, "│ violet") == ["violet", "0", "0", "0"]


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["nowhere"], [".", "val_fraction=2"]])
def test_mistakes_in_the_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(Options, main, USAGE, arguments) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_nothing_but_empty_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cat").mkdir()
    assert main(Options([str(tmp_path)])) == 1
    assert "error: no images in" in capsys.readouterr().out


@pytest.mark.parametrize(("classes", "images"), [(2, 8), (41, 4), (200, 2), (700, 1)])
def test_the_sheet_has_room_for_many_classes(classes: int, images: int, tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    names = [f"{n} of a very long name, longer than there is room for" for n in range(classes)]
    samples = [(str(tmp_path / "a.png"), n) for n in range(classes) for _ in range(images)]
    contact_sheet(names, samples, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert max(picture.size) < 12_000


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_come_out_whole_on_a_terminal_that_lacks_their_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    write_classes(tmp_path / "photos", **{"tulip [red]": 10, ":dog:": 10, "λ": 10})
    assert command(Options, main, USAGE, ["photos"]) == 0
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    for name in ("tulip [red]", ":dog:", r"\u03bb"):
        assert row(printed, name) == [name, "7", "1", "2"]


@pytest.mark.slow
def test_help_and_a_report_from_the_command_line(python: Run, images: Path) -> None:
    run = python("-m", "bcnn.data", str(images), PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    assert row(run.stdout, "classes: 3") == ["classes: 3", "15", "3", "6"]


def test_photographs_in_two_classes_and_repeated_ones_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_classes(photos, cat=6, dog=6)
    for index in range(4):
        copyfile(photos / "cat" / f"{index}.png", photos / "dog" / f"copy{index}.png")
    copyfile(photos / "dog" / "5.png", photos / "dog" / "again.png")
    assert main(Options([str(photos)])) == 0
    printed = capsys.readouterr().out
    assert (
        "warning: 4 photographs are in more than one class, so that a label of each is wrong" in printed
    )
    assert f"{photos}/cat/0.png = {photos}/dog/copy0.png" in printed
    assert f"warning: 1 image repeats another of their class: {photos}/dog/again.png = " in printed
    set_up(photos)  # as training does
    assert "4 photographs are in more than one class" in capsys.readouterr().out
    for copy in photos.glob("dog/*[yn]?.png"):
        copy.unlink()
    assert main(Options([str(photos)])) == 0
    assert "more than one class" not in capsys.readouterr().out
