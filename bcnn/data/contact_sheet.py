"""Contact sheets: some images of every class in one picture, and pairs that look the same."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from bcnn.data.image_io import load_image
from bcnn.data.index import Samples
from bcnn.utils.console import printable
from bcnn.utils.files import atomic_write

THUMB = 96  # px, side of an image
CAPTION = 20  # px, height of the line above images
COLUMNS = 16  # images side by side
MOST_CLASSES = 1600
MOST_PAIRS = 200

_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def contact_sheet(classes: list[str], samples: Samples, picture: Path) -> None:
    """Write a PNG with images of each of the first `MOST_CLASSES` in a row under count and name."""
    members: list[list[str]] = [[] for _ in classes]
    for path, label in samples:
        members[label].append(path)
    shown = min(len(classes), MOST_CLASSES)
    each = next((n for n in (8, 4, 2) if shown * n <= 20 * COLUMNS), 1)  # images a class
    cells = []
    for name, paths in zip(classes[:shown], members, strict=False):
        # Evenly far apart: neighbours are often of one scene.
        some = [paths[i * len(paths) // each] for i in range(each)] if len(paths) > each else paths
        cells.append(_cell(f"{len(paths)} {name}", some, each * THUMB, THUMB))
    _save_grid(cells, picture)


def pair_sheet(pairs: Sequence[tuple[str, str]], picture: Path) -> None:
    """Write a PNG of the first `MOST_PAIRS` side by side, under the names of folders and files."""
    paths = itertools.chain(*pairs[:MOST_PAIRS])
    side = 2 * THUMB
    _save_grid([_cell("/".join(Path(p).parts[-2:]), [p], side, side) for p in paths], picture)


def _cell(caption: str, paths: list[str], width: int, side: int) -> Image.Image:
    """Draw images side by side under a caption; one that is too long ends at the cell's edge."""
    cell = Image.new("RGB", (width, CAPTION + side), "white")
    ImageDraw.Draw(cell).text((2, 3), printable(caption), "black", ImageFont.truetype(_FONT, 12))
    for column, path in enumerate(paths):
        image = ImageOps.contain(load_image(path, side), (side - 2, side - 2))
        cell.paste(image, (column * side, CAPTION))
    return cell


def _save_grid(cells: list[Image.Image], picture: Path) -> None:
    across = COLUMNS * THUMB // cells[0].width
    grid = make_grid([pil_to_tensor(cell) for cell in cells], across, padding=0, pad_value=255)
    with atomic_write(picture) as part:
        to_pil_image(grid).save(part)
