"""`bcnn check`: a report on a folder or list, a contact sheet, and nothing trained."""

import re
from pathlib import Path
from shutil import copyfile

import numpy as np
import pytest
from conftest import Bcnn, write, write_classes
from PIL import Image

from bcnn.data.datamodule import FineGrainedDataModule
from bcnn.utils.console import setup_logging


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def row(printed: str, name: str) -> list[str]:
    line = next(line for line in printed.splitlines() if name in line)
    return [cell.strip() for cell in re.split("[│┃|]", line) if cell.strip()]


def test_counts_sizes_formats_and_a_contact_sheet(bcnn: Bcnn) -> None:
    write_classes(Path("photos"), **{"[cat]": 20, ":dog:": 10})
    write(Path("photos") / ":dog:" / "one.bmp", seed=5)
    outcome = bcnn("check", "photos", "--output", "sheets")
    assert outcome.code == 0
    assert row(outcome.out, "[cat]") == ["[cat]", "14", "2", "4"]
    assert row(outcome.out, ":dog:") == [":dog:", "8", "1", "2"]
    assert row(outcome.out, "classes: 2") == ["classes: 2", "22", "3", "6"]
    assert "formats: 30 PNG, 1 BMP\nshort sides: 40 to 40 px, median 40 px\n" in outcome.out
    assert "pictures: sheets" in outcome.out
    assert [path.name for path in Path("sheets").iterdir()] == ["contact_sheet.png"]
    assert np.asarray(Image.open("sheets/contact_sheet.png")).std() > 20


def test_what_a_centre_crop_would_cut_off(bcnn: Bcnn) -> None:
    either = "compare data.resize=squash and data.resize=whole"
    default = "the default here is data.resize=squash"
    for width, share, advice in ((105, "", ""), (150, "33%", either), (300, "67%", default)):
        for index in range(20):
            noise = np.random.default_rng(index).integers(0, 255, (100, width, 3), np.uint8)
            path = Path(str(width), "ab"[index % 2], f"{index}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise).save(path)
        outcome = bcnn("check", str(width))
        assert ("data.resize=whole" in outcome.out) == bool(share)
        text = f"a centre crop cuts off {share} of the median image: {advice}"
        assert not share or text in outcome.out


def test_near_duplicates_are_shown(bcnn: Bcnn, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, folder in enumerate(["train/cat", "train/dog", "test/cat", "test/dog"]):
        Path("photos", folder).mkdir(parents=True)
        for k in range(8):
            coarse = np.random.default_rng([seed, k]).integers(0, 255, (6, 8, 3), np.uint8)
            smooth = Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC)
            smooth.save(f"photos/{folder}/{k}.jpg")
    small = Image.open("photos/train/cat/3.jpg").resize((200, 150))
    small.save("photos/test/dog/small.jpg", quality=40)
    copyfile("photos/train/cat/4.jpg", "photos/test/dog/same.jpg")  # a duplicate, not a near one
    Image.new("RGB", (40, 40), "blue").save("photos/train/cat/flat.png")
    Image.new("RGB", (40, 40), "red").save("photos/test/cat/flat.png")
    outcome = bcnn("check", "photos", "--val-fraction", "0")
    assert outcome.code == 0
    warning = "1 of 19 images in test look the same as one in train"
    assert warning in outcome.out
    setup_logging()
    FineGrainedDataModule("photos", val_fraction=0).setup()  # training warns, too
    assert warning in capsys.readouterr().err
    (sheet,) = Path().glob("outputs/*/*-check/near_duplicates.png")
    with Image.open(sheet) as picture:
        halves = np.asarray(picture.convert("RGB"), np.float32)[30:150, :384].reshape(120, 2, 192, 3)
        assert np.corrcoef(halves[:, 0, :180].ravel(), halves[:, 1, :180].ravel())[0, 1] > 0.95


def test_names_that_act_on_a_terminal_are_escaped(bcnn: Bcnn) -> None:
    write_classes(Path("photos"), **{"evil\x1b[2J": 10, "two\nlines\u202e \udcff": 10})
    Path("photos", "evil\x1b[2J", "\x1b]0;x.png").write_bytes(b"")
    outcome = bcnn("check", "photos")
    assert row(outcome.out, r"evil\x1b[2J")[0] == r"evil\x1b[2J"
    assert row(outcome.out, "lines")[0] == r"two\nlines\u202e \xff"
    assert r"\x1b]0;x.png (" in outcome.out
    assert not {"\x1b", "\u202e", "\udcff"} & set(outcome.out)


def test_a_list_with_the_fractions_of_the_options(bcnn: Bcnn) -> None:
    write_classes(Path(), cat=10, dog=10)
    lines = (f"{name}/{n}.png,{name}\n" for name in ("cat", "dog") for n in range(10))
    Path("labels.csv").write_text("".join(lines))
    outcome = bcnn("check", "labels.csv", "--val-fraction", "0", "--test-fraction", "0.5")
    assert row(outcome.out, "cat") == ["cat", "5", "0", "5"]


def test_broken_files_and_duplicates_are_in_the_report(bcnn: Bcnn, images: Path) -> None:
    (images / "train" / "red" / "0.png").write_bytes(b"")
    (images / "test" / "blue" / "1.png").write_text("no image")
    copyfile(images / "train" / "green" / "1.png", images / "test" / "green" / "copy.png")
    copyfile(images / "train" / "green" / "2.png", images / "train" / "red" / "copy.png")
    outcome = bcnn("check", images, "--val-fraction", "0")
    assert outcome.code == 1
    assert row(outcome.out, "red")[1:] == ["6", "0", "2", "1"]
    assert row(outcome.out, "blue")[1:] == ["6", "0", "1", "1"]
    (error,) = (line for line in outcome.out.splitlines() if line.startswith("error: "))
    assert error.startswith("error: 2 of 26 images cannot be decoded: ")
    assert f"{images}/train/red/0.png (" in error and f"{images}/test/blue/1.png (" in error
    assert f"{images}/test/green/copy.png = {images}/train/green/1.png" in outcome.out
    assert f"{images}/train/green/2.png = {images}/train/red/copy.png" in outcome.out


def test_what_training_would_stop_at_is_an_error(bcnn: Bcnn, images: Path) -> None:
    (images / "train" / "violet").mkdir()
    write_classes(images / "test", white=1)
    outcome = bcnn("check", images)
    assert outcome.code == 1
    assert re.search("error: .*violet", outcome.out) and re.search("error: .*white", outcome.out)
    assert row(outcome.out, "│ violet") == ["violet", "0", "0", "0"]
