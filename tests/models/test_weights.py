"""The weights that a backbone starts from, and their normalisation."""

import hashlib
from pathlib import Path

import pytest
import torch
from conftest import network
from safetensors.torch import save_file
from torch import Tensor

from bcnn.models.backbones.vgg16 import PUBLISHED
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import save_model
from bcnn.models.weights import initialise_backbone
from bcnn.utils.errors import UserError

IMAGENET = torch.tensor([0.485, 0.456, 0.406])


@pytest.fixture(scope="module")
def features() -> dict[str, Tensor]:
    """Weights under torchvision's names."""
    state = network(seed=1).backbone.features.state_dict()
    return {f"features.{name}": value.contiguous() for name, value in state.items()}


def weights(model: BCNN) -> Tensor:
    return model.backbone.features[28].weight


def test_a_file_names_its_normalisation_or_the_user_does(
    features: dict[str, Tensor], tmp_path: Path
) -> None:
    path, model = tmp_path / "features.safetensors", network()
    save_file(features, path, metadata={"convention": "as IMAGENET1K_FEATURES"})
    initialise_backbone(model, str(path))
    torch.testing.assert_close(model.backbone.std, torch.full((3, 1, 1), 1 / 255))
    torch.testing.assert_close(weights(model), features["features.28.weight"])
    save_file(features, path)
    with pytest.raises(UserError, match=r"model\.normalization"):
        initialise_backbone(model, str(path))
    initialise_backbone(model, str(path), normalization="imagenet")
    torch.testing.assert_close(model.backbone.mean.flatten(), IMAGENET)


def test_torchvisions_file_is_known_by_its_name(features: dict[str, Tensor], tmp_path: Path) -> None:
    path, model = tmp_path / "vgg16-397923af.pth", network()
    torch.save(features, path, _use_new_zipfile_serialization=False)  # as torchvision's
    for asked in (None, "imagenet_features"):  # which a run then refuses
        initialise_backbone(model, str(path), asked)
        torch.testing.assert_close(model.backbone.mean.flatten(), IMAGENET)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_whole_model_gives_its_features_and_normalisation(tmp_path: Path, suffix: str) -> None:
    trained, model = network(seed=1), network()
    initialise_backbone(trained, "random")
    save_model(trained, tmp_path / f"whole{suffix}")
    initialise_backbone(model, str(tmp_path / f"whole{suffix}"))
    torch.testing.assert_close(weights(model), weights(trained))
    torch.testing.assert_close(model.backbone.mean.flatten(), IMAGENET)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"small\.pth is of another network: it has no "):
        initialise_backbone(network(), str(tmp_path / "small.pth"), "imagenet")
    with pytest.raises(UserError, match=r"pretrained: no such file; this backbone has imagenet, "):
        initialise_backbone(network(), "pretrained")


def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> Path:
    """Have torchvision download from `url` to an empty folder of torch.hub's."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(PUBLISHED["imagenet"].value, "url", url)
    return tmp_path / "hub" / "checkpoints"


def test_a_download_is_checked_and_kept(
    features: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(features, tmp_path / "plain.pth")
    digest = hashlib.sha256((tmp_path / "plain.pth").read_bytes()).hexdigest()[:8]
    served = (tmp_path / "plain.pth").rename(tmp_path / f"vgg16-{digest}.pth")
    kept = serve(monkeypatch, tmp_path, served.as_uri())
    model = network()
    initialise_backbone(model, "imagenet")
    torch.testing.assert_close(weights(model), features["features.28.weight"])
    served.unlink()
    initialise_backbone(network(), "imagenet")  # from the copy that was kept
    assert [file.name for file in kept.iterdir()] == [served.name]


@pytest.mark.parametrize("content", [None, b"half a file"], ids=["no network", "another hash"])
def test_a_failed_download_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    served = tmp_path / "vgg16-00000000.pth"
    if content:
        served.write_bytes(content)
    kept = serve(monkeypatch, tmp_path, served.as_uri())
    with pytest.raises(UserError, match="put ") as refusal:
        initialise_backbone(network(), "imagenet")
    assert served.as_uri() in str(refusal.value) and str(kept / served.name) in str(refusal.value)
    assert not kept.exists() or not list(kept.iterdir())
