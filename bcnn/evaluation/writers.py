"""Predictions as rows of text, each written as it comes."""

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from bcnn.utils.cells import harmless
from bcnn.utils.terminal import printable, say


@dataclass(frozen=True)
class Prediction:
    """What the model says of one photograph.

    Args:
        path: of the photograph.
        classes: names of its likeliest classes, the likeliest first.
        probabilities: of these classes.
        error: why the photograph could not be read; then it has no classes.
    """

    path: str
    classes: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    error: str = ""


Writer = Callable[[Prediction], object]


@contextmanager
def _table(out: TextIO, classes: list[str], paths: list[str], top: int) -> Iterator[Writer]:
    """A line a class. Widths are known before the first row, so that rows can come one by one."""
    first, second = (max(len(printable(name)) for name in names) for names in (paths, classes))
    say(f"{'photograph':{first}}  {'class':{second}}  probability", file=out)

    def write(prediction: Prediction) -> None:
        name = printable(prediction.path)
        if prediction.error:
            say(f"{name:{first}}  error: {prediction.error}", file=out)
        for label, value in zip(prediction.classes, prediction.probabilities, strict=True):
            say(f"{name:{first}}  {printable(label):{second}}  {value:>11.1%}", file=out)
            name = ""

    yield write


@contextmanager
def _jsonl(out: TextIO, classes: list[str], paths: list[str], top: int) -> Iterator[Writer]:
    """An object a line: path and predictions, or path and error."""

    def write(prediction: Prediction) -> None:
        found = [
            {"class": label, "probability": round(value, 6)}
            for label, value in zip(prediction.classes, prediction.probabilities, strict=True)
        ]
        said = {"error": prediction.error} if prediction.error else {"predictions": found}
        print(json.dumps({"path": prediction.path, **said}), file=out)

    yield write


@contextmanager
def _csv(out: TextIO, classes: list[str], paths: list[str], top: int) -> Iterator[Writer]:
    """A row a photograph: path, class_1, probability_1, …, error; see `harmless` of its names."""
    writer = csv.writer(out, lineterminator="\n")
    shown = printable if out.isatty() else harmless  # on a terminal, nobody's program reads it
    pairs = [f"{name}_{rank}" for rank in range(1, top + 1) for name in ("class", "probability")]
    writer.writerow(["path", *pairs, "error"])

    def write(prediction: Prediction) -> None:
        values = (f"{value:.6f}" for value in prediction.probabilities)
        names = map(shown, prediction.classes)
        found = [cell for pair in zip(names, values, strict=True) for cell in pair]
        row = [shown(prediction.path), *(found or [""] * 2 * top), shown(prediction.error)]
        writer.writerow(row)

    yield write


@contextmanager
def _labelstudio(out: TextIO, classes: list[str], paths: list[str], top: int) -> Iterator[Writer]:
    """A task a photograph, of Label Studio's JSON: the likeliest class chosen, `top` of them in words.

    The photograph is named as Label Studio serves files of its own machine, from the root of its disk.
    """
    start = "["

    def write(prediction: Prediction) -> None:
        nonlocal start
        path = Path(os.path.abspath(prediction.path)).as_posix().lstrip("/")
        place = f"/data/local-files/?d={quote(path, errors='surrogateescape')}"
        said = zip(prediction.classes, prediction.probabilities, strict=True)
        words = ", ".join(f"{label} {value:.1%}" for label, value in said) or prediction.error
        value = {"choices": prediction.classes[:1]}
        chosen = {"from_name": "class", "to_name": "image", "type": "choices", "value": value}
        found = [
            {"model_version": "bcnn", "score": round(likeliest, 6), "result": [chosen]}
            for likeliest in prediction.probabilities[:1]
        ]
        task = {"data": {"image": place, "bcnn": words}, "predictions": found}
        print(start, json.dumps(task), sep="\n", end="", file=out)
        start = ","

    yield write
    print("\n]" if start == "," else "[]", file=out)


FORMATS = {"table": _table, "jsonl": _jsonl, "csv": _csv, "labelstudio": _labelstudio}
