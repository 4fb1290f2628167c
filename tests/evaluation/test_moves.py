"""Labels that are likely wrong: which a run proposes to move, and what applies the moves."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL, Bcnn, configure, contents, nest, read_csv, toy, write_images

from bcnn.data.index import read_folder, read_list
from bcnn.evaluation.predictions import Predictions
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.run import train


def moved(folder: Path, *lines: str) -> Path:
    """A list of moves, edited by a person."""
    file = folder / "moves.csv"
    file.write_text("\n".join(["path,label,proposed_label", *lines]))
    return file


def test_a_run_proposes_to_move_an_image_in_a_wrong_folder(
    images: Path, tmp_path: Path, bcnn: Bcnn, tiny: BCNN
) -> None:
    (images / "train" / "red" / "0.png").rename(images / "train" / "blue" / "wrong.png")
    before = contents(images)
    run = tmp_path / "run"
    train(configure(*toy(images, SMALL, "stage=last", "data.val_fraction=0", f"output={run}")))
    wrong = str(images / "train" / "blue" / "wrong.png")
    (row,) = read_csv(run / "moves.csv")
    assert (row["path"], row["label"], row["proposed_label"]) == (wrong, "blue", "red")
    known = {each["image"]: each["probability"] for each in read_csv(run / "held_out.csv")}
    assert row["probability"] == known[wrong]

    words = ["check", images, "--apply", run / "moves.csv", "--output"]
    assert "1 of 24 images have a new label" in bcnn(*words, run / "new.csv").out
    assert bcnn(*words, run / "copy").code == 0
    assert contents(images) == before
    expected = {**before, "train/red/wrong.png": before["train/blue/wrong.png"]}
    del expected["train/blue/wrong.png"]
    assert contents(run / "copy") == expected
    as_list, copy = read_list(run / "new.csv"), read_folder(run / "copy")
    assert [as_list.counts(split) for split in as_list.splits] == [[6, 6, 6], [0, 0, 0], [2, 2, 2]]
    assert copy.counts("train") == [6, 6, 6]
    assert {Path(path).resolve() for path in as_list.paths} == {*images.resolve().rglob("*.png")}


def test_a_copy_of_nested_folders_has_the_image_below_the_parents_of_its_new_class(
    images: Path, bcnn: Bcnn
) -> None:
    file, before = moved(images.parent, "train/warm/red/0.png,red,blue"), contents(nest(images))
    copy = images.parent / "copy"
    assert bcnn("check", images, "--nested", "--apply", file, "--output", copy).code == 0
    after = contents(copy)
    assert after["train/all/cold/blue/0-red.png"] == before["train/warm/red/0.png"]
    assert "train/warm/red/0.png" not in after and len(after) == len(before)


def test_a_label_is_doubtful_where_another_class_is_as_sure_as_usual() -> None:
    labels, first = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0.9, 0.7, 0.81, 0.2, 0.79])
    made = Predictions(["a", "b"], list("12345"), labels, torch.stack([first, 1 - first], dim=1))
    assert made.doubtful_labels() == [2]  # images of a have 0.8 of a on average


def test_an_image_keeps_its_name_beside_one_of_the_same_name(images: Path, bcnn: Bcnn) -> None:
    file, before = moved(images.parent, "train/red/0.png,red,blue"), contents(images)
    copy = images.parent / "copy"
    assert bcnn("check", images, "--apply", file, "--output", copy).code == 0
    after = contents(copy)
    assert after["train/blue/0.png"] == before["train/blue/0.png"]
    assert after["train/blue/0-red.png"] == before["train/red/0.png"]
    assert sorted(after.values()) == sorted(before.values())


def test_a_list_keeps_its_other_columns(tmp_path: Path, bcnn: Bcnn) -> None:
    write_images(tmp_path / "old", 1)
    labels, new = tmp_path / "old" / "labels.csv", tmp_path / "new" / "labels.csv"
    labels.write_text("path,label,split,camera\nred/0.png,red,train,7\nblue/0.png,blue,dev,8")
    words = ["check", labels, "--apply", moved(tmp_path, "red/0.png,red,blue"), "--output"]
    assert bcnn(*words, new).code == 0
    found = [(row["label"], row["split"], row["camera"]) for row in read_csv(new)]
    assert found == [("blue", "train", "7"), ("blue", "val", "8")]
    assert [Path(path).parent.name for path in read_list(new).paths] == ["red", "blue"]
    assert "is a list: name a new list" in bcnn(*words, "folder").err


@pytest.mark.parametrize(
    ("line", "output", "sentence"),
    [
        ("red/0.png,red,blue", "new.csv", "line 2: red/0.png is not in"),
        ("train/red/0.png,blue,red", "new.csv", "is labelled red, not blue: the list is out of date"),
        ("train/red/0.png,red,grean", "new.csv", "no class grean: did you mean green"),
        (
            "train/red/0.png,red,blue\ntrain/red/0.png,red,green",
            "new.csv",
            "line 3: train/red/0.png is",
        ),
        ("train/red/0.png,red,blue", "moves.csv", "moves.csv exists"),
        ("train/red/0.png,red,blue", "images/new", "is in"),
        ("train/red/0.png,red,blue", None, "add --output NEW.csv"),
    ],
)
def test_moves_that_do_not_fit_are_refused(
    images: Path, bcnn: Bcnn, line: str, output: str | None, sentence: str
) -> None:
    file, before = moved(images.parent, line), contents(images.parent)
    words = ["--output", images.parent / output] if output else []
    outcome = bcnn("check", images, "--apply", file, *words)
    assert outcome.code == 1 and sentence in outcome.err
    assert contents(images.parent) == before
