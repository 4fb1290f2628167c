"""Maps projected to the principal axes of a data set's local features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import folder_data
from torch import nn

from bcnn.models.bilinear_cnn import BCNN, make_backbone
from bcnn.training.pca import fit_principal_axes, principal_axes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_axes_are_those_of_a_singular_value_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([3.0, 1.0, 0.3, 2.0]).view(4, 1, 1)
    batches = [torch.randn(n, 4, 5, 6, generator=generator) * scale + 7 for n in (3, 2)]
    x = np.concatenate([maps.numpy().transpose(1, 0, 2, 3).reshape(4, -1) for maps in batches], axis=1)
    u = np.linalg.svd(x.astype(np.float64) - x.mean(axis=1, keepdims=True))[0]
    found = principal_axes(batches).double().numpy()
    np.testing.assert_allclose(np.abs(found @ u), np.eye(4), atol=1e-4)
    assert (np.take_along_axis(found, np.abs(found).argmax(1)[:, None], 1) > 0).all()


def test_axes_are_of_the_images_and_found_once(
    images: Path, tiny: BCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch normalisation uses its constants, in whatever mode the backbone was."""
    data, backbone = folder_data(images), make_backbone("tiny", project=3)
    backbone.features = nn.Sequential(backbone.features, nn.BatchNorm2d(4))
    backbone.features[1].running_mean.fill_(0.5)
    before = {name: tensor.clone() for name, tensor in backbone.named_buffers()}
    nn.Module.train(backbone, True)
    fit_principal_axes(backbone, data, CPU, "32-true")
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.named_buffers())
    weight = backbone.projection.weight[:, :, 0, 0]
    torch.testing.assert_close(weight @ weight.mT, torch.eye(3))
    with torch.no_grad():
        maps = torch.cat([backbone.eval().unprojected(x) for x, _ in data.sample_dataloader()])
        torch.testing.assert_close(weight, principal_axes([maps])[:3])
    monkeypatch.setattr("bcnn.training.pca.principal_axes", None)
    again = make_backbone("tiny", project=4)
    again.features = backbone.features
    fit_principal_axes(again, data, CPU, "32-true")
    torch.testing.assert_close(again.projection.weight[:3, :, 0, 0], weight)
    with pytest.raises(TypeError):  # other pixels have other axes
        fit_principal_axes(again, folder_data(images, interpolation="bicubic"), CPU, "32-true")
