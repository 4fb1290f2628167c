"""`bcnn compare`: from what `bcnn evaluate` wrote to a table and files."""

from pathlib import Path

import pytest
import torch
from conftest import Bcnn, write_images

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import save_model


@pytest.fixture
def evaluated(bcnn: Bcnn, tiny: BCNN, tmp_path: Path) -> list[Path]:
    """Folders of two models' evaluations, on the same images in two places."""
    folders = []
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        torch.nn.init.normal_(tiny.backbone.features.weight)
        save_model(tiny, tmp_path / f"{name}.safetensors")
        write_images(tmp_path / f"images_{name}", 8)
        folder = tmp_path / name
        words = (tmp_path / f"{name}.safetensors", tmp_path / f"images_{name}", "--output", folder)
        assert bcnn("evaluate", *words).code == 0
        folders.append(folder)
    return folders


def test_evaluations_are_compared_on_the_same_images(
    bcnn: Bcnn, evaluated: list[Path], tmp_path: Path
) -> None:
    outcome = bcnn("compare", *evaluated, "--output", tmp_path / "out")
    assert outcome.code == 0 and outcome.err == ""
    assert "images: 24, the same" in outcome.out and "McNemar" in outcome.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("compare.csv", "compare.html", "compare.md", "compare.tex", "images.csv")
    ]


def test_one_folder_and_folders_of_nothing_are_errors(
    bcnn: Bcnn, evaluated: list[Path], tmp_path: Path
) -> None:
    outcome = bcnn("compare", evaluated[0])
    assert outcome.code == 1 and "two folders or more" in outcome.err
    outcome = bcnn("compare", evaluated[0], tmp_path)
    assert outcome.code == 1 and f"{tmp_path} has no predictions.npz" in outcome.err
