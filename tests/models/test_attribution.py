"""Attribution: what the shares sum to, and what autograd says."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcnn.data.transforms import Preprocessing
from bcnn.models.attribution import evidence, shares
from bcnn.models.bilinear_cnn import BCNN


@pytest.fixture(scope="module")
def model() -> BCNN:
    """In float64, with weights, biases and centering mean drawn at random."""
    torch.manual_seed(0)
    model = BCNN(list("abcd"), Preprocessing(64)).double()
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    model.head.mean.normal_(std=0.003)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 64, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


TARGET, AGAINST = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 0])


def test_shares_sum_to_the_difference_of_two_logits(model: BCNN, images: Tensor) -> None:
    """The contract of poolings has those of one logit."""
    logits, each = model(images), torch.arange(3)
    found = evidence(model, images, TARGET, AGAINST)
    assert found.shape == (3, 4, 5) and not found.requires_grad
    expected = logits[each, TARGET] - logits[each, AGAINST]
    torch.testing.assert_close(found.sum((1, 2)), expected, rtol=0, atol=5e-6)


def test_a_share_is_a_part_of_the_logit_and_twice_the_gradient(model: BCNN, images: Tensor) -> None:
    """By autograd through the descriptor: its weights on the locations scale each x_p x_pᵀ."""
    maps = model.backbone(images).detach()
    weights = torch.ones_like(maps[:, :1]).requires_grad_()
    logits = model.head(model.pooling(maps * weights.sqrt()))[torch.arange(3), TARGET]
    (gradient,) = torch.autograd.grad(logits.sum(), weights)
    norm = F.normalize(maps.sum(1).flatten(1) ** 2, p=1).view(gradient[:, 0].shape)
    expected = norm * logits.detach()[:, None, None] + 2 * gradient[:, 0]
    torch.testing.assert_close(shares(model, maps, TARGET), expected, rtol=1e-6, atol=1e-7)
    # The gradient alone is no attribution: it sums to zero, whatever the logit.
    assert gradient.sum().abs() < 1e-5 * gradient.abs().sum()


def test_shares_are_float32_under_autocast(model: BCNN, images: Tensor) -> None:
    single = BCNN(model.classes)
    single.load_state_dict(model.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        got = evidence(single, images.float(), TARGET)
        logits = single(images.float())[torch.arange(3), TARGET]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.sum((1, 2)), logits, rtol=1e-4, atol=1e-4)
