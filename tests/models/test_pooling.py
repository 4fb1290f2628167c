"""The mathematics of the poolings, against plain loops and float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bcnn.models.pooling import POOLINGS, make_pooling
from bcnn.models.pooling.bilinear import Bilinear, pack, packed_size, unpack
from bcnn.utils.errors import UserError

SHAPES = [(1, 4, 2, 2), (3, 7, 5, 3), (2, 16, 1, 6)]


def plain_full_descriptor(features: Tensor) -> Tensor:
    """The original's formula: (batch, channels, channels)."""
    mean = torch.einsum("bihw,bjhw->bij", features, features) / features[0, 0].numel()
    rooted = torch.sign(mean) * torch.sqrt(mean.abs() + 1e-10)
    return rooted / torch.linalg.matrix_norm(rooted, keepdim=True)


def features(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_descriptor_is_the_packed_form_of_the_original_formula(shape: tuple[int, ...]) -> None:
    x = features(shape)
    full, packed = plain_full_descriptor(x), Bilinear(shape[1])(x)
    assert packed.shape == (shape[0], packed_size(shape[1]))
    torch.testing.assert_close(unpack(packed), full, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(packed, pack(full), rtol=1e-13, atol=1e-15)


def test_pack_and_unpack_are_inverse_and_keep_inner_products() -> None:
    a, b = features((4, 9, 9)), features((4, 9, 9), seed=1)
    a, b = (a + a.mT) / 2, (b + b.mT) / 2
    torch.testing.assert_close(unpack(pack(a)), a, rtol=1e-15, atol=0)
    torch.testing.assert_close((pack(a) * pack(b)).sum(1), (a * b).sum((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("name", POOLINGS)
def test_gradients_through_features_of_low_precision_and_a_scaled_loss_agree_with_float64(
    name: str, scale: float, dtype: torch.dtype
) -> None:
    pool = make_pooling(24, name)
    x = features((4, 24, 5, 5)).relu() * scale
    x[:, ::3] = 0  # dead channels
    x[0] = 0  # an all-zero map
    low = x.to(dtype)
    exact = low.double().requires_grad_()  # the same numbers
    low.requires_grad_()
    direction = features((4, pool.width), seed=2) * scale  # so that no gradient underflows
    (pool(exact) * direction).sum().backward()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = (pool(low) * direction.float()).sum() * 2**8
    loss.backward()
    found = low.grad.double() / 2**8
    error = (found - exact.grad).norm() / exact.grad.norm()
    assert torch.isfinite(found).all() and not found[0].any()
    # float16 rounds each entry of the gradient once; newton_schulz's rounding is 1/SMALLEST as large.
    single = 2e-4 if name == "newton_schulz" else 1e-5
    assert error < (2**-10 if dtype == torch.float16 else single)


# Entries of the upper triangle of (1, 2, 3)ᵀ(1, 2, 3), row by row. Stored weights rely on the order.
ONE_LOCATION = torch.tensor([[1, 2 * 2**0.5, 3 * 2**0.5, 4, 6 * 2**0.5, 9]]).double() / 14


@pytest.mark.parametrize(
    ("name", "options"),
    [("bilinear", {"root": None}), ("sqrt", {}), ("newton_schulz", {}), ("democratic", {"root": None})],
)
def test_the_order_of_the_entries_is_frozen(name: str, options: dict[str, None]) -> None:
    x = torch.tensor([1.0, 2.0, 3.0]).double().view(1, 3, 1, 1)
    rows = make_pooling(3, name, **options)(x)
    torch.testing.assert_close(rows, ONE_LOCATION, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (2, 12, 2, 3), (1, 6, 2, 3)])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", ["sqrt", "newton_schulz"])
def test_the_root_times_itself_is_the_matrix(name: str, centred: bool, shape: tuple[int, ...]) -> None:
    x = features(shape).relu()
    root = unpack(make_pooling(shape[1], name, centred=centred).pool(x))
    flat = x.flatten(2).numpy()
    for image, found in zip(flat, root, strict=True):
        plain = np.cov(image, bias=True) if centred else image @ image.T / image.shape[1]
        bound = 1e-4 if name == "newton_schulz" else 1e-12
        np.testing.assert_allclose(found @ found, plain, rtol=0, atol=bound)
        assert np.linalg.eigvalsh(found).min() > -1e-9


@pytest.mark.parametrize("grid", [(5, 3), (1, 4)])
def test_other_powers_are_the_root_again_and_the_matrix_itself(grid: tuple[int, int]) -> None:
    x = features((2, 6, *grid))
    half, quarter, whole = (unpack(make_pooling(6, "sqrt", power=p).pool(x)) for p in (0.5, 0.25, 1))
    torch.testing.assert_close(quarter @ quarter, half)
    torch.testing.assert_close(whole, Bilinear(6).matrix(x))


# Singular values fall as those of VGG-16's relu5_3 do, from 1 to 1e-3.
LIKE_REAL_IMAGES = "like real images"


def hard_maps() -> dict[str, Tensor]:
    """Maps of 64 channels and 81 locations, in float32."""
    x = features((2, 64, 9, 9)).relu().float()
    dead = x.clone()
    dead[:, ::3] = 0
    u, v = (torch.linalg.qr(features((2, n, 64), seed=n))[0] for n in (64, 81))
    return {
        LIKE_REAL_IMAGES: ((u * torch.logspace(0, -3, 64)) @ v.mT).float().view(2, 64, 9, 9),
        "noise": x,
        "few locations": x[..., :3, :3],
        "dead channels": dead,
        "repeated locations": x[..., :1].expand_as(x),
        "one direction": x[..., :1, :1].expand_as(x),
        "equal eigenvalues": torch.eye(64, 81).view(1, 64, 9, 9),
        "a large mean": 1e3 + x,
        "eigenvalues over twelve orders": x * torch.logspace(0, -6, 64)[:, None, None],
    }


@pytest.mark.parametrize("kind", hard_maps())
def test_float32_roots_of_hard_maps(kind: str) -> None:
    x = hard_maps()[kind]
    u, s, _ = torch.linalg.svd(x.double().flatten(2), full_matrices=False)
    exact = F.normalize(pack(u * s[:, None] @ u.mT))
    iterated = 5e-4 if kind == LIKE_REAL_IMAGES else 5e-3
    for name, bound in (("sqrt", 5e-5), ("newton_schulz", iterated)):
        for scale in (1e-6, 1, 1e4):
            found = make_pooling(64, name)(scale * x).double()
            assert (found - exact).norm(dim=1).max() < bound


def test_gradients_of_the_root_at_equal_eigenvalues_are_right() -> None:
    """Where autograd through an eigendecomposition gives nan."""
    x = torch.eye(4, 6, dtype=torch.float64).view(1, 4, 2, 3)
    for power in (0.5, 0.25):
        root = make_pooling(4, "sqrt", power=power)
        assert torch.autograd.gradcheck(root.pool, x.clone().requires_grad_())


def test_the_root_has_an_exact_form_in_onnx_for_its_own_power_alone() -> None:
    root = make_pooling(4, "sqrt", centred=True, root="signed")
    x = features((2, 4, 3, 3))
    torch.testing.assert_close(root.exportable()(x), root(x), rtol=0, atol=1e-2)
    with pytest.raises(UserError, match=r"no form of the pooling sqrt with power=0\.25: use pt2"):
        make_pooling(4, "sqrt", power=0.25).exportable()


def test_a_sketch_is_the_tensor_sketch_of_every_location() -> None:
    pool = make_pooling(6, "compact", width=16, root=None)
    x = features((2, 6, 3, 2))
    rows = torch.zeros(2, 16, dtype=torch.float64)
    for row, image in zip(rows, x.flatten(2), strict=True):
        for location in image.T:
            signed = pool.signs * location
            counts = [torch.bincount(h, v, 16) for h, v in zip(pool.hashes, signed, strict=True)]
            row += torch.fft.ifft(torch.fft.fft(torch.stack(counts)).prod(dim=0)).real / 6
    torch.testing.assert_close(pool.pool(x), rows, rtol=1e-12, atol=1e-14)


def test_a_sketch_is_drawn_by_its_own_seed() -> None:
    state = torch.get_rng_state()
    pool = make_pooling(6, "compact")
    assert torch.equal(torch.get_rng_state(), state)
    # Frozen: stored weights rely on them.
    assert pool.hashes[0].tolist() == [2732, 2607, 1653, 3264, 4931, 4859]
    assert pool.signs[1].tolist() == [-1.0, 1.0, -1.0, 1.0, 1.0, -1.0]
    assert not torch.equal(make_pooling(6, "compact", seed=1).hashes, pool.hashes)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_democratic_weights_equalise_contributions(gamma: float) -> None:
    x = features((2, 8, 3, 2)).relu()
    x[0, :, 0, 0] = 0  # a location without features
    matrices = unpack(make_pooling(8, "democratic", gamma=gamma, root=None).pool(x))
    for image, matrix in zip(x.flatten(2).numpy(), matrices, strict=True):
        kernel = (image.T @ image / (image**2).sum(axis=0).max()) ** 2
        alone = kernel.sum(axis=1)
        weights = np.ones(6)
        for _ in range(10):
            contribution = weights * (kernel @ weights)
            weights = weights * np.sqrt(alone**gamma / np.where(alone > 0, contribution, 1))
        plain = sum(w * np.outer(f, f) for w, f in zip(weights, image.T, strict=True)) / 6
        np.testing.assert_allclose(matrix, plain, rtol=1e-10, atol=1e-14)
        contribution = weights * (kernel @ weights)
        np.testing.assert_allclose(contribution, np.where(alone > 0, alone**gamma, 0), rtol=0.05)
