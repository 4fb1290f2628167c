"""What the network asks of every backbone and every pooling that there is."""

import pytest
import torch
from torch import Tensor, nn

from bcnn.data.transforms import Framing
from bcnn.errors import UserError
from bcnn.model import backbones, pooling
from bcnn.model.backbones import Backbone
from bcnn.model.evidence import evidence
from bcnn.model.network import BCNN, build, make_backbone, make_pooling
from bcnn.model.pooling import Pooling
from bcnn.model.registry import names

BACKBONES, POOLINGS = names(backbones), names(pooling)


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return make_backbone(request.param)


@pytest.fixture(params=POOLINGS)
def pool(request: pytest.FixtureRequest) -> Pooling:
    return make_pooling(5, request.param)


def maps(batch: int = 3) -> Tensor:
    """Of ReLUs: not negative."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 5, 4, 3, dtype=torch.float64, generator=generator)


def test_maps_are_as_the_backbone_says(backbone: Backbone) -> None:
    height, width = 2 * backbone.smallest, 3 * backbone.smallest
    pixels = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    with torch.no_grad():
        found = backbone(pixels)
        torch.testing.assert_close(backbone(pixels.float() / 255), found)
    assert found.shape == (2, backbone.channels, height // backbone.stride, width // backbone.stride)
    least = backbone(torch.rand(1, 3, backbone.smallest, backbone.smallest))
    assert min(least.shape[2:]) >= 2


def test_a_backbone_normalises(backbone: Backbone) -> None:
    images = torch.rand(1, 3, backbone.smallest, backbone.smallest)
    with torch.no_grad():
        plain = backbone(images)
        backbone.set_normalization([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        shifted = backbone(images * backbone.std + backbone.mean)
        backbone.set_normalization([0, 0, 0], [1, 1, 1])
    torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=1e-4)


def test_a_backbone_refuses_other_shapes(backbone: Backbone) -> None:
    for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, backbone.smallest - 1, 64)):
        with pytest.raises(ValueError, match="expected"):
            backbone(torch.rand(shape))


def test_layers_are_opened_from_each_up(backbone: Backbone) -> None:
    trained = []
    for name in (None, *backbone.layers):
        backbone.open_from(name)
        trained.append(sum(p.numel() for p in backbone.parameters() if p.requires_grad))
    assert trained[0] == trained[1] and trained[1:] == sorted(trained[1:], reverse=True)
    assert trained[-1] > 0


def test_checkpointing_changes_no_gradient(backbone: Backbone) -> None:
    images = torch.rand(3, 3, backbone.smallest, backbone.smallest)
    backbone.open_from(None)
    gradients = []
    for checkpointing in (False, True):
        backbone.checkpointing = checkpointing
        gradients.append(torch.autograd.grad(backbone(images).sum(), [*backbone.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-3)


def test_rows_are_of_unit_length_and_of_the_width_that_is_said(pool: Pooling) -> None:
    rows = pool(maps())
    assert rows.shape == (3, pool.width) and rows.dtype == torch.float64
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3, dtype=torch.float64))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert pool(maps().to(dtype)).dtype == torch.float32
    assert not pool(torch.zeros(1, 5, 2, 2)).any()


def test_rows_know_no_order_of_the_places_and_no_other_image(pool: Pooling) -> None:
    rows = pool(maps())
    torch.testing.assert_close(pool(maps().flip(3)), rows)
    torch.testing.assert_close(pool(maps()[1:2]), rows[1:2])


def test_pooled_rows_are_homogeneous_in_the_masses(pool: Pooling) -> None:
    mass = torch.rand(3, 12, dtype=torch.float64) + 0.5
    torch.testing.assert_close(
        pool.pool(maps(), 4 * mass), 4**pool.degree * pool.pool(maps(), mass), rtol=1e-7, atol=1e-7
    )
    torch.testing.assert_close(pool.pool(maps(), torch.ones_like(mass)), pool.pool(maps()))


def test_gradients_are_right(pool: Pooling) -> None:
    assert torch.autograd.gradcheck(pool, maps(2).requires_grad_())


@pytest.mark.parametrize("name", POOLINGS)
def test_evidence_sums_to_the_logit(name: str) -> None:
    torch.manual_seed(0)
    model = BCNN(["a", "b"], Framing(64), pooling={"name": name}).double()
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    model.head.mean.normal_(std=0.003)
    images = torch.rand(2, 3, 64, 80, dtype=torch.float64)
    shares = evidence(model, images, torch.tensor([0, 1]))
    torch.testing.assert_close(shares.sum(dim=(1, 2)), model(images).diagonal(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", POOLINGS)
def test_a_network_is_made_again_from_its_description(name: str) -> None:
    model = BCNN(["a", "b"], Framing(48, "squash"), pooling={"name": name})
    again = build(model.description())
    assert again.description() == model.description()
    again.load_state_dict(model.state_dict())


def test_what_there_is_not_is_said() -> None:
    with pytest.raises(UserError, match=r"there is no pooling os: choose from .*bilinear"):
        make_pooling(5, "os")
    with pytest.raises(UserError, match="there is no backbone vgg61: choose from vgg16"):
        make_backbone("vgg61")
    with pytest.raises(UserError, match=r"the pooling bilinear: .*power"):
        make_pooling(5, "bilinear", power=3)
