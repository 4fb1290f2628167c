"""docs/scale.md, computed again."""

import re

import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from bcnn.data.transforms import Preprocessing
from bcnn.models.bilinear_cnn import BCNN
from bcnn.training.feature_store import VIEWS

TEXT = (ROOT / "docs" / "scale.md").read_text()
H100 = 300e12  # FLOP/s, as the text assumes
EPOCHS = 10


def numbers(row: str, of: str) -> list[str]:
    """Cells of a row by its first, in the table whose first heading is `of`."""
    table = TEXT[TEXT.index(f"| {of} |") :]
    line = re.search(rf"^\| {re.escape(row)} \|.*$", table, re.MULTILINE)
    assert line is not None
    return [cell.strip() for cell in line[0].strip("|").split("|")][1:]


def flop(side: int) -> float:
    """Of the features, for one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        BCNN(["a"]).backbone.eval()(torch.zeros(1, 3, side, side))
    return float(counter.get_total_flops())


def widths() -> list[int]:
    with torch.device("meta"):
        return [BCNN(["a"], project=channels).pooling.width for channels in (None, 128)]


def size(number: float) -> str:
    digits = 0 if number >= 10 else 1 if number >= 1 else 2 if number >= 0.045 else 3
    return f"{number:,.{digits}f} GB"


def span(seconds: float) -> str:
    units = (("h", 3600), ("min", 60), ("s", 1))
    unit, length = next(each for each in units if seconds >= 1.65 * each[1] or each[0] == "s")
    number = seconds / length
    return f"{number:.{0 if number >= 9.5 else 1}f} {unit}"


def test_images() -> None:
    side = 400  # nine tenths of 448, to a multiple of the stride
    transform = Preprocessing(448, divisor=16).training(0.5)
    assert transform.transforms[1].size == (side, side)
    forward, crop = flop(448), flop(side)
    assert f"{forward / 1e9:.0f} GFLOP through the features at 448 px" in TEXT
    assert f"{crop / 1e9:.0f} GFLOP at 400 px" in TEXT
    assert f"{H100 / (3 * crop):,.0f} images a second" in TEXT
    for count in (10**4, 10**6, 10**8):
        last, finetune = count * VIEWS * forward, count * EPOCHS * 3 * crop
        stores = [size(count * VIEWS * width * 2 / 1e9) for width in widths()]
        times = [span(finetune / H100 / gpus) for gpus in (1, 64)]
        expected = [f"{last:.1e} FLOP", span(last / H100), *stores, f"{finetune:.1e} FLOP", *times]
        assert numbers(f"{count:,}", "images") == expected


def test_images_that_the_convex_solver_takes() -> None:
    """A matrix of images × images at 12 bytes, or of short descriptors at 4."""
    assert "1.7 GB for 12,000 images" in TEXT
    assert f"up to {12 * 12_000**2 // (4 * widths()[1]):,} images" in TEXT.replace("\n  ", " ")


def test_classes() -> None:
    for count in (100, 1000, 10_000):
        sizes = [count * width * 4 / 1e9 for width in widths()]
        cells = [f"{factor * size:.2g} GB" for size in sizes for factor in (1, 3)]
        assert numbers(f"{count:,}", "classes") == cells
