"""The output formats of `bcnn predict`: each writes a prediction as soon as it is known."""

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from bcnn.utils.console import printable


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, or why there are none."""

    path: str
    pairs: list[tuple[str, float]] = field(default_factory=list)  # (class, probability), best first
    error: str = ""


Writer = Callable[[Prediction], object]


def _table(out: TextIO, classes: list[str], paths: list[str], top: int) -> Iterator[Writer]:
    """Write a line per class. The widths of the columns are known from the start."""
    first, second = (max(len(printable(name)) for name in names) for names in (paths, classes))
    print(f"{'image':{first}}  {'class':{second}}  probability", file=out)

    def write(prediction: Prediction) -> None:
        name = printable(prediction.path)
        if prediction.error:
            print(f"{name:{first}}  error: {printable(prediction.error)}", file=out)
        for label, probability in prediction.pairs:
            print(f"{name:{first}}  {printable(label):{second}}  {probability:>11.1%}", file=out)
            name = ""

    yield write


def _jsonl(out: TextIO, classes: list[str], paths: list[str], top: int) -> Iterator[Writer]:
    """Write an object per line: path and predictions, or path and error."""

    def write(prediction: Prediction) -> None:
        found = [{"class": label, "probability": round(p, 6)} for label, p in prediction.pairs]
        content = {"error": prediction.error} if prediction.error else {"predictions": found}
        print(json.dumps({"path": prediction.path, **content}), file=out)

    yield write


def _csv(out: TextIO, classes: list[str], paths: list[str], top: int) -> Iterator[Writer]:
    """Write a row per image: path, class_1, probability_1, …, error."""
    writer = csv.writer(out, lineterminator="\n")
    shown = printable if out.isatty() else str  # control characters would act on a terminal
    names = [f"{name}_{rank}" for rank in range(1, top + 1) for name in ("class", "probability")]
    writer.writerow(["path", *names, "error"])

    def write(prediction: Prediction) -> None:
        cells = [cell for label, p in prediction.pairs for cell in (shown(label), f"{p:.6f}")]
        empty = [""] * (2 * top - len(cells))
        writer.writerow([shown(prediction.path), *cells, *empty, shown(prediction.error)])

    yield write


def _labelstudio(out: TextIO, classes: list[str], paths: list[str], top: int) -> Iterator[Writer]:
    """Write a list of Label Studio's tasks: the most probable class chosen, the others as text.

    Images are addressed as Label Studio serves local files, by their path from the root of the disk.
    """
    separators = chain(["[\n"], repeat(",\n"))

    def write(prediction: Prediction) -> None:
        path = Path(os.path.abspath(prediction.path)).as_posix().lstrip("/")
        address = f"/data/local-files/?d={quote(path, errors='surrogateescape')}"
        text = ", ".join(f"{label} {p:.1%}" for label, p in prediction.pairs) or prediction.error
        choice = {"from_name": "class", "to_name": "image", "type": "choices"}
        value = {"choices": [name for name, _ in prediction.pairs[:1]]}
        likeliest = [
            {"score": round(p, 6), "model_version": "bcnn", "result": [choice | {"value": value}]}
            for _, p in prediction.pairs[:1]
        ]
        task = {"data": {"image": address, "bcnn": text}, "predictions": likeliest}
        print(next(separators), json.dumps(task), sep="", end="", file=out)

    yield write
    print("\n]", file=out)


_FORMATS = {"table": _table, "jsonl": _jsonl, "csv": _csv, "labelstudio": _labelstudio}
FORMATS = {name: contextmanager(written) for name, written in _FORMATS.items()}
