"""The mathematics, against plain loops and float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bcnn.model.pooling.bilinear import Bilinear, bilinear_pool, pack, packed_size, unpack


def bilinear_descriptor(maps: Tensor) -> Tensor:
    return Bilinear(maps.shape[1])(maps)


SHAPES = [(1, 4, 2, 2), (3, 7, 5, 3), (2, 16, 1, 6)]


def plain_full_descriptor(features: Tensor) -> Tensor:
    """The original's formula, an outer product at a time: (batch, channels²)."""
    channels, height, width = features.shape[1:]
    rows = []
    for image in features:
        pooled = torch.zeros(channels, channels, dtype=features.dtype)
        for y in range(height):
            for x in range(width):
                pooled = pooled + torch.outer(image[:, y, x], image[:, y, x])
        flat = (pooled / (height * width)).flatten()
        flat = torch.sign(flat) * torch.sqrt(flat.abs() + 1e-10)
        rows.append(flat / max(flat.norm().item(), 1e-12))
    return torch.stack(rows)


def features(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_descriptor_is_the_packed_form_of_the_original_formula(shape: tuple[int, ...]) -> None:
    x = features(shape)
    full = plain_full_descriptor(x).view(shape[0], shape[1], shape[1])
    packed = bilinear_descriptor(x)
    assert packed.shape == (shape[0], packed_size(shape[1]))
    torch.testing.assert_close(unpack(packed), full, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(packed, pack(full), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_head_gives_the_same_logits_and_gradients_at_the_features(
    shape: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, shape[1] ** 2, generator=generator, dtype=torch.float64)
    packed_weight = pack(weight.view(5, shape[1], shape[1]))
    for_full, for_packed = features(shape).requires_grad_(), features(shape).requires_grad_()
    full_logits = F.linear(F.normalize(_full(for_full)), weight)
    packed_logits = F.linear(bilinear_descriptor(for_packed), packed_weight)
    torch.testing.assert_close(packed_logits, full_logits, rtol=1e-12, atol=1e-13)
    targets = torch.zeros(shape[0], dtype=torch.long)
    F.cross_entropy(full_logits, targets).backward()
    F.cross_entropy(packed_logits, targets).backward()
    torch.testing.assert_close(for_packed.grad, for_full.grad, rtol=1e-11, atol=1e-13)


def test_packed_head_follows_the_same_sgd_trajectory() -> None:
    x, targets = features((12, 6, 3, 3)), torch.arange(12) % 3
    full_rows, packed_rows = F.normalize(_full(x)), bilinear_descriptor(x)
    full = torch.nn.Linear(36, 3, dtype=torch.float64)
    packed = torch.nn.Linear(21, 3, dtype=torch.float64)
    with torch.no_grad():
        packed.weight.copy_(pack(full.weight.view(3, 6, 6)))
        packed.bias.copy_(full.bias)
    losses: list[list[float]] = [[], []]
    for history, head, rows in zip(losses, (full, packed), (full_rows, packed_rows), strict=True):
        sgd = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-2)
        for _ in range(100):
            sgd.zero_grad()
            loss = F.cross_entropy(head(rows), targets)
            loss.backward()
            sgd.step()
            history.append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)


def test_pack_and_unpack_are_inverse_and_keep_inner_products() -> None:
    a, b = features((4, 9, 9)), features((4, 9, 9), seed=1)
    a, b = (a + a.mT) / 2, (b + b.mT) / 2
    torch.testing.assert_close(unpack(pack(a)), a, rtol=1e-15, atol=0)
    torch.testing.assert_close((pack(a) * pack(b)).sum(1), (a * b).sum((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_of_1e3_keep_the_small_entries(dtype: torch.dtype) -> None:
    x = torch.full((1, 3, 4, 4), 1e3)
    x[:, 1] = 0.01
    x[:, 2] = 1.0
    half = x.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        pooled, descriptor = bilinear_pool(half), bilinear_descriptor(half)
    assert pooled.dtype == descriptor.dtype == torch.float32
    exact = half.double()
    torch.testing.assert_close(
        pooled.double(), torch.einsum("bchw,bdhw->bcd", exact, exact) / 16, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(descriptor.double(), bilinear_descriptor(exact), rtol=1e-5, atol=0)
    assert (descriptor > 0).all()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_float32_gradients_agree_with_float64_with_dead_channels(scale: float) -> None:
    x = features((2, 24, 5, 5)).relu() * scale
    x[:, ::3] = 0
    exact = x.clone().requires_grad_()
    single = x.float().requires_grad_()
    direction = features((2, packed_size(24)), seed=2)
    (bilinear_descriptor(exact) * direction).sum().backward()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = (bilinear_descriptor(single) * direction.float()).sum()
    loss.backward()
    assert exact.grad is not None and single.grad is not None
    error = (single.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-5


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_gradients_through_float16_features_and_a_scaled_loss_agree_with_float64(scale: float) -> None:
    x = features((4, 24, 5, 5)).relu() * scale
    x[:, ::3] = 0  # dead channels
    x[0] = 0  # an all-zero map
    half = x.half()
    exact = half.double().requires_grad_()  # what the features are in float16, seen in float64
    half.requires_grad_()
    direction = features((4, packed_size(24)), seed=2) * scale  # so that no gradient underflows
    (bilinear_descriptor(exact) * direction).sum().backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = (bilinear_descriptor(half) * direction.float()).sum()
    scaler.scale(loss).backward()
    assert exact.grad is not None and half.grad is not None
    found = half.grad.double() / scaler.get_scale()
    error = (found - exact.grad).norm() / exact.grad.norm()
    assert torch.isfinite(found).all() and not found[0].any()
    assert error < 2**-10  # float16 rounds each entry of the gradient once


def test_an_all_zero_map_has_a_zero_descriptor_and_finite_gradients() -> None:
    x = torch.zeros(2, 8, 3, 3, requires_grad=True)
    descriptor = bilinear_descriptor(x)
    descriptor.sum().backward()
    assert x.grad is not None
    assert not descriptor.any() and torch.isfinite(x.grad).all()


def test_packed_size_of_vgg16_features() -> None:
    assert packed_size(512) == 131_328 == 512 * 513 // 2
    assert math.isclose(512**2 / packed_size(512), 2, rel_tol=0.01)


def _full(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    pooled = (flat @ flat.mT / flat.shape[2]).flatten(1)
    return pooled.sign() * (pooled.abs() + 1e-10).sqrt()
