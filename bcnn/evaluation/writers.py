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

from bcnn.evaluation.levels import ANSWER, Answer, answer_text
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.console import printable


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, or why there are none."""

    path: str
    pairs: list[tuple[str, float]] = field(default_factory=list)  # (class, probability), best first
    error: str = ""
    set: list[str] | None = None  # classes of the prediction set, best first; None: not calibrated
    unlike_training: bool | None = None  # None: not calibrated
    answer: Answer = field(default_factory=dict)  # on the levels of a taxonomy; empty without one

    @property
    def unlike(self) -> str:
        """yes, no, or nothing where it is not known."""
        return {None: "", False: "no", True: "yes"}[self.unlike_training]


Writer = Callable[[Prediction], object]


def _table(out: TextIO, model: BCNN, paths: list[str], top: int) -> Iterator[Writer]:
    """Write a line per class. The widths of the columns are known from the start."""
    first, second = (max(len(printable(name)) for name in names) for names in (paths, model.classes))
    in_set = "  in the set" * bool(model.calibration)
    print(f"{'image':{first}}  {'class':{second}}  probability{in_set}", file=out)

    def write(prediction: Prediction) -> None:
        lines = [f"error: {printable(prediction.error)}"] if prediction.error else []
        if prediction.unlike_training:
            lines.append("unlike the training images: maybe of no class")
        classes = prediction.set or []
        for label, probability in prediction.pairs:
            mark = "yes" * (label in classes)
            lines.append(f"{printable(label):{second}}  {probability:>11.1%}  {mark}".rstrip())
        if others := len(classes) - len(prediction.pairs):
            lines += [f"and {others} more in the set"] * (others > 0)
        if prediction.answer:
            lines.append(printable(answer_text(prediction.answer)))
        for name, line in zip(chain([printable(prediction.path)], repeat("")), lines, strict=False):
            print(f"{name:{first}}  {line}", file=out)

    yield write


def _jsonl(out: TextIO, model: BCNN, paths: list[str], top: int) -> Iterator[Writer]:
    """Write an object per line: path and what was predicted, or path and error."""

    def write(prediction: Prediction) -> None:
        found = [{"class": label, "probability": round(p, 6)} for label, p in prediction.pairs]
        known = {"prediction_set": prediction.set, "unlike_training": prediction.unlike_training}
        known |= prediction.answer
        content = {"error": prediction.error} if prediction.error else {"predictions": found, **known}
        print(json.dumps({"path": prediction.path, **content}), file=out)

    yield write


def _csv(out: TextIO, model: BCNN, paths: list[str], top: int) -> Iterator[Writer]:
    """Write a row per image, with the columns of `heading`."""
    writer = csv.writer(out, lineterminator="\n")
    shown = printable if out.isatty() else str  # control characters would act on a terminal
    names = [f"{name}{rank}" for rank in range(2, top + 1) for name in ("top", "probability")]
    levels = ANSWER if model.taxonomy else ()
    known = ["prediction_set", "unlike_training", *levels]
    heading = ["image", "top1", "probability", *known, *names, "error"]
    writer.writerow(heading)

    def write(prediction: Prediction) -> None:
        cells = [cell for label, p in prediction.pairs for cell in (shown(label), f"{p:.6f}")]
        cells += [""] * (2 * top - len(cells))
        held = [shown("; ".join(prediction.set or [])), prediction.unlike]
        held += [shown(str(prediction.answer.get(name) or "")) for name in levels]
        writer.writerow(
            [shown(prediction.path), *cells[:2], *held, *cells[2:], shown(prediction.error)]
        )

    yield write


def _labelstudio(out: TextIO, model: BCNN, paths: list[str], top: int) -> Iterator[Writer]:
    """Write a list of Label Studio's tasks: the most probable class chosen, the others as text.

    Images are addressed as Label Studio serves local files, by their path from the root of the disk.
    """
    separators = chain(["[\n"], repeat(",\n"))

    def write(prediction: Prediction) -> None:
        path = Path(os.path.abspath(prediction.path)).as_posix().lstrip("/")
        address = f"/data/local-files/?d={quote(path, errors='surrogateescape')}"
        text = ", ".join(f"{label} {p:.1%}" for label, p in prediction.pairs) or prediction.error
        text += "; unlike the training images" * bool(prediction.unlike_training)
        text += f"; {answer_text(prediction.answer)}" if prediction.answer else ""
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
