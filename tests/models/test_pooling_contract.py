"""The contract of every pooling, with its default options and with others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import configure
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bcnn.data.transforms import Preprocessing
from bcnn.models.attribution import shares
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import load_model, save_model
from bcnn.models.export import FORMATS
from bcnn.models.head import Head
from bcnn.models.pooling import POOLINGS, Pooling, make_pooling
from bcnn.utils.errors import UserError

CHOICES: list[dict[str, Any]] = [
    *({"name": name} for name in POOLINGS),
    {"name": "bilinear", "root": None},
    {"name": "sqrt", "centred": True},
    {"name": "sqrt", "power": 0.75, "root": "signed"},
    {"name": "newton_schulz", "centred": True},
    {"name": "compact", "width": 40, "root": None},
    {"name": "democratic", "gamma": 0.25, "root": None},
]


@pytest.fixture(params=CHOICES, ids=lambda choice: " ".join(map(str, choice.values())))
def pool(request: pytest.FixtureRequest) -> Pooling:
    return make_pooling(5, **request.param).double()


WIDE, FEW = (4, 3), (1, 3)  # more locations than the 5 channels, and fewer
GRIDS = pytest.mark.parametrize("grid", [WIDE, FEW])


def maps(batch: int = 3, grid: tuple[int, int] = WIDE) -> Tensor:
    """Random maps in float64, not negative, as after a ReLU."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 5, *grid, dtype=torch.float64, generator=generator)


@GRIDS
def test_descriptors_have_unit_length_and_depend_on_no_order_of_locations_and_no_other_image(
    pool: Pooling, grid: tuple[int, int]
) -> None:
    descriptors = pool(maps(3, grid))
    assert descriptors.shape == (3, pool.width) and descriptors.dtype == torch.float64
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(pool(maps(3, grid).flip(3)), descriptors)
    torch.testing.assert_close(pool(maps(3, grid)[1:2]), descriptors[1:2])


@GRIDS
def test_descriptors_are_homogeneous_in_the_masses(pool: Pooling, grid: tuple[int, int]) -> None:
    x = maps(3, grid)
    mass = torch.rand(3, x[0, 0].numel(), dtype=torch.float64) + 0.5
    torch.testing.assert_close(
        pool.pool(x, 4 * mass), 4**pool.degree * pool.pool(x, mass), rtol=1e-7, atol=1e-7
    )
    torch.testing.assert_close(pool.pool(x, torch.ones_like(mass)), pool.pool(x))


def test_a_location_of_mass_two_equals_two_locations(pool: Pooling) -> None:
    mass = torch.ones(3, 3, dtype=torch.float64)
    mass[:, 0] = 2
    x = maps(3, FEW)
    expected = pool(torch.cat([x, x[..., :1]], dim=3))
    torch.testing.assert_close(nn.functional.normalize(pool.pool(x, mass)), expected)


@GRIDS
def test_gradients_are_right(pool: Pooling, grid: tuple[int, int]) -> None:
    direction = torch.randn(pool.width, generator=torch.Generator().manual_seed(1)).double()
    assert torch.autograd.gradcheck(lambda x: pool(x) @ direction, maps(2, grid).requires_grad_())


@pytest.mark.fuzz
@given(
    st.sampled_from(CHOICES),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)),
    st.sampled_from([1e-8, 1e-4, 1.0, 1e4]),
    st.integers(0, 2**32),
)
def test_maps_of_any_rank_have_finite_descriptors_and_gradients(
    choice: dict[str, Any], shape: tuple[int, int, int], scale: float, seed: int
) -> None:
    channels, locations, rank = shape
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, rank, generator=generator) for n in (channels, locations))
    x = (scale * left @ right.mT).relu().view(1, channels, 1, locations).requires_grad_()
    pool = make_pooling(channels, **choice)
    descriptors = pool(x)
    direction = torch.randn(descriptors.shape, generator=generator)
    (gradient,) = torch.autograd.grad(descriptors, x, direction)
    assert descriptors.isfinite().all() and gradient.isfinite().all()
    length = float(descriptors.detach().norm())
    # `normalize` takes lengths under 1e-12 for zero; a covariance may be zero.
    assert abs(length - 1) < 1e-5 or x.max() < 1e-5 or choice.get("centred")
    torch.testing.assert_close(descriptors.double(), pool.double()(x.double()), rtol=0, atol=1e-3)


def test_maps_that_are_not_finite_have_descriptors_that_are_not(pool: Pooling) -> None:
    for grid in (WIDE, FEW):
        x = maps(2, grid)
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
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    model.head.mean.normal_(std=0.01)
    return model.eval()


@GRIDS
def test_evidence_sums_to_the_logit(pool: Pooling, grid: tuple[int, int]) -> None:
    model = small(pool).double()
    found = shares(model, maps(2, grid), torch.tensor([0, 1]))
    logits = model.head(pool(maps(2, grid))).diagonal()
    torch.testing.assert_close(found.sum(dim=(1, 2)), logits, rtol=1e-9, atol=1e-9)
    assert not shares(model, 0 * maps(2, grid), torch.tensor([0, 1])).any()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", POOLINGS)
def test_a_network_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    chosen = {"name": name, "seed": 3} if name == "compact" else {"name": name}
    model = BCNN(["a", "b"], Preprocessing(32, "squash"), {"name": "tiny"}, chosen)
    nn.init.normal_(model.head.weight)
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.description() == model.description()
    images = torch.rand(1, 3, 48, 48)
    assert torch.equal(loaded(images), model(images))


class Side(Pooling):
    """Several poolings side by side: exporters are slow, and one call serves all."""

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
    # A class for each, on its own descriptors.
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
    assert make_pooling(5, **chosen).width == make_pooling(5, name).width


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("bilinear", "root", "cube"), ("sqrt", "power", 0), ("democratic", "gamma", 2)],
)
def test_an_option_out_of_its_range_is_refused(name: str, option: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"model\.pooling\.{option}={value}: "):
        make_pooling(5, name, **{option: value})


def test_the_name_alone_of_another_pooling_is_refused() -> None:
    """The options stay those of the pooling before, which it does not take."""
    chosen = configure("data=folder", "model.pooling.name=sqrt").model.pooling
    with pytest.raises(UserError, match=r"argument 'candidates'; model/pooling=sqrt changes name and"):
        make_pooling(5, **chosen)
