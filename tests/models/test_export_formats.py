"""Export: only a file that agrees with the model gets its name."""

from pathlib import Path

import pytest

from bcnn.models import export
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model
from bcnn.models.export import export_model
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


@pytest.mark.parametrize("error", [1, float("nan")])
def test_a_file_that_disagrees_is_not_kept(
    tiny: BCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    write, _ = export.FORMATS["safetensors"]
    monkeypatch.setitem(export.FORMATS, "safetensors", (write, lambda path: lambda x: tiny(x) + error))
    with pytest.raises(UserError, match=f"would differ from the model by {error}"):
        export_model(tiny, tmp_path / "tiny.safetensors", "safetensors")
    assert not list(tmp_path.iterdir())


def test_weights_have_no_softmax(tiny: BCNN, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a state dict holds no layers"):
        export_model(tiny, tmp_path / "tiny.safetensors", "safetensors", softmax=True)
