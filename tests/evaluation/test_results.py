"""The files of an evaluation, and what it finds in the folder of a run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import folder_data, read_csv

from bcnn.evaluation.inference import predict_split
from bcnn.evaluation.metrics import headline
from bcnn.evaluation.predictions import Predictions
from bcnn.evaluation.report import MISTAKES, ReportContent
from bcnn.evaluation.results import kept_predictions, logged_stages, write_images, write_results
from bcnn.models.bilinear_cnn import BCNN


def test_files_hold_the_same_predictions(tiny: BCNN, images: Path, tmp_path: Path) -> None:
    data = folder_data(images)
    made = predict_split(tiny, data.test, data.test_dataloader(), "32-true")
    text = write_results(tmp_path / "out", tiny, ReportContent(made, "A title")).read_text()
    mistakes = min(MISTAKES, int((~made.correct).sum()))
    assert text.count('alt="attribution of') == 2 * mistakes > 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["top1"]["value"] == headline(made)["top1"].value
    assert figures["ece"]["low"] is None and figures["images"] == len(made.paths)
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert [row["image"] for row in rows] == made.paths
    assert [row["correct"] == "1" for row in rows] == made.correct.tolist()
    assert [row["class"] for row in read_csv(tmp_path / "out" / "classes.csv")] == made.classes
    assert kept_predictions(tmp_path) is None
    name, kept = kept_predictions(tmp_path / "out") or ("", made)
    assert (name, kept.paths) == ("out", made.paths)


def test_names_are_in_the_csv_unchanged(tmp_path: Path) -> None:
    names = ['a "quoted", comma', "two\nlines", "=1+1", "no Unicode \udcff"]
    write_images(tmp_path / "images.csv", Predictions(names, names, torch.arange(4), torch.eye(4)))
    rows = read_csv(tmp_path / "images.csv")
    assert [row["image"] for row in rows] == [row["top1"] for row in rows] == names


@pytest.mark.parametrize(
    ("stage", "expected"), [("finetune", ["last", "finetune"]), ("last", ["last"]), ("elsewhere", [])]
)
def test_logs_of_the_stages_up_to_a_checkpoint(tmp_path: Path, stage: str, expected: list[str]) -> None:
    for name in ("last", "finetune"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").touch()
    assert [name for name, _ in logged_stages(tmp_path / stage / "best.ckpt")] == expected
