"""What the benchmark's command asks of every part."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Options:
    """What to measure: see the command's usage."""

    stage: str = "last"
    device: str = "auto"
    size: int = 448
    batch: int = 8
    images: int = 32
    classes: int = 17
    pooling: str = "bilinear"
    project: int | None = None
    rows: list[int] = field(default_factory=lambda: [500, 1000, 2000])
    epochs: int = 55
    root: Path | None = None
    weights: str = "random"
    ckpt: Path | None = None
