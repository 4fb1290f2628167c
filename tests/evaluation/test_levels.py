"""Levels of a taxonomy: sums of probabilities, answers that are sure, metrics, and what shows them."""

import csv
import json
import math
from pathlib import Path
from statistics import mean

import pytest
import torch
from conftest import FINETUNE, SMALL, Bcnn, configure, nest, read_csv, save_checkpoint, toy
from torch import Tensor

from bcnn.data.taxonomy import Taxonomy
from bcnn.evaluation.answers import answer, common_parent, numbered, summed
from bcnn.evaluation.levels import level_metrics
from bcnn.evaluation.predictions import Predictions
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.training.run import train
from bcnn.utils.errors import UserError

TREE: Taxonomy = {
    "species": ["beech", "carp", "oak", "pike", "trout"],
    "kind": ["tree", "fish", "tree", "fish", "fish"],
    "kingdom": ["plant", "animal", "plant", "animal", "animal"],
}
KINDS: Taxonomy = {"class": ["blue", "green", "red"], "kind": ["cold", "cold", "warm"]}


def probabilities(images: int) -> Tensor:
    logits = 2 * torch.randn(images, 5, generator=torch.Generator().manual_seed(0))
    return logits.softmax(dim=1)


@pytest.mark.parametrize("level", TREE)
def test_a_name_is_as_probable_as_its_classes_together(level: str) -> None:
    shares = probabilities(7)
    names, numbers = numbered(TREE[level])
    for row, sums in zip(shares.tolist(), summed(shares, numbers).tolist(), strict=True):
        expected = dict.fromkeys(names, 0.0)
        for name, share in zip(TREE[level], row, strict=True):
            expected[name] += share
        assert sums == pytest.approx([*expected.values()], abs=1e-6)


@pytest.mark.parametrize(
    ("sure", "name", "level", "probability"),
    [(0.3, "oak", "species", 0.4), (0.5, "fish", "kind", 0.55), (None, None, None, None)],
)
def test_the_deepest_sure_level_answers(
    sure: float | None, name: str | None, level: str | None, probability: float | None
) -> None:
    """The likeliest class is an oak, but a fish is likelier than a tree."""
    found = answer(torch.tensor([0.05, 0.2, 0.4, 0.25, 0.1]), [2, 0], TREE, sure)
    assert (found["sure"], found["sure_level"], found["set_parent"]) == (name, level, "tree")
    assert found["sure_probability"] == pytest.approx(probability)


def test_the_common_parent_is_the_deepest() -> None:
    assert common_parent([1], TREE) == ("species", "carp")
    assert common_parent([1, 3, 4], TREE) == ("kind", "fish")
    assert common_parent([0, 1], TREE) == ("", "")


def test_metrics_of_levels_by_hand() -> None:
    shares, labels = probabilities(40), [k % 5 for k in range(40)]
    made = Predictions(TREE["species"], list(map(str, range(40))), torch.tensor(labels), shares)
    rows = [max(range(5), key=row.__getitem__) for row in shares.tolist()]
    for found, (level, names) in zip(level_metrics(made, TREE), TREE.items(), strict=True):
        hits = []
        for row, label in zip(shares.tolist(), labels, strict=True):
            sums = {
                name: sum(p for p, n in zip(row, names, strict=True) if n == name) for name in names
            }
            hits.append(max(sums, key=sums.__getitem__) == names[label])
        pairs = [(names[k], names[label]) for k, label in zip(rows, labels, strict=True) if k != label]
        assert (found.level, found.names, found.top1.value) == (level, len({*names}), mean(hits))
        near = mean(one == other for one, other in pairs) if level != "species" else math.nan
        assert found.near.value == pytest.approx(near, nan_ok=True)
        assert found.top1.low < found.top1.value < found.top1.high


def test_a_run_keeps_its_taxonomy_and_evaluates_by_level(
    images: Path, tmp_path: Path, bcnn: Bcnn, tiny: BCNN
) -> None:
    kinds, ckpt = tmp_path / "kinds.csv", tmp_path / "run" / "last" / "best.ckpt"
    kinds.write_text("class,kind\nred,warm\ngreen,cold\nblue,cold\n")
    words = toy(images, SMALL, *FINETUNE)
    train(configure(*words, f"data.taxonomy={kinds}", f"output={tmp_path / 'run'}"))
    for stage in ("last", "finetune"):
        assert load_model(next((tmp_path / "run" / stage).glob("*.ckpt"))).taxonomy == KINDS
    train(configure(*words, "stage=last", f"ckpt={ckpt}", f"output={tmp_path / 'again'}"))
    assert load_model(tmp_path / "again" / "last" / "best.ckpt").taxonomy == KINDS
    (images / "train" / "red").rename(images / "train" / "pink")
    (images / "test" / "red").rename(images / "test" / "pink")
    with pytest.raises(UserError, match=r"taxonomy of .* lacks the class pink: add it in"):
        train(configure(*words, "stage=last", f"ckpt={ckpt}", f"output={tmp_path / 'new'}"))


