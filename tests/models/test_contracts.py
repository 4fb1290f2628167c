"""What the network asks of every backbone and every pooling that there is."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build, configure, folder_data
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bcnn.data.transforms import Preprocessing
from bcnn.models import backbones, pooling
from bcnn.models.attribution import shares
from bcnn.models.backbones import Backbone
from bcnn.models.bilinear_cnn import BCNN, make_backbone, make_pooling
from bcnn.models.bilinear_cnn import build as build_network
from bcnn.models.checkpoint import load_model, save_model
from bcnn.models.export import FORMATS
from bcnn.models.head import Head
from bcnn.models.pooling import Pooling
from bcnn.models.registry import names
from bcnn.training.feature_data import CachedFeatureDataModule, StoredRows
from bcnn.training.logistic_regression import ConvexProblem
from bcnn.utils.errors import UserError

POOLINGS = names(pooling)
OPTIONS = {"timm": {"model": "resnet10t"}}  # of the backbones that cannot do without
BACKBONES = [{"name": name, **OPTIONS.get(name, {})} for name in names(backbones)]

# Each as it is by default, and what its options make of it.
CHOICES: list[dict[str, Any]] = [
    *({"name": name} for name in POOLINGS),
    {"name": "bilinear", "root": None},
    {"name": "sqrt", "centred": True},
    {"name": "sqrt", "power": 0.75, "root": "signed"},
    {"name": "newton_schulz", "centred": True},
    {"name": "compact", "width": 40, "root": None},
    {"name": "democratic", "gamma": 0.25, "root": None},
]


@pytest.fixture(scope="module", params=BACKBONES, ids=lambda choice: choice["name"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return make_backbone(**request.param)


@pytest.fixture(params=CHOICES, ids=lambda choice: " ".join(map(str, choice.values())))
def pool(request: pytest.FixtureRequest) -> Pooling:
    return make_pooling(5, **request.param).double()


WIDE, FEW = (4, 3), (1, 3)  # more places than the 5 channels, and fewer


def maps(batch: int = 3, places: tuple[int, int] = WIDE) -> Tensor:
    """Of ReLUs: not negative."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 5, *places, dtype=torch.float64, generator=generator)


def test_maps_are_as_the_backbone_says(backbone: Backbone) -> None:
    height, width = 2 * backbone.min_size, 3 * backbone.min_size
    pixels = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    with torch.no_grad():
        found = backbone(pixels)
        torch.testing.assert_close(backbone(pixels.float() / 255), found)
    assert found.shape == (2, backbone.channels, height // backbone.stride, width // backbone.stride)
    least = backbone(torch.rand(1, 3, backbone.min_size, backbone.min_size))
    assert min(least.shape[2:]) >= 2


def test_a_backbone_normalises(backbone: Backbone) -> None:
    images = torch.rand(1, 3, backbone.min_size, backbone.min_size)
    with torch.no_grad():
        backbone.set_normalization([0, 0, 0], [1, 1, 1])
        plain = backbone(images)
        backbone.set_normalization([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        shifted = backbone(images * backbone.std + backbone.mean)
    torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=1e-4)


def test_a_backbone_refuses_other_shapes(backbone: Backbone) -> None:
    for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, backbone.min_size - 1, 64)):
        with pytest.raises(ValueError, match="expected"):
            backbone(torch.rand(shape))


def test_layers_are_opened_from_each_up(backbone: Backbone) -> None:
    trained = []
    for name in (None, *backbone.layers):
        backbone.unfreeze_from(name)
        trained.append(sum(p.numel() for p in backbone.parameters() if p.requires_grad))
    assert trained[0] == trained[1] and trained[1:] == sorted(trained[1:], reverse=True)
    assert trained[-1] > 0


