"""The contract of every backbone."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bcnn.models.backbones import BACKBONES, Backbone, make_backbone
from bcnn.utils.errors import UserError

OPTIONS = {"timm": {"model": "resnet10t"}}  # without which a backbone cannot be made


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return make_backbone(request.param, **OPTIONS.get(request.param, {}))


def test_maps_have_the_shape_that_the_attributes_state(backbone: Backbone) -> None:
    height, width = 2 * backbone.min_size, 3 * backbone.min_size
    pixels = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    with torch.no_grad():
        found = backbone(pixels)
        torch.testing.assert_close(backbone(pixels.float() / 255), found)
    assert found.shape == (2, backbone.channels, height // backbone.stride, width // backbone.stride)
    least = backbone(torch.rand(1, 3, backbone.min_size, backbone.min_size))
    assert min(least.shape[2:]) >= 2


def test_a_backbone_normalises_images(backbone: Backbone) -> None:
    images = torch.rand(1, 3, backbone.min_size, backbone.min_size)
    with torch.no_grad():
        backbone.set_normalization([0, 0, 0], [1, 1, 1])
        plain = backbone(images)
        backbone.set_normalization([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        shifted = backbone(images * backbone.std + backbone.mean)
    torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 31, 64)])
def test_other_shapes_are_refused(backbone: Backbone, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected images of shape"):
        backbone(torch.rand(shape))


def test_layers_are_unfrozen_from_each_up(backbone: Backbone) -> None:
    trained = []
    for name in (None, *backbone.layers):
        backbone.unfreeze_from(name)
        trained.append(sum(p.numel() for p in backbone.parameters() if p.requires_grad))
    assert trained[0] == trained[1] and trained[1:] == sorted(trained[1:], reverse=True)
    assert trained[-1] > 0


@pytest.mark.parametrize("training", [None, True])
def test_no_pass_changes_a_buffer(backbone: Backbone, training: bool | None) -> None:
    """Neither as constructed nor in training: BatchNorm keeps its statistics."""
    if training is not None:
        backbone.train(training)
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone(torch.rand(2, 3, backbone.min_size, backbone.min_size)).sum().backward()
    for name, buffer in backbone.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("way", ["grad_checkpointing", "compiling"])
def test_neither_checkpointing_nor_compiling_changes_a_gradient(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    # Traced and differentiated ahead of time, without a compiler for machine code.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    images = torch.rand(3, 3, backbone.min_size, backbone.min_size)
    backbone.unfreeze_from(None)
    gradients = []
    for on in (False, True):
        setattr(backbone, way, on)
        gradients.append(torch.autograd.grad(backbone(images).sum(), [*backbone.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-3)
    assert not {"maps", "_compiled"} & {*backbone.state_dict()}


@pytest.mark.parametrize("project", [0, 513, True, 2.5])
def test_a_projection_to_another_number_of_channels_is_refused(project: Any) -> None:
    with pytest.raises(UserError, match=rf"model\.project={project}: .* from 1 to 512"):
        make_backbone("vgg16", project=project)


class Bare(Backbone):
    """Two convolutions of stride 4 with padding of a choice."""

    channels, stride, min_size = 1, 16, 48

    def __init__(self, kernels: tuple[int, int], padding: tuple[int, int]) -> None:
        super().__init__()
        inputs = zip((3, 1), kernels, padding, strict=True)
        self.features = nn.Sequential(*(nn.Conv2d(n, 1, k, 4, p) for n, k, p in inputs))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)


@pytest.mark.parametrize("kernels", [(5, 5), (4, 4), (7, 3)])
@pytest.mark.parametrize("padding", [(0, 0), (2, 1), (3, 3), (1, 0)])
def test_the_middle_of_the_first_location_follows_from_kernels_and_padding(
    kernels: tuple[int, int], padding: tuple[int, int]
) -> None:
    backbone = Bare(kernels, padding)
    (first, second), (one, two) = kernels, padding
    expected = first / 2 - one + 4 * ((second - 1) / 2 - two)
    as_many = backbone.locations(48) == 3
    assert backbone.offset == (8 if as_many else expected)
    assert abs(backbone.offset - expected) <= 8