def test_a_run_on_nested_folders_is_evaluated_on_such(
    images: Path, tmp_path: Path, bcnn: Bcnn, tiny: BCNN
) -> None:
    run, words = tmp_path / "run", toy(nest(images), SMALL, "stage=last", "data.taxonomy=folders")
    train(configure(*words, f"output={run}"))
    assert bcnn("evaluate", run, images, "--output", tmp_path / "out").code == 0
    again, made = (read_csv(file / "predictions.csv") for file in (tmp_path / "out", run))
    assert len(made) == 6
    assert [(row["image"], row["class"]) for row in again] == [(r["image"], r["class"]) for r in made]
    assert {row["class"] for row in made} == {"blue", "green", "red"}
    assert {row["right_level"] for row in made} <= {"class", "folder 2", "folder 1", ""}


def test_an_evaluation_has_figures_for_each_level(
    images: Path, tmp_path: Path, bcnn: Bcnn, tiny: BCNN
) -> None:
    tiny.taxonomy, out = KINDS, tmp_path / "out"
    ckpt = save_checkpoint(tiny, tmp_path / "best.safetensors")
    outcome = bcnn("evaluate", ckpt, images, "--output", out)
    made = Predictions.load(out / "predictions.npz")
    wrong, kinds = ~made.correct, level_metrics(made, KINDS)[1]
    figures = json.loads((out / "figures.json").read_text())
    assert figures["levels"][0]["top1"] == figures["top1"]
    assert figures["levels"][1]["top1"]["value"] == kinds.top1.value
    assert f"{kinds.top1.value:.1%}" in outcome.out and "near mistakes" in outcome.out
    rows = read_csv(out / "predictions.csv")
    near = sum(row["right_level"] == "kind" for row in rows)
    assert near == round(kinds.near.value * int(wrong.sum())) > 0
    assert sum(row["right_level"] == "class" for row in rows) == int(made.correct.sum())
    report = (out / "report.html").read_text()
    assert report.count("Near: both are cold (kind).") == near
    assert report.count("Far: they have no common parent.") == int(wrong.sum()) - near > 0


@pytest.mark.parametrize("sure", [0.5, 0.999])
def test_predict_names_what_is_sure_in_every_format(
    calibrated: BCNN, images: Path, tmp_path: Path, bcnn: Bcnn, sure: float
) -> None:
    calibrated.taxonomy, path = KINDS, images / "test" / "red" / "0.png"
    ckpt = save_checkpoint(calibrated, tmp_path / "best.ckpt")
    words = ["predict", ckpt, path, "--sure", sure, "--format"]
    row = json.loads(bcnn(*words, "jsonl").out)
    shares = calibrated.predict(path)[0]
    members = [KINDS["class"].index(name) for name in row["prediction_set"]]
    expected = answer(shares, members, KINDS, sure)
    assert {key: row[key] for key in expected} == expected
    (cells,) = csv.DictReader(bcnn(*words, "csv").out.splitlines())
    assert [cells[key] for key in expected] == [str(each or "") for each in expected.values()]
    text = f"sure: {row['sure']} ({row['sure_level']})" if row["sure"] else "sure on no level"
    assert text in bcnn(*words, "table").out
    assert text in json.loads(bcnn(*words, "labelstudio").out)[0]["data"]["bcnn"]


def test_without_a_taxonomy_nothing_is_sure(calibrated: BCNN, images: Path, bcnn: Bcnn) -> None:
    ckpt = save_checkpoint(calibrated, images / "best.ckpt")
    words = ["predict", ckpt, images / "test" / "red" / "0.png", "--format", "csv", "--top-k", 1]
    heading = "image,top1,probability,prediction_set,unlike_training,error\n"
    assert bcnn(*words).out.startswith(heading)
    outcome = bcnn(*words, "--sure", 0.9)
    assert outcome.code == 1 and "has no taxonomy: train it with data.taxonomy=FILE" in outcome.err
