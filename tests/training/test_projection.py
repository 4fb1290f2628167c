"""Maps projected to the principal axes of a set's local features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import configure, folder_data, toy
from torch import nn

from bcnn.data.transforms import Preprocessing
from bcnn.models.attribution import evidence
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model, save_model
from bcnn.models.pooling.bilinear import packed_size
from bcnn.training.feature_data import CachedFeatureDataModule
from bcnn.training.pca import fit_projection, principal_axes
from bcnn.training.run import run
from bcnn.utils.errors import UserError

CPU = torch.device("cpu")


def projected(channels: int = 4) -> BCNN:
    torch.manual_seed(0)
    return BCNN(["blue", "green", "red"], Preprocessing(32), project=channels)


def test_axes_are_those_of_a_singular_value_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([3.0, 1.0, 0.3, 2.0]).view(4, 1, 1)
    batches = [torch.randn(n, 4, 5, 6, generator=generator) * scale + 7 for n in (3, 2)]
    x = np.concatenate([maps.numpy().transpose(1, 0, 2, 3).reshape(4, -1) for maps in batches], axis=1)
    u = np.linalg.svd(x.astype(np.float64) - x.mean(axis=1, keepdims=True))[0]
    found = principal_axes(batches).double().numpy()
    np.testing.assert_allclose(np.abs(found @ u), np.eye(4), atol=1e-4)
    assert (np.take_along_axis(found, np.abs(found).argmax(1)[:, None], 1) > 0).all()


def test_axes_are_of_the_images_and_found_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder_data(images)
    model = projected()
    fit_projection(model.backbone, data, CPU, "32-true")
    weight = model.backbone.projection.weight[:, :, 0, 0]
    torch.testing.assert_close(weight @ weight.mT, torch.eye(4))
    with torch.no_grad():
        maps = torch.cat([model.backbone.unprojected(batch) for batch, _ in data.sample_dataloader()])
        torch.testing.assert_close(weight, principal_axes([maps])[:4])
    monkeypatch.setattr("bcnn.training.pca.principal_axes", None)
    again = projected(9)
    again.backbone.features.load_state_dict(model.backbone.features.state_dict())
    fit_projection(again.backbone, data, CPU, "32-true")
    torch.testing.assert_close(again.backbone.projection.weight[:4, :, 0, 0], weight)
    with pytest.raises(TypeError):  # of other pixels, they are looked for
        fit_projection(again.backbone, folder_data(images, interpolation="bicubic"), CPU, "32-true")


def test_axes_that_are_damaged_are_found_again(
    images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = folder_data(images)
    weights = []
    for _ in range(2):
        model = projected()
        fit_projection(model.backbone, data, CPU, "32-true")
        weights.append(model.backbone.projection.weight)
        (file,) = (tmp_path / "cache" / "bcnn" / "axes").iterdir()
        file.write_bytes(file.read_bytes()[:1000])
    torch.testing.assert_close(*weights)


def test_stores_of_other_projections_are_others(images: Path) -> None:
    data = folder_data(images)
    folders = set()
    for channels in (None, 4, 5):
        model = BCNN(data.classes, data.preprocessing, project=channels)
        folders.add(CachedFeatureDataModule(data, model, "32-true").store.folder)
    assert len(folders) == 3


def test_shares_of_a_logit_sum_to_it() -> None:
    model = projected().eval()
    nn.init.normal_(model.head.weight)
    images, target = torch.rand(2, 3, 64, 64), torch.tensor([0, 2])
    with torch.no_grad():
        logits = model(images)[[0, 1], target]
    torch.testing.assert_close(evidence(model, images, target).sum(dim=(1, 2)), logits)


def test_both_stages(images: Path, tmp_path: Path) -> None:
    options = ["model.project=6", "model/pooling=sqrt", "finetune.epochs=1", "finetune.batch_size=6"]
    run(
        configure(
            *toy(images, *options, "finetune.unfreeze_from=conv5_3", f"output={tmp_path / 'out'}")
        )
    )
    before = load_model(tmp_path / "out" / "last" / "best.ckpt")
    after = load_model(tmp_path / "out" / "finetune" / "best.ckpt")
    assert before.chosen["project"] == 6 and before.head.weight.shape == (3, packed_size(6))
    moved = (before.backbone.projection.weight - after.backbone.projection.weight).abs().max()
    assert moved > 0
    save_model(after, tmp_path / "model.safetensors")
    again, pixels = load_model(tmp_path / "model.safetensors"), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again.predict(pixels), after.predict(pixels))
    with pytest.raises(UserError, match="the original's layout is for"):
        save_model(after, tmp_path / "model.pth")


@pytest.mark.parametrize("project", ["0", "513", "few", "1.5"])
def test_mistakes_are_sentences(images: Path, tmp_path: Path, project: str) -> None:
    cfg = configure(*toy(images, f"model.project={project}", f"output={tmp_path / 'out'}"))
    with pytest.raises(UserError, match=f"model.project={project}: a whole number from 1 to 512"):
        run(cfg)
