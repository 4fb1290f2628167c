"""Predictions in a folder of parts: how a part is named, written and skipped, and their summary.

Part k holds the images from k * `IMAGES` on, in the order of the list. Its file is named by k and by a
digest of their paths, and is whole or absent. A command writes the parts of its shard that are absent:

    settings.json                               what the predictions depend on, but for the images
    parts/part-000000-0f1e2d3c4b5a6978.csv      a row for each image
    counts/part-000000-0f1e2d3c4b5a6978.json    the summary of the part, written before it
    summary.json                                of all parts, once they are there
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from bcnn.evaluation.tables import console_table
from bcnn.evaluation.writers import Prediction, Predictor, WriteTo, write_rows
from bcnn.utils.console import printable
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, read_json, remove_parts

IMAGES = 4096  # of a part; the batch sizes that `predict_paths` chooses divide it
SHOWN = 10  # classes in `summary_table`
UNLIKE = "unlike the training images"


class Part(NamedTuple):
    """Consecutive images, and the file of their predictions."""

    file: Path
    images: list[str]


class PartFolder:
    """The folder of the parts of a list of images, in one format."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write what the predictions depend on; raise UserError if the folder has other settings."""
        self.folder, self.settings = folder, settings
        self.files: list[Path] = []  # of the parts that `absent` has come to
        file = folder / "settings.json"
        if not file.exists():
            _write_json(file, settings)
        before = read_json(file)
        if other := [name for name in settings if settings[name] != before.get(name)]:
            raise UserError(
                f"--output {folder} has predictions by {other[0]} {before.get(other[0])}, not "
                f"{settings[other[0]]}: repeat that command or name another folder"
            )

    def absent(self, images: Iterable[str], shard: int = 1, shards: int = 1) -> Iterator[Part]:
        """Yield the parts shard, shard + shards, … that are not there; images are read as needed.

        Raise UserError where there is a part of other images.
        """
        there = {int(file.name.split("-")[1]): file for file in self.folder.glob("parts/part-*")}
        images = iter(images)
        while paths := [*islice(images, IMAGES)]:
            number, before = len(self.files), there.pop(len(self.files), None)
            digest = hashlib.sha256("\0".join(paths).encode(errors="surrogateescape")).hexdigest()
            name = f"part-{number:06}-{digest[:16]}.{self.settings['format']}"
            file = self.folder / "parts" / name
            if before and before != file:
                raise _changed(before)
            self.files.append(file)
            if not before and number % shards == shard - 1:
                yield Part(file, paths)
        if there:
            raise _changed(min(there.values()))

    def summarize(self) -> dict[str, Any] | None:
        """Write and return the summary once every part is there; `absent` has come to its end.

        Remove what killed processes left: some programs would read it as parts.
        """
        if not all(file.exists() for file in self.files):
            return None
        for name in ("parts", "counts"):
            remove_parts(self.folder / name)
        images, classes = Counter[str](), Counter[str]()
        broken: dict[str, str] = {}
        for file in self.files:
            counts = read_json(_counts_of(file))
            images.update(counts["images"])
            classes.update(counts["classes"])
            broken |= counts["broken"]
        summary = {"images": images, "classes": dict(classes.most_common()), "broken": broken}
        _write_json(self.folder / "summary.json", summary | {"settings": self.settings})
        return summary


def write_parts(parts: Iterable[Part], predictor: Predictor, write_to: WriteTo) -> Iterator[Prediction]:
    """Yield the predictions of the images of parts; the file of a part appears once it is whole."""
    parts, ahead = tee(parts)  # images of the next part are loaded while one is written
    predictions = predictor(paths=chain.from_iterable(part.images for part in ahead))
    for file, images in parts:
        found = _counted(islice(predictions, len(images)), _counts_of(file))
        yield from write_rows(file, images, found, write_to)


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the most frequent classes, and how many images have an answer."""
    rows = [*[*summary["classes"].items()][:SHOWN], *summary["images"].items()]
    return console_table(("", "images"), [(printable(name), str(number)) for name, number in rows])


def _counted(predictions: Iterable[Prediction], file: Path) -> Iterator[Prediction]:
    """Yield the predictions, and then write their summary."""
    images, classes, broken = Counter[str](), Counter[str](), {}
    for prediction in predictions:
        yield prediction
        if prediction.error:
            images["broken"] += 1
            broken[prediction.path] = prediction.error
        elif prediction.unlike_training:
            images[UNLIKE] += 1
        else:
            images["answered"] += 1
            classes[prediction.pairs[0][0]] += 1
    _write_json(file, {"images": images, "classes": classes, "broken": broken})


def _counts_of(file: Path) -> Path:
    """Return the file of the summary of a part."""
    return file.parents[1] / "counts" / f"{file.stem}.json"


def _changed(file: Path) -> UserError:
    return UserError(
        f"{file} has other images than those named now: restore them or use another --output"
    )


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with atomic_write(file) as part:
        part.write_text(json.dumps(content, indent=1))
