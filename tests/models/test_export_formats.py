"""Export: only a file that agrees with the model gets its name."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from bcnn.data.transforms import Preprocessing
from bcnn.models import export
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.models.export import export_model
from bcnn.models.quantization import Precision
from bcnn.utils.errors import UserError

ERRORS: dict[Precision, float] = {"float16": 0.02, "int8": 0.5}  # of the largest logit


def test_a_file_that_agrees_is_kept(tiny: BCNN, images: Path, tmp_path: Path) -> None:
    path, seen = tmp_path / "out" / "tiny.safetensors", []
    path.parent.mkdir()
    paths = sorted(images.glob("test/*/*.png"))
    watch = lambda batches: (seen.append(batch) or batch for batch in batches)  # noqa: E731
    difference, largest, agreement = export_model(
        tiny, path, "safetensors", images=paths, progress=watch
    )
    assert difference == 0 < largest and agreement == 1 and len(seen) == len(paths)
    assert load_model(path).description() == tiny.description()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [1, float("nan")])
def test_a_file_that_disagrees_is_not_kept(
    tiny: BCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    write, _ = export.FORMATS["safetensors"]
    monkeypatch.setitem(export.FORMATS, "safetensors", (write, lambda path: lambda x: tiny(x) + error))
    with pytest.raises(UserError, match=f"would differ from the model by {error}"):
        export_model(tiny, tmp_path / "tiny.safetensors", "safetensors")
    assert not list(tmp_path.iterdir())


def test_classes_in_another_order_are_found_beside_any_novelty(
    calibrated: BCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calibrated.calibration
    calibrated.calibration.moments /= 1e3  # so that novelty is a thousand times a probability
    write, read = export.FORMATS["onnx"]

    def reverse(path: Path) -> Callable[[Tensor], Tensor]:
        outputs = read(path)
        return lambda x: outputs(x)[:, [2, 1, 0, 3]]

    export_model(calibrated, tmp_path / "right.onnx", softmax=True)
    monkeypatch.setitem(export.FORMATS, "onnx", (write, reverse))
    with pytest.raises(UserError, match="would differ from the model"):
        export_model(calibrated, tmp_path / "wrong.onnx", softmax=True)


@pytest.fixture
def small() -> BCNN:
    """A CNN of several convolutions, of random weights."""
    torch.manual_seed(0)
    backbone = {"name": "timm", "model": "test_efficientnet"}
    model = BCNN(["blue", "green", "red"], Preprocessing(64), backbone, {"name": "sqrt"}, project=8)
    nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.mark.slow
def test_a_smaller_onnx_file_describes_itself_and_classifies_alike(
    small: BCNN, images: Path, tmp_path: Path
) -> None:
    paths = sorted(images.glob("train/*/*.png"))
    whole = tmp_path / "whole.onnx"
    assert export_model(small, whole, images=paths).agreement == 1
    before = onnx.load(whole)
    for precision, error in ERRORS.items():
        smaller = tmp_path / f"{precision}.onnx"
        found = export_model(small, smaller, images=paths, precision=precision)
        assert found.agreement >= 0.8 and 0 < found.difference < error * found.largest
        assert smaller.stat().st_size < 0.8 * whole.stat().st_size
        after = onnx.load(smaller)
        described, again = ({x.key: x.value for x in file.metadata_props} for file in (before, after))
        assert "classes" in described and described.items() <= again.items()
        assert [each.name for each in before.graph.output] == [x.name for x in after.graph.output]
        types = {x.data_type for x in after.graph.initializer if "head" in x.name}
        assert types == {onnx.TensorProto.FLOAT}


@pytest.mark.slow
def test_activations_of_one_image_at_a_time_are_in_memory(
    small: BCNN, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.quantization.calibrate import HistogramCalibrater

    collect, counts = HistogramCalibrater.collect_data, list[int]()

    def counting(self: Any, reader: Any) -> None:
        batches = [*iter(reader.get_next, None)]
        counts.append(len(batches))
        collect(self, SimpleNamespace(get_next=partial(next, iter(batches), None)))

    monkeypatch.setattr(HistogramCalibrater, "collect_data", counting)
    paths = sorted(images.glob("test/*/*.png"))
    export_model(small, tmp_path / "small.onnx", images=paths, precision="int8")
    assert counts == [1] * len(paths)


def test_a_backbone_of_few_convolutions_has_no_smaller_file(tiny: BCNN, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float16 is for convolutional backbones"):
        export_model(tiny, tmp_path / "tiny.onnx", precision="float16")
    assert not list(tmp_path.iterdir())


def test_executorch_computes_the_same(small: BCNN, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("executorch")  # it wants versions of its own of other packages
    paths = sorted(images.glob("train/*/*.png"))
    found = export_model(small, tmp_path / "m.pte", "pte", softmax=True, images=paths)
    assert found.agreement == 1 and found.difference < 1e-4
    whole = BCNN(small.classes, replace(small.preprocessing, resize="whole"), **small.chosen)
    with pytest.raises(UserError, match="takes images of one size"):
        export_model(whole.eval(), tmp_path / "whole.pte", "pte")


def test_weights_have_no_softmax(tiny: BCNN, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a state dict holds no layers"):
        export_model(tiny, tmp_path / "tiny.safetensors", "safetensors", softmax=True)
