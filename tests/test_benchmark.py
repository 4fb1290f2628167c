"""The benchmark runs and compares like with like, at toy size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Run
from rich.console import Console
from torchvision.models import VGG16_Weights

from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.third_party import to_original
from bcnn.utils.errors import UserError
from benchmarks import convex, data, finetune, last, photographs, predict
from benchmarks.__main__ import main
from benchmarks.harness import Contender
from benchmarks.options import Options
from benchmarks.original import OriginalNet


def test_the_original_s_network_is_the_same_function() -> None:
    torch.manual_seed(0)
    model = BCNN(["a", "b"]).double()
    preset = VGG16_Weights.IMAGENET1K_V1.transforms()  # the original's
    model.backbone.set_normalization(preset.mean, preset.std)
    torch.nn.init.normal_(model.head.weight)
    source = OriginalNet(2).double()
    source.load_state_dict(to_original(model))
    images = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    normalised = (images - model.backbone.mean) / model.backbone.std
    torch.testing.assert_close(source(normalised), model(images), rtol=1e-10, atol=1e-12)


@pytest.fixture
def in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders are run here: a process for each of them takes ten seconds to start."""

    def here(contender: Contender, options: Options) -> dict[str, float]:
        monkeypatch.setenv("BCNN_STORES", str(tmp_path / contender.__name__))
        return {**contender(options), "peak": 0.0}

    for part in (last, finetune, convex, predict):
        monkeypatch.setattr(part, "measure", here)


@pytest.mark.slow
def test_each_contender_has_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Options(stage="convex", classes=3, rows=[20], device="cpu")) == 0
    said = capsys.readouterr()
    assert "measuring convex_solver" in said.err and "GB" in said.out


@pytest.mark.slow
@pytest.mark.parametrize("part", [last, finetune, convex], ids=["last", "finetune", "convex"])
def test_each_part_makes_its_table(part: Any, images: Path, in_one_process: None) -> None:
    options = Options(
        size=32, batch=2, images=4, classes=3, epochs=2, rows=[40], root=images, device="cpu"
    )
    table = part.table(replace(options, pooling="sqrt", project=8))
    labels = list(table.columns[0].cells)
    assert len(labels) >= 1
    assert part is not finetune or labels[-1] == "with pooling=sqrt, project=8"
    assert all("GB" in cell for cell in table.columns[-1].cells)


def test_a_pooling_that_there_is_not_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(UserError, match="squareroot"):
        finetune.table(Options(device="cpu", pooling="squareroot"))


def test_prediction_is_compared_on_the_same_photographs(
    images: Path, in_one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "find_spec", lambda _: None)  # the export takes its time
    options = Options(size=32, batch=2, images=4, classes=3, root=images, device="cpu")
    table = predict.table(options)
    assert list(table.columns[0].cells)[:2] == ["a plain loop", "bcnn.cli.predict"]
    assert all(float(rate) > 0 for rate in table.columns[2].cells)
    assert table.row_count == 4 and "ONNX Runtime is not installed" in str(table.caption)


def test_loading_is_compared_on_the_same_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SIZES", ((80, 60), (400, 300)))
    monkeypatch.setattr(data, "measure", lambda contender, options: contender(options))
    monkeypatch.setenv("BCNN_STORES", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "set by a contender")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    model = BCNN(["a", "b"])
    torch.nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    options = Options(size=32, batch=2, images=4, ckpt=tmp_path / "model.pth", device="cpu")
    console = Console(width=200)
    with console.capture() as shown:
        console.print(data.table(options))
    lines = [line.split("│") for line in shown.get().splitlines() if "│" in line]
    assert [line[2].strip() for line in lines] == ["plain", "bcnn", "with data.cache=true"] * 2
    assert lines[0][1].strip() == "80 × 60 px" and lines[3][1].strip() == "400 × 300 px"
    assert list((tmp_path / "bcnn" / "reduced").glob("*/*.jpg"))
    assert "of 4 photographs decoded at a reduced scale" in " ".join(shown.get().split())


def test_photographs_of_a_seed_are_the_same_and_of_a_photograph_s_weight(tmp_path: Path) -> None:
    for name in ("a", "b"):
        photographs.write(tmp_path / name, (500, 375), 2)
    first, second = sorted((tmp_path / "a").iterdir())
    assert first.read_bytes() == (tmp_path / "b" / first.name).read_bytes() != second.read_bytes()
    assert 0.3 < first.stat().st_size / (500 * 375) < 0.7  # bytes a pixel


def test_unknown_options_are_one_sentence(python: Run) -> None:
    run = python("-m", "benchmarks", "sise=32", PYTHONPATH=str(ROOT))
    assert run.returncode == 1 and "sise" in run.stderr and "Traceback" not in run.stderr
