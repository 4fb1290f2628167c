"""Export: only a file that agrees with the model gets its name."""

from pathlib import Path

import pytest
import torch

from bcnn.models import export
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.models.export import compare, export_model
from bcnn.utils.errors import UserError


def test_a_file_that_agrees_is_kept(tiny: BCNN, images: Path, tmp_path: Path) -> None:
    path, seen = tmp_path / "out" / "tiny.safetensors", []
    path.parent.mkdir()
    paths = sorted(images.glob("test/*/*.png"))
    watch = lambda batches: (seen.append(batch) or batch for batch in batches)  # noqa: E731
    difference, largest = export_model(tiny, path, "safetensors", images=paths, progress=watch)
    assert difference == 0 < largest and len(seen) == len(paths)
    assert load_model(path).description() == tiny.description()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_disagrees_is_not_kept(
    tiny: BCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, _ = export.FORMATS["safetensors"]
    monkeypatch.setitem(export.FORMATS, "safetensors", (write, lambda path: lambda x: tiny(x) + 1))
    with pytest.raises(UserError, match="would differ from the model by 1"):
        export_model(tiny, tmp_path / "tiny.safetensors", "safetensors")
    assert not list(tmp_path.iterdir())


def test_a_difference_that_is_not_a_number_is_kept_in_view(tiny: BCNN) -> None:
    tiny.backbone.features.weight.data *= torch.nan
    difference, largest = compare(tiny, tiny, [torch.zeros(1, 3, 32, 32)])
    assert difference != difference and largest != largest


def test_weights_have_no_softmax(tiny: BCNN, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a state dict holds no layers"):
        export_model(tiny, tmp_path / "tiny.safetensors", "safetensors", softmax=True)
