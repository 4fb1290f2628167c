"""The convex solver of stage last on made descriptors: time and steps of each λ, and memory."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import Options, measure, now, parser
from rich.table import Table
from torch import Tensor

from bcnn.training.logistic_regression import BLOCK, ConvexProblem
from bcnn.utils.console import console


def made_descriptors(count: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return descriptors in float16, as in a store, and labels. Variances fall as in real ones."""
    draw = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1) ** -0.5
    means = torch.randn(classes, width, generator=draw)
    labels = torch.arange(count) % classes
    descriptors = torch.empty(count, width, dtype=torch.float16)
    for i in range(0, count, BLOCK):
        around = means[labels[i : i + BLOCK]]
        noise = torch.randn(around.shape, generator=draw)
        descriptors[i : i + BLOCK] = F.normalize((around + 2 * noise) * scale)
    return descriptors, labels


def solve(options: Options) -> dict[str, float]:
    """Solve for one λ after the other; return seconds and steps of each."""
    steps = 0

    def counting(parts: Iterable[Any], what: str, *, unit: str) -> Iterator[Any]:
        nonlocal steps
        for part in parts:
            steps += unit == "steps"
            yield part

    found, start = {}, now()
    made = made_descriptors(options.descriptors, options.width, options.classes)
    print(f"made in {now() - start:.0f} s")
    start = now()
    problem = ConvexProblem(*made, options.classes, device=options.device, progress=counting)
    found["seconds to prepare"] = now() - start
    for l2 in options.l2:
        start, steps = now(), 0
        problem.solve(l2)
        found |= {f"seconds {l2}": now() - start, f"steps {l2}": steps}
    return found


if __name__ == "__main__":
    options = parser(__doc__, "classes")
    options.add_argument("--descriptors", type=int, default=2000, help="number of images")
    options.add_argument("--width", type=int, default=8256, help="numbers in a descriptor")
    options.add_argument("--l2", nargs="*", type=float, default=[1e-4, 1e-5, 1e-6, 1e-7], help="λ")
    asked = options.parse_args()
    shape = f"{asked.descriptors:,} × {asked.width:,}, {asked.classes} classes"
    row = measure(shape, solve, asked)
    table = Table("λ", "steps", "seconds", title=f"the convex solver: {shape}", title_justify="left")
    table.add_row("to prepare", "", f"{row['seconds to prepare']:.1f}")
    for l2 in asked.l2:
        table.add_row(f"{l2:g}", f"{row[f'steps {l2}']:.0f}", f"{row[f'seconds {l2}']:.1f}")
    console.print(table, f"memory beside the start of the process: {row['peak'] / 1e9:.1f} GB")
