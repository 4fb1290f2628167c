"""The output formats of `bcnn predict`: each writes a prediction as soon as it is known."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from bcnn.data.urls import is_url
from bcnn.evaluation.answers import ANSWER, Answer, answer_text
from bcnn.models.bilinear_cnn import BCNN
from bcnn.utils.console import printable
from bcnn.utils.files import atomic_write


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, or why there are none."""

    path: str
    pairs: list[tuple[str, float]] = field(default_factory=list)  # (class, probability), best first
    error: str = ""
    set: list[str] | None = None  # classes of the prediction set, best first; None: not calibrated
    unlike_training: bool | None = None  # None: not calibrated
    answer: Answer = field(default_factory=dict)  # on the levels of a taxonomy; empty without one


Writer = Callable[[Prediction], object]
Predictor = Callable[..., Iterator[Prediction]]  # `predict_paths` but for `paths`
WriteTo = Callable[[TextIO, Sequence[str]], AbstractContextManager[Writer]]  # a file, and its images


@contextmanager
def _table(out: TextIO, paths: Sequence[str], model: BCNN, top: int) -> Iterator[Writer]:
    """Write a line per class. The widths of the columns are known from the start."""
    first, second = (max(len(printable(name)) for name in names) for names in (paths, model.classes))
    in_set = "  in the set" if model.calibration else ""
    print(f"{'image':{first}}  {'class':{second}}  probability{in_set}", file=out)

    def write(prediction: Prediction) -> None:
        lines = [f"error: {printable(prediction.error)}"] if prediction.error else []
        if prediction.unlike_training:
            lines.append("unlike the training images: maybe of no class")
        classes = prediction.set or []
        for label, probability in prediction.pairs:
            mark = "yes" if label in classes else ""
            lines.append(f"{printable(label):{second}}  {probability:>11.1%}  {mark}".rstrip())
        if (others := len(classes) - len(prediction.pairs)) > 0:
            lines.append(f"and {others} more in the set")
        if prediction.answer:
            lines.append(printable(answer_text(prediction.answer)))
        for name, line in zip(chain([printable(prediction.path)], repeat("")), lines, strict=False):
            print(f"{name:{first}}  {line}", file=out)

    yield write


@contextmanager
def _jsonl(out: TextIO, paths: Sequence[str], model: BCNN, top: int) -> Iterator[Writer]:
    """Write an object per line: the image, and what was predicted or the error."""

    def write(prediction: Prediction) -> None:
        found = [{"class": label, "probability": round(p, 6)} for label, p in prediction.pairs]
        known = {"prediction_set": prediction.set, "unlike_training": prediction.unlike_training}
        known |= prediction.answer
        content = {"error": prediction.error} if prediction.error else {"predictions": found, **known}
        print(json.dumps({"image": prediction.path, **content}), file=out)

    yield write


@contextmanager
def _csv(out: TextIO, paths: Sequence[str], model: BCNN, top: int) -> Iterator[Writer]:
    """Write a row per image, with the cells of `_row` as text."""
    shown = printable if out.isatty() else str  # control characters would act on a terminal
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_row(Prediction(""), model, top))

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.6f}"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return shown("; ".join(value) if isinstance(value, list) else value or "")

    yield lambda prediction: writer.writerow(map(text, _row(prediction, model, top).values()))


@contextmanager
def _parquet(out: TextIO, paths: Sequence[str], model: BCNN, top: int) -> Iterator[Writer]:
    """Write a row per image at the end, with the cells of `_row`: text, numbers, truth values, lists.

    Parquet holds Unicode only: a byte of a name that is none becomes an escape (`\\udcff`).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def type_of(name: str) -> pa.DataType:
        special = {"prediction_set": pa.list_(pa.string()), "unlike_training": pa.bool_()}
        return special.get(name, pa.float32() if "probability" in name else pa.string())

    def escaped(value: Any) -> Any:
        if isinstance(value, list):
            return [*map(escaped, value)]
        return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value

    rows: list[dict[str, Any]] = []

    def write(prediction: Prediction) -> None:
        rows.append({name: escaped(value) for name, value in _row(prediction, model, top).items()})

    yield write
    schema = pa.schema({name: type_of(name) for name in _row(Prediction(""), model, top)})
    pq.write_table(pa.Table.from_pylist(rows, schema), out.buffer)


def _row(prediction: Prediction, model: BCNN, top: int) -> dict[str, Any]:
    """Return the columns of a prediction; None: no value."""
    pairs = [*prediction.pairs, *[(None, None)] * (top - len(prediction.pairs))]
    (first, probability), *others = pairs
    row: dict[str, Any] = {"image": prediction.path, "top1": first, "probability": probability}
    row |= {"prediction_set": prediction.set, "unlike_training": prediction.unlike_training}
    row |= {name: prediction.answer.get(name) for name in (ANSWER if model.taxonomy else ())}
    for rank, (name, share) in enumerate(others, 2):
        row |= {f"top{rank}": name, f"probability{rank}": share}
    return row | {"error": prediction.error or None}


@contextmanager
def _labelstudio(out: TextIO, paths: Sequence[str], model: BCNN, top: int) -> Iterator[Writer]:
    """Write a list of Label Studio's tasks: the most probable class chosen, the others as text.

    Images are addressed by URL, or as Label Studio serves local files: by path from the disk's root.
    """
    separators = chain(["[\n"], repeat(",\n"))

    def write(prediction: Prediction) -> None:
        path = Path(os.path.abspath(prediction.path)).as_posix().lstrip("/")
        local = f"/data/local-files/?d={quote(path, errors='surrogateescape')}"
        address = prediction.path if is_url(prediction.path) else local
        text = ", ".join(f"{label} {p:.1%}" for label, p in prediction.pairs) or prediction.error
        if prediction.unlike_training:
            text += "; unlike the training images"
        if prediction.answer:
            text += f"; {answer_text(prediction.answer)}"
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


# Each gives the writer of one prediction to a file, of these images.
FORMATS = {
    "table": _table,
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
    "labelstudio": _labelstudio,
}


def write_rows(
    output: Path | None, images: Sequence[str], predictions: Iterable[Prediction], write_to: WriteTo
) -> Iterator[Prediction]:
    """Yield the predictions of images while they are written; a file appears after the last one."""
    with _opened(output) as out, write_to(out, images) as write:
        for prediction in predictions:
            write(prediction)
            yield prediction


@contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """Open the file to write, or standard output; names that are no valid Unicode are their bytes."""
    if output is None:
        yield sys.stdout
        return
    with (
        atomic_write(output) as part,
        part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        yield file
