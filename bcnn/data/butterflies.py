"""A drawn fine-grained image set: ten butterfly species that differ subtly.

A wing is a fan: its outline is a spline around the hinge, and `at(u, rho)` is the point `u` of the way
along the outer margin and `rho` of the way out from the hinge. Borders, bands, veins and spots are
polygons in these coordinates; one matrix moves them to the canvas.
"""

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

from bcnn.utils.console import track
from bcnn.utils.errors import UserError

Array = NDArray[Any]

SIZE = (192, 160)
_FINE = 2  # everything is drawn this much larger and scaled down: that smooths the edges
_RECORD = "butterflies.json"
_CELLS = 6  # the spaces between the veins along a wing's margin


@dataclass(frozen=True)
class Species:
    """The traits of a species; all else varies from one individual to the next."""

    name: str
    ground: str  # the colour of the wings: "amber", "russet", "azure" or "straw"
    band: str = ""  # "pale" or "dark" across both wings, or none
    eyes: tuple[int, int] = (0, 0)  # eye-spots on a forewing (0-1) and on a hindwing (0-3)
    spots: bool = False  # a row of dark spots across both wings
    pearls: bool = False  # pale dots in the dark border
    tips: bool = False  # white blotches at the tip of the forewing
    edge: str = "smooth"  # of the hindwing: "smooth", "scalloped" or "tailed"


SPECIES = (
    Species("amber_ringlet", "amber", eyes=(1, 3)),
    Species("amber_checker", "amber", spots=True, pearls=True, edge="scalloped"),
    Species("amber_emperor", "amber", band="dark", tips=True, edge="scalloped"),
    Species("russet_argus", "russet", eyes=(1, 1), pearls=True),
    Species("russet_leopard", "russet", spots=True, eyes=(1, 0), edge="scalloped"),
    Species("azure_sailor", "azure", band="pale", pearls=True),
    Species("azure_admiral", "azure", band="pale", tips=True, edge="scalloped"),
    Species("azure_swordtail", "azure", band="pale", eyes=(0, 2), edge="tailed"),
    Species("straw_ringlet", "straw", band="dark", eyes=(1, 3)),
    Species("straw_swordtail", "straw", spots=True, edge="tailed"),
)

_GROUNDS = {
    "amber": np.array([226, 136, 38]),
    "russet": np.array([172, 80, 44]),
    "azure": np.array([92, 138, 200]),
    "straw": np.array([232, 198, 96]),
}
_DARK = np.array([44, 30, 24])
_PALE = np.array([248, 238, 212])
_MEADOW = np.array([[58, 92, 38], [88, 124, 48], [120, 148, 70], [70, 104, 66], [132, 132, 76]])
_PETALS = np.array([[236, 226, 232], [206, 140, 186], [238, 206, 90], [150, 130, 206]])


