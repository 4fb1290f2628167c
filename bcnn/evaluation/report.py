"""The report: one HTML file that needs no network, no model and no other file."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup
from PIL import Image
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from bcnn.data.image_io import load_image
from bcnn.evaluation.metrics import MEANINGS, NAMES, calibration, headline, per_class, shown
from bcnn.evaluation.plots import TITLES, calibration_svg, curves_svg
from bcnn.evaluation.predictions import Predictions, soft_confusion
from bcnn.utils.files import atomic_write
from bcnn.utils.terminal import printable

PAIRS, PHOTOS = 6, 3  # pairs of confused classes, and photographs of each class of a pair
MISTAKES = 8  # with two pictures of evidence each
DOUBTS = 20  # training photographs: 80 in all at most
CHANGES = 6  # photographs that a stage put right, and as many that it put wrong
MOST_ORDERED = 1000  # classes whose order is the best that there is: a second or two
NEIGHBOURS = 5  # training photographs beside a mistake
THUMBNAIL, CHANGED, SMALL = 280, 180, 120  # px, the long side

Evidence = tuple[Image.Image, Image.Image]
Neighbour = tuple[str, str, float]  # path, class and distance of a training photograph
Before = tuple[str, Predictions]  # name of a stage, and what it said of the same images
NONE: Mapping[int, Any] = {}


@dataclass(frozen=True)
class Photo:
    """A thumbnail as a data URI, with what to say under it."""

    uri: str
    caption: str
    wrong: bool = False


@dataclass(frozen=True)
class Side:
    """One class of a confused pair: how many of its images are called the other, and some of them."""

    name: str
    images: int
    taken: int
    photos: list[Photo]


def write_report(
    page: Path,
    predictions: Predictions,
    title: str,
    stages: Sequence[tuple[str, Path]] = (),
    evidence: Mapping[int, Evidence] | None = None,
    configuration: str = "",
    held_out: Predictions | None = None,
    facts: Mapping[str, str] | None = None,
    before: Before | None = None,
    nearest: Mapping[int, Sequence[Neighbour]] | None = None,
) -> None:
    """Write the report on a set of predictions.

    Args:
        page: the file to write.
        predictions: of at least one image.
        title: the page's heading.
        stages: name and metrics.csv of the stages that the model was trained in, first to last.
        evidence: pictures of what spoke for the predicted and for the true class, by the index of
            the image, for those of `predictions.confident_mistakes(MISTAKES)`.
        configuration: shown as it is.
        held_out: of the training images, each by classifiers that have not seen it.
        facts: where the model and the figures come from, by name; what is unknown is left out or "".
        before: the stage before the last of `stages`, shown beside it if it is of the same images.
        nearest: the training photographs most like those of `evidence`, by the index of these.
    """
    bins = calibration(predictions.confidence.double().numpy(), predictions.correct.double().numpy())
    write_page(
        page,
        "page.html",
        title=title,
        images=len(predictions.paths),
        wrong=int((~predictions.correct).sum()),
        facts={**(facts or {}), "report of": _now()},
        cards=[
            (NAMES[name], *shown(name, figure), MEANINGS[name])
            for name, figure in headline(predictions).items()
        ],
        change=_change(before, predictions),
        stages=stages,
        curves=[Markup(svg) for metric in TITLES if (svg := curves_svg(stages, metric))],
        matrix=_matrix(predictions),
        pairs=_pairs(predictions),
        mistakes=_mistakes(predictions, MISTAKES, evidence or {}, nearest or {}),
        held_out=len(held_out.paths) if held_out else 0,
        doubts=_mistakes(held_out, DOUBTS) if held_out else [],
        classes=per_class(predictions),
        shown=shown,
        taken=_taken(predictions),
        calibration=Markup(calibration_svg(bins)),
        configuration=configuration,
    )


def write_page(page: Path, name: str, **content: object) -> None:
    """Write what the template of this name makes of its content.

    Raises:
        UserError: the file cannot be written.
    """
    html = template(name).render(content)
    with atomic_write(page) as part:
        part.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")


def template(name: str) -> Template:
    """A page of this folder; what it is rendered with is escaped, and names act on nothing."""
    environment = Environment(
        loader=PackageLoader("bcnn.evaluation", "templates"), autoescape=True, finalize=_visible
    )
    environment.filters["percent"] = _percent
    return environment.get_template(name)


def confusion_order(predictions: Predictions) -> list[int]:
    """The classes in an order in which those that are confused stand together.

    Average linkage on the negative logarithm of the mean probability that two classes give each
    other; of up to `MOST_ORDERED` the leaves in the optimal order (Bar-Joseph et al., Bioinformatics
    2001), which takes the cube of their number.
    """
    shared = soft_confusion(predictions).numpy()
    shared = shared + shared.T
    np.fill_diagonal(shared, shared.max())
    distance = np.log(shared.max() + 1e-9) - np.log(shared + 1e-9)
    few = len(shared) <= MOST_ORDERED
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=few)
    return leaves_list(tree).tolist()


def confused_pairs(predictions: Predictions, count: int) -> list[tuple[int, int]]:
    """Pairs of classes by the number of images taken for each other, none without any."""
    confusion = predictions.confusion
    both = (confusion + confusion.T).triu(diagonal=1)
    likely = soft_confusion(predictions)
    pairs = sorted(
        ((a, b) for a, b in both.nonzero().tolist()),
        key=lambda pair: (both[pair], likely[pair] + likely[pair[::-1]]),
        reverse=True,
    )
    return pairs[:count]


def _change(before: Before | None, after: Predictions) -> dict[str, object] | None:
    """Figures of two stages, and photographs that only one of them was right about."""
    if before is None or not after.of_same_images(before[1]):
        return None
    name, earlier = before
    figures, now = headline(earlier), headline(after)

    def photos(right: Predictions, wrong: Predictions) -> tuple[int, list[Photo]]:
        changed = (right.correct & ~wrong.correct).nonzero()[:, 0]
        surest = changed[wrong.confidence[changed].argsort(descending=True, stable=True)]
        return len(changed), [photo(index, wrong) for index in surest[:CHANGES].tolist()]

    def photo(index: int, wrong: Predictions) -> Photo:
        truth, called = (after.classes[each[index]] for each in (after.labels, wrong.predicted))
        caption = f"{truth}, not {called} ({_percent(float(wrong.confidence[index]))})"
        return Photo(thumbnail(load_image(after.paths[index]), CHANGED), caption)

    return {
        "before": name,
        "rows": [(NAMES[k], MEANINGS[k], (shown(k, figures[k]), shown(k, now[k]))) for k in NAMES],
        "gained": photos(after, earlier),
        "lost": photos(earlier, after),
    }


def _pairs(predictions: Predictions) -> list[tuple[Side, Side]]:
    pairs = confused_pairs(predictions, PAIRS)
    return [(_side(predictions, a, b), _side(predictions, b, a)) for a, b in pairs]


def _side(predictions: Predictions, one: int, other: int) -> Side:
    """Photographs of class `one`: those taken for `other` first, then the ones nearest to it."""
    members = (predictions.labels == one).nonzero()[:, 0]
    taken = predictions.predicted[members] == other
    score = predictions.probabilities[members, other] + taken
    shown = members[score.argsort(descending=True, stable=True)][:PHOTOS].tolist()
    names = predictions.classes

    def photo(index: int) -> Photo:
        called, share = predictions.predicted[index], predictions.confidence[index]
        wrong = bool(called != one)
        caption = f"{names[called]} {_percent(float(share))}" if wrong else "right"
        return Photo(thumbnail(load_image(predictions.paths[index])), caption, wrong)

    return Side(names[one], len(members), int(taken.sum()), [photo(index) for index in shown])


def _mistakes(
    predictions: Predictions,
    count: int,
    evidence: Mapping[int, Evidence] = NONE,
    nearest: Mapping[int, Sequence[Neighbour]] = NONE,
) -> list[dict[str, object]]:
    return [
        {
            "path": predictions.paths[index],
            "photo": thumbnail(load_image(predictions.paths[index])),
            "evidence": [thumbnail(picture) for picture in evidence.get(index, ())],
            "called": predictions.classes[predictions.predicted[index]],
            "confidence": float(predictions.confidence[index]),
            "truth": predictions.classes[predictions.labels[index]],
            "of_truth": float(predictions.of_truth[index]),
            "nearest": [
                Photo(
                    thumbnail(load_image(path, SMALL), SMALL),
                    f"{name} {distance:.2f}",
                    wrong=name == predictions.classes[predictions.predicted[index]],
                )
                for path, name, distance in nearest.get(index, ())
            ],
        }
        for index in predictions.confident_mistakes(count)
    ]


def _matrix(predictions: Predictions) -> dict[str, object]:
    """Geometry of the confusion matrix: sides in pixels at full size, and the cells with images."""
    order = confusion_order(predictions)
    confusion = predictions.confusion[order][:, order]
    names = [predictions.classes[index] for index in order]
    side = max(12, min(52, 700 // len(names)))
    font = min(12, side - 2)
    images = confusion.sum(dim=1).tolist()
    return {
        "names": [name if len(name) <= 28 else f"{name[:27]}…" for name in names],
        "side": side,
        "font": font,
        "gutter": 12 + round(0.58 * font * min(28, max(map(len, names)))),
        "cells": [
            {
                "row": row,
                "column": column,
                "count": int(confusion[row, column]),
                "opacity": round(0.2 + 0.8 * (int(confusion[row, column]) / images[row]) ** 0.5, 2),
                "says": names[row]
                + ("" if row == column else f" called {names[column]}")
                + f": {confusion[row, column]} of {images[row]}",
            }
            for row, column in confusion.nonzero().tolist()
        ],
    }


def _taken(predictions: Predictions) -> list[str]:
    """For what each class was taken most often, with the number of images; empty if for nothing."""
    others = predictions.confusion.fill_diagonal_(0)
    counts, columns = others.max(dim=1)
    return [
        f"{predictions.classes[column]} ({count})" if count else ""
        for count, column in zip(counts.tolist(), columns.tolist(), strict=True)
    ]


def _now() -> str:
    return f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"


def _visible(value: object) -> object:
    """Names with escapes for what would turn the text around them; lines of text stay lines."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "\n".join(map(printable, value.split("\n")))
    return value


def _percent(share: float) -> str:
    return f"{share:.1%}"


def thumbnail(picture: Image.Image, side: int = THUMBNAIL) -> str:
    """A data URI of the picture, its long side `side` pixels at most."""
    small = picture.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