@pytest.mark.parametrize("way", ["grad_checkpointing", "compiling"])
def test_neither_checkpointing_nor_compiling_changes_a_gradient(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    # Traced and differentiated ahead of time, but not made into machine code, for want of a compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    images = torch.rand(3, 3, backbone.min_size, backbone.min_size)
    backbone.unfreeze_from(None)
    gradients = []
    for on in (False, True):
        setattr(backbone, way, on)
        gradients.append(torch.autograd.grad(backbone(images).sum(), [*backbone.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-3)
    assert not {"maps", "_compiled"} & {*backbone.state_dict()}


@pytest.mark.parametrize("places", [WIDE, FEW])
def test_rows_are_of_unit_length_and_of_the_width_that_is_said(
    pool: Pooling, places: tuple[int, int]
) -> None:
    rows = pool(maps(3, places))
    assert rows.shape == (3, pool.width) and rows.dtype == torch.float64
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("places", [WIDE, FEW])
def test_rows_know_no_order_of_the_places_and_no_other_image(
    pool: Pooling, places: tuple[int, int]
) -> None:
    rows = pool(maps(3, places))
    torch.testing.assert_close(pool(maps(3, places).flip(3)), rows)
    torch.testing.assert_close(pool(maps(3, places)[1:2]), rows[1:2])


@pytest.mark.parametrize("places", [WIDE, FEW])
def test_pooled_rows_are_homogeneous_in_the_masses(pool: Pooling, places: tuple[int, int]) -> None:
    x = maps(3, places)
    mass = torch.rand(3, x[0, 0].numel(), dtype=torch.float64) + 0.5
    torch.testing.assert_close(
        pool.pool(x, 4 * mass), 4**pool.degree * pool.pool(x, mass), rtol=1e-7, atol=1e-7
    )
    torch.testing.assert_close(pool.pool(x, torch.ones_like(mass)), pool.pool(x))


def test_a_location_that_counts_twice_is_as_good_as_two(pool: Pooling) -> None:
    mass = torch.ones(3, 3, dtype=torch.float64)
    mass[:, 0] = 2
    x = maps(3, FEW)
    expected = pool(torch.cat([x, x[..., :1]], dim=3))
    torch.testing.assert_close(nn.functional.normalize(pool.pool(x, mass)), expected)


@pytest.mark.parametrize("places", [WIDE, FEW])
def test_gradients_are_right(pool: Pooling, places: tuple[int, int]) -> None:
    direction = torch.randn(pool.width, generator=torch.Generator().manual_seed(1)).double()
    assert torch.autograd.gradcheck(lambda x: pool(x) @ direction, maps(2, places).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_of_float32_under_autocast(pool: Pooling, dtype: torch.dtype) -> None:
    x = (1e3 * maps()).to(dtype)  # whose squares float16 does not hold
    single = pool.float()
    with torch.autocast("cpu", dtype=dtype):
        rows = single(x)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), pool.double()(x.double()), rtol=0, atol=2e-5)


def test_hard_maps_have_finite_rows_and_gradients(pool: Pooling) -> None:
    for hard in (
        torch.zeros(5, 12),  # of which the row is zero, too
        torch.ones(5, 1) @ torch.rand(1, 12),  # one direction
        torch.eye(5, 12),  # equal eigenvalues
        torch.rand(5, 12) * torch.tensor([1, 0, 1, 0, 1.0])[:, None],  # dead channels
        torch.rand(5, 2).repeat(1, 6),  # repeated places
    ):
        for scale in (1e-4, 1.0, 1e3):
            x = (scale * hard.view(1, 5, 4, 3)).requires_grad_()
            rows = pool.float()(x)
            (gradient,) = torch.autograd.grad(rows.sum(), x)
            assert rows.isfinite().all() and gradient.isfinite().all()
            assert bool(rows.any()) == bool(hard.any()) or getattr(pool, "centred", False)


@pytest.mark.fuzz
@given(
    st.sampled_from(CHOICES),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 9),
    st.sampled_from([1e-8, 1e-4, 1.0, 1e4]),
    st.integers(0, 2**32),
)
def test_maps_of_any_rank_have_finite_rows_and_gradients(
    choice: dict[str, Any], channels: int, places: int, rank: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, rank, generator=generator) for n in (channels, places))
    x = (scale * left @ right.mT).relu().view(1, channels, 1, places).requires_grad_()
    pool = make_pooling(channels, **choice)
    rows = pool(x)
    (gradient,) = torch.autograd.grad(rows, x, torch.randn(rows.shape, generator=generator))
    assert rows.isfinite().all() and gradient.isfinite().all()
    length = float(rows.detach().norm())
    # `normalize` takes a row under 1e-12 for zero; a covariance may be.
    assert abs(length - 1) < 1e-5 or x.max() < 1e-5 or choice.get("centred")
    torch.testing.assert_close(rows.double(), pool.double()(x.double()), rtol=0, atol=1e-3)


def test_maps_that_are_not_finite_have_rows_that_are_not(pool: Pooling) -> None:
    for places in (WIDE, FEW):
        x = maps(2, places)
        x[0, 2, 0, 1] = torch.nan
        finite = pool(x).isfinite().all(dim=1)
        assert finite.tolist() == [False, True]