def write(root: Path, seed: int = 0, train: int = 40, test: int = 20) -> Path:
    """Write the images `root/{train,test}/<species>/0000.jpg ...` unless they are there; return `root`.

    The same seed gives the same bytes. `train` and `test` are numbers of images a species.
    """
    record = json.dumps({"seed": seed, "train": train, "test": test})
    if root.exists():
        file = root / _RECORD
        if file.is_file() and file.read_text() == record:
            return root
        raise UserError(f"{root} is not the butterfly set {record}: train on it with data=folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        made = Path(scratch) / root.name
        write_species = partial(_write_species, made, seed=seed, counts={"train": train, "test": test})
        with ProcessPoolExecutor() as pool:
            written = pool.map(write_species, range(len(SPECIES)))
            list(track(written, "drawing butterflies", len(SPECIES), "species"))
        (made / _RECORD).write_text(record)
        made.rename(root)  # only a finished set has the name
    return root


def _write_species(root: Path, number: int, seed: int, counts: dict[str, int]) -> None:
    for split, (part, count) in enumerate(counts.items()):
        folder = root / part / SPECIES[number].name
        folder.mkdir(parents=True)
        for index in range(count):
            image = draw(number, np.random.default_rng([seed, split, number, index]))
            image.save(folder / f"{index:04d}.jpg", quality=92)


def draw(species: int, rng: Generator) -> Image.Image:
    """Draw an individual of `SPECIES[species]` in a meadow, `SIZE` large."""
    meadow = _meadow(rng)
    insect = Image.new("RGBA", meadow.size)
    _butterfly(ImageDraw.Draw(insect), SPECIES[species], rng)
    shadow = Image.new("L", meadow.size)
    right, down = rng.integers(4, 14, 2).tolist()
    shadow.paste(insect.getchannel("A").point(lambda a: a * 0.5), (right, down))
    meadow.paste((16, 22, 12), mask=shadow.filter(ImageFilter.BoxBlur(6)))
    meadow.paste(insect, mask=insect)
    image = np.asarray(meadow.resize(SIZE, Image.Resampling.LANCZOS))
    # Brightness, warmth, a slope, dark corners, some noise.
    y, x = np.mgrid[-1 : 1 : SIZE[1] * 1j, -1 : 1 : SIZE[0] * 1j]
    slope = rng.uniform(-0.12, 0.12, 2)
    light = 1 + slope[0] * x + slope[1] * y - rng.uniform(0.05, 0.16) * (x**2 + y**2)
    warmth = rng.normal(0, 0.03)
    tint = rng.uniform(0.95, 1.1) * np.array([1 + warmth, 1, 1 - warmth])
    noise = rng.normal(0, rng.uniform(1, 4), (*x.shape, 1))
    lit = image * (light[..., None] * tint) + noise
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class _Pen:
    """Draw shapes given in the frame of a wing, the body or a plant."""

    canvas: ImageDraw.ImageDraw
    frame: Array
    origin: Array

    def fill(self, points: Array, colour: Array) -> None:
        self.canvas.polygon(self._place(points), fill=_ink(colour))

    def line(self, points: Array, colour: Array, width: int = 1) -> None:
        self.canvas.line(self._place(points), fill=_ink(colour), width=width, joint="curve")

    def disc(self, centre: Array, radius: float, colour: Array) -> None:
        self.fill(centre + radius * _circle(16), colour)

    def turned(self, angle: float, mirror: float, shift: tuple[float, float]) -> "_Pen":
        """The pen of a part that hangs on this one, turned and squeezed sideways by `mirror`."""
        frame = self.frame @ np.diag([mirror, 1.0]) @ _rotation(angle)
        return _Pen(self.canvas, frame, self.origin + self.frame @ np.array(shift))

    def _place(self, points: Array) -> list[float]:
        return list((points @ self.frame.T + self.origin).flat)


class _Wing:
    """A right wing, from points round its hinge; its outer margin is from point `start` to `end`."""

    def __init__(self, points: list[tuple[float, float]], start: int, end: int) -> None:
        # A closed smooth curve through the points (Catmull and Rom's).
        t = np.linspace(0, 1, 8, endpoint=False)[:, None, None]
        a, b, c, d = (np.roll(np.array(points, float), k, axis=0) for k in (1, 0, -1, -2))
        curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
        self.outline = np.vstack([curve.transpose(1, 0, 2).reshape(-1, 2), points[:1]])
        self.steps = np.linspace(0, 1, len(self.outline))
        self.start, self.end = start / len(points), end / len(points)

    def at(self, u: ArrayLike, rho: ArrayLike) -> Array:
        """Points `u` of the way along the margin and `rho` of the way from the hinge to it."""
        t = self.start + (self.end - self.start) * np.asarray(u, float)
        edge = np.stack([np.interp(t, self.steps, axis) for axis in self.outline.T], axis=-1)
        return np.asarray(edge * np.asarray(rho, float)[..., None])

    def edge(self, kind: str) -> Array:
        """The outline with its scallops or its tail."""
        u = (self.steps - self.start) / (self.end - self.start)
        grow = {
            "smooth": np.zeros_like(u),
            "scalloped": 0.09 * np.abs(np.sin(np.pi * _CELLS * u)) * ((u > 0) & (u < 1)),
            "tailed": 0.5 * np.exp(-(((u - 0.66) / 0.055) ** 2)),
        }
        return self.outline * (1 + grow[kind])[:, None]


_FORE = _Wing([(0, 0), (0.26, -0.36), (0.62, -0.7), (0.95, -0.86), (1.04, -0.74),
               (0.96, -0.45), (0.9, -0.18), (0.82, 0.06), (0.42, 0.12)], 3, 7)  # fmt: skip
_HIND = _Wing([(0, 0), (0.4, -0.12), (0.72, -0.06), (0.85, 0.18), (0.8, 0.46),
               (0.62, 0.68), (0.38, 0.76), (0.18, 0.64), (0.06, 0.3)], 2, 7)  # fmt: skip


def _butterfly(canvas: ImageDraw.ImageDraw, kind: Species, rng: Generator) -> None:
    centre = np.array(SIZE) / 2 + rng.uniform(-7, 7, 2) + (0, 2)
    shear = np.array([[1, rng.uniform(-0.1, 0.1)], [rng.uniform(-0.1, 0.1), 1]])
    frame = _rotation(rng.uniform(-0.6, 0.6)) @ shear * rng.uniform(54, 63) * _FINE
    body = _Pen(canvas, frame, centre * _FINE)
    ground = _GROUNDS[kind.ground] * rng.uniform(0.9, 1.08) + rng.normal(0, 6, 3)
    sweep, opening = rng.uniform(-0.12, 0.14), rng.uniform(0.8, 1)
    look = int(rng.integers(2**32))  # both sides wear the same pattern
    for side in (-1, 1):
        squeeze = side * opening * rng.uniform(0.93, 1.04)
        twist = sweep + rng.normal(0, 0.04)
        own = np.random.default_rng(look)
        hind = body.turned(-twist, squeeze, (0.03 * side, 0.04))
        shade = ground * rng.uniform(0.92, 1.06)  # the two sides face the light differently
        _wing(hind, _HIND, kind, shade, own)
        fore = body.turned(twist, squeeze, (0.03 * side, -0.06))
        _wing(fore, _FORE, kind, shade * 1.04, own)
    _body(body, rng)


def _wing(pen: _Pen, wing: _Wing, kind: Species, ground: Array, rng: Generator) -> None:
    fore = wing is _FORE
    border = rng.uniform(0.09, 0.12)
    pen.fill(wing.edge("smooth" if fore else kind.edge), _DARK)
    _scales(pen, wing, 1 - border, ground, rng)
    if kind.band:
        colour = _PALE if kind.band == "pale" else _mix(_DARK, ground, 0.25)
        for cell in np.linspace(-0.25, 1.0, 8):  # a block between two veins
            low, high = rng.normal((0.58, 0.72), 0.012)
            u = cell + np.array([0, 0.09, 0.18, 0.18, 0.09, 0])
            pen.fill(wing.at(u, [low, low - 0.02, low, high, high + 0.02, high]), colour)
    # The cell in the middle of the wing and the veins that leave it for the margin.
    vein = _mix(_DARK, ground, 0.3)
    pen.line(wing.at(np.linspace(-0.2, 1, 9), 0.42 + 0.03 * np.cos(np.arange(9) * np.pi)), vein)
    for u in np.linspace(0, 1, _CELLS + 1):
        pen.line(wing.at([u, u], [0.05 if u in (0, 1) else 0.42, 0.97]), vein)
    for u in (np.arange(_CELLS) + 0.5) / _CELLS:
        if kind.spots:
            pen.disc(wing.at(u, 0.58 + rng.normal(0, 0.02)), rng.uniform(0.03, 0.042), _DARK)
        if kind.pearls:
            pen.disc(wing.at(u, 1 - border / 2), rng.uniform(0.02, 0.028), _PALE)
    if kind.tips and fore:
        around = np.r_[np.linspace(-0.3, 0.36, 9), 0.3, 0.1, -0.15]
        pen.fill(wing.at(around, np.r_[np.ones(9), 0.78, 0.72, 0.76]), _DARK)
        for u, rho in ((-0.1, 0.82), (0.07, 0.86), (0.24, 0.84)):
            pen.disc(wing.at(u, rho), rng.uniform(0.035, 0.05), _PALE)
    for u in (0.25,)[: kind.eyes[0]] if fore else (0.62, 0.42, 0.82)[: kind.eyes[1]]:
        centre, radius = wing.at(u, 0.76), rng.uniform(0.07, 0.085)
        pen.disc(centre, radius, _mix(ground, _PALE, 0.75))
        pen.disc(centre, radius * 0.74, _DARK * 0.6)
        pen.disc(centre + radius * np.array([0.2, -0.2]), radius * 0.28, _PALE)


def _scales(pen: _Pen, wing: _Wing, reach: float, ground: Array, rng: Generator) -> None:
    """The coloured field, darker towards the body, with fine strokes from the hinge outwards."""
    for rho in np.linspace(reach, 0.1, 9):
        pen.fill(wing.outline * rho, _mix(ground, _DARK, 0.42 * (1 - rho) ** 1.6 + 0.1 * rho**8))
    for u in rng.uniform(-0.4, 1.2, 40):
        stroke = wing.at([u, u], rng.uniform(0.3, reach, 2))
        pen.line(stroke, ground * rng.uniform(0.86, 1.1))


def _body(pen: _Pen, rng: Generator) -> None:
    fur = _mix(_DARK, np.array([120, 92, 64]), rng.uniform(0, 0.5))
    for side in (-1, 1):
        way = np.linspace(0, 1, 10)
        across = side * (0.02 + rng.uniform(0.26, 0.34) * way - 0.12 * (way - way**2))
        antenna = np.column_stack((across, -0.2 + rng.uniform(-0.52, -0.42) * way))
        pen.line(antenna, _DARK, _FINE)
        pen.disc(antenna[-1], 0.02, _DARK)
    y = np.linspace(-1, 1, 24)
    for middle, length, width in ((0.26, 0.33, 0.05), (-0.04, 0.15, 0.075), (-0.2, 0.055, 0.055)):
        for thin in (1, 0.75, 0.5, 0.25):  # lighter along the back: it looks round
            half = width * thin * np.sqrt(1 - y**2)
            outline = _between(middle + length * y, -half, half)[:, ::-1]
            pen.fill(outline, fur * (1.5 - 0.5 * thin))
    for height in np.linspace(0.14, 0.5, 7):
        pen.line(np.array([[-0.04, height], [0.04, height]]), fur * 0.7)


def _meadow(rng: Generator) -> Image.Image:
    """Blurred greenery far behind, and leaves, blades and blossoms nearer."""
    far = Image.new("RGB", (SIZE[0] // 4, SIZE[1] // 4), _ink(rng.choice(_MEADOW) * 0.9))
    blobs = ImageDraw.Draw(far)
    for _ in range(26):
        (x, y), r = rng.uniform((0, 0), far.size), rng.uniform(2, 8)
        blobs.ellipse((x - r, y - r, x + r, y + r), fill=_ink(_green(rng)))
    scene = far.filter(ImageFilter.GaussianBlur(1.5)).resize((SIZE[0] * _FINE, SIZE[1] * _FINE))
    near = ImageDraw.Draw(scene)
    for plant, low, high in ((_leaf, 5, 10), (_blade, 4, 10), (_blossom, 0, 4)):
        for _ in range(rng.integers(low, high)):
            origin = rng.uniform((0, 0), SIZE) * _FINE
            plant(_Pen(near, _rotation(rng.uniform(0, 2 * np.pi)) * _FINE, origin), rng)
    return scene.filter(ImageFilter.GaussianBlur(rng.uniform(1, 2.5)))


def _leaf(pen: _Pen, rng: Generator) -> None:
    x = np.linspace(0, 1, 14)
    length, width, colour = rng.uniform(35, 75), rng.uniform(8, 17), _green(rng)
    rib, half = 6 * x**2, width * np.sin(np.pi * x**0.8)
    pen.fill(_between(length * x, rib - half, rib), colour * 0.85)
    pen.fill(_between(length * x, rib, rib + half), colour * 1.1)
    pen.line(np.column_stack((length * x, rib)), colour * 1.3, _FINE)


def _blade(pen: _Pen, rng: Generator) -> None:
    x = np.linspace(0, 1, 12)
    length, bend = rng.uniform(70, 150), rng.uniform(-30, 30) * x**2
    half = rng.uniform(1.2, 2.6) * (1 - x)
    pen.fill(_between(length * x, bend - half, bend + half), _green(rng) * 1.1)


def _blossom(pen: _Pen, rng: Generator) -> None:
    colour, radius = rng.choice(_PETALS), rng.uniform(5, 10)
    for petal in _circle(5):
        pen.disc(0.8 * radius * petal, 0.6 * radius, colour * 0.95)
    pen.disc(np.zeros(2), 0.4 * radius, np.array([226, 180, 60]))


def _between(x: Array, low: Array, high: Array) -> Array:
    """The outline of what lies between two curves over `x`."""
    return np.column_stack((np.r_[x, x[::-1]], np.r_[low, high[::-1]]))


def _circle(steps: int) -> Array:
    turn = np.arange(steps) * 2 * np.pi / steps
    return np.column_stack((np.cos(turn), np.sin(turn)))


def _rotation(angle: float) -> Array:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _green(rng: Generator) -> Array:
    return np.asarray(rng.choice(_MEADOW) * rng.uniform(0.7, 1.2) + rng.normal(0, 6, 3))


def _mix(a: Array, b: Array, share: float) -> Array:
    return np.asarray(a + (b - a) * share)


def _ink(colour: Array) -> tuple[int, ...]:
    return tuple(np.clip(colour, 0, 255).astype(np.uint8).tolist())