def small(pooling: Pooling, classes: int = 2) -> BCNN:
    """A network on maps of as many channels as the pooling takes, with a head drawn at random."""
    torch.manual_seed(0)
    model = BCNN([str(k) for k in range(classes)], Preprocessing(64))
    convolution = nn.Conv2d(3, pooling.channels, 3, stride=16)
    model.backbone.features = nn.Sequential(convolution, nn.ReLU())
    model.pooling, model.head = pooling, Head(pooling.width, classes)
    for tensor in (model.head.weight, model.head.bias):
        nn.init.normal_(tensor)
    model.head.mean.normal_(std=0.01)
    return model.eval()


@pytest.mark.parametrize("places", [WIDE, FEW])
def test_evidence_sums_to_the_logit(pool: Pooling, places: tuple[int, int]) -> None:
    model = small(pool).double()
    found = shares(model, maps(2, places), torch.tensor([0, 1]))
    logits = model.head(pool(maps(2, places))).diagonal()
    torch.testing.assert_close(found.sum(dim=(1, 2)), logits, rtol=1e-9, atol=1e-9)
    assert not shares(model, 0 * maps(2, places), torch.tensor([0, 1])).any()


@pytest.mark.parametrize("name", POOLINGS)
def test_a_network_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    chosen = {"name": name, "seed": 3} if name == "compact" else {"name": name}
    model = BCNN(["a", "b"], Preprocessing(48, "squash"), pooling=chosen)
    nn.init.normal_(model.head.weight)
    again = build_network(model.description())
    assert again.description() == model.description()
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    images = torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", POOLINGS)
def test_its_rows_are_stored_and_solved(name: str, images: Path) -> None:
    torch.manual_seed(0)
    folder = folder_data(images)
    model = BCNN(folder.classes, folder.preprocessing, pooling={"name": name})
    data = build(CachedFeatureDataModule(folder, model, "32-true"))
    rows = StoredRows(data.store, data.rows(folder.train))
    labels = torch.tensor([label for _, label in folder.train])
    solution = ConvexProblem(rows, labels, len(folder.classes)).solve(1e-6)
    assert solution.weight.shape == (3, model.pooling.width)
    assert (solution.logits.argmax(dim=1) == labels).all() and solution.gradient_norm < 1e-5


class Side(Pooling):
    """Rows of several poolings side by side: exporters are slow, and are asked once for all."""

    def __init__(self, poolings: list[Pooling]) -> None:
        super().__init__(poolings[0].channels)
        self.poolings = nn.ModuleList(poolings)
        self.width = sum(each.width for each in poolings)

    def exportable(self) -> Pooling:
        return Side([each.exportable() for each in self.poolings])

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([each(maps) for each in self.poolings], dim=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_other_programs_compute_its_logits(kind: str, tmp_path: Path) -> None:
    poolings = [make_pooling(8, name) for name in POOLINGS]
    model, (write, read) = small(Side(poolings), len(POOLINGS)), FORMATS[kind]
    # A class for each, on its rows alone.
    blocks = torch.block_diag(*(torch.ones(1, each.width) for each in poolings))
    model.head.weight.data *= blocks
    write(model, tmp_path / f"model.{kind}", False)
    program = read(tmp_path / f"model.{kind}")
    for count in (1, 3):
        pixels = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(program(pixels), model(pixels), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", POOLINGS)
def test_its_options_are_in_the_configuration(name: str) -> None:
    chosen = configure(f"model/pooling={name}").model.pooling
    assert chosen.name == name
    assert make_pooling(5, **chosen).width == make_pooling(5, name).width
    assert (ROOT / "conf" / "model" / "pooling" / f"{name}.yaml").read_text().startswith("# ")


def test_what_there_is_not_is_said() -> None:
    with pytest.raises(UserError, match=r"there is no pooling os: choose from .*bilinear"):
        make_pooling(5, "os")
    with pytest.raises(UserError, match=r"there is no backbone vgg61: choose from .*vgg16"):
        make_backbone("vgg61")
    with pytest.raises(UserError, match=r"the pooling bilinear: .*power"):
        make_pooling(5, "bilinear", power=3)
    for name, wrong in (
        ("bilinear", {"root": "cube"}),
        ("sqrt", {"power": 0}),
        ("sqrt", {"power": "half"}),
        ("compact", {"width": 0}),
        ("compact", {"root": "cube"}),
        ("democratic", {"gamma": 2}),
    ):
        ((option, value),) = wrong.items()
        with pytest.raises(UserError, match=rf"model\.pooling\.{option}={value}: "):
            make_pooling(5, name, **wrong)
