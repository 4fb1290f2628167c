"""The report: one HTML file that needs no network, no model and no other file."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup
from PIL import Image

from bcnn.data.image_io import load_image
from bcnn.data.taxonomy import Taxonomy
from bcnn.evaluation.answers import common_parent
from bcnn.evaluation.heatmap import printable_lines
from bcnn.evaluation.levels import level_metrics
from bcnn.evaluation.metrics import (
    NAMES,
    UnknownMetrics,
    as_text,
    calibration,
    displayed,
    per_class,
    selective,
)
from bcnn.evaluation.plots import TITLES, calibration_svg, curves_svg, selective_svg
from bcnn.evaluation.predictions import Predictions, confused_pairs, confusion_order
from bcnn.utils.files import atomic_write

PAIRS, IMAGES = 6, 3  # pairs of confused classes, and images of each class of a pair
MISTAKES = 8  # with two attributions each
DOUBTS = 20  # possibly wrong labels that are shown
CHANGES = 6  # images that the last stage corrected, and as many that it got wrong
ACCEPTED = 12  # images of no known class that were not marked
NEIGHBOURS = 5  # training images beside a mistake
THUMBNAIL, CHANGED, SMALL = 280, 180, 120  # px, the long side

Neighbour = tuple[str, str, float]  # path, class and distance of a training image
Before = tuple[str, Predictions]  # name of a stage, and its predictions
Attributions = Mapping[int, tuple[Image.Image, Image.Image]]  # of predicted and true class


@dataclass(frozen=True)
class ReportContent:
    """What a report shows."""

    predictions: Predictions  # of at least one image
    title: str
    stages: Sequence[tuple[str, Path]] = ()  # name and metrics.csv of those that trained the model
    configuration: str = ""
    held_out: Predictions | None = None  # of training images, by classifiers that have not seen them
    facts: Mapping[str, str] = field(default_factory=dict)  # how the model was made; empty: left out
    unknown: tuple[Predictions, UnknownMetrics] | None = None  # images of no class that it knows
    before: Before | None = None  # the stage before the last, compared if it is of the same images
    poolings: Sequence[Sequence[str]] = ()  # heading and rows of the poolings that were compared
    nearest: Mapping[int, Sequence[Neighbour]] = field(default_factory=dict)  # by index of a mistake


def write_report(
    page: Path,
    content: ReportContent,
    attributions: Attributions | None = None,
    taxonomy: Taxonomy | None = None,
) -> None:
    """Write the report, with attributions of its `confident_mistakes(MISTAKES)` by their index."""
    predictions, held_out = content.predictions, content.held_out
    order, pairs = confusion_order(predictions), confused_pairs(predictions, PAIRS)
    write_page(
        page,
        "report.html",
        content=content,
        mistaken=int((~predictions.correct).sum()),
        now=datetime.now().astimezone(),
        metrics=displayed(predictions),
        taxonomy=taxonomy,
        levels=level_metrics(predictions, taxonomy) if taxonomy else [],
        change=content.before and _change(*content.before, predictions),
        curves=[Markup(svg) for metric in TITLES if (svg := curves_svg(content.stages, metric))],
        names=[predictions.classes[index] for index in order],
        confusion=predictions.confusion[order][:, order],
        pairs=[(_side(predictions, a, b), _side(predictions, b, a)) for a, b in pairs],
        mistakes=predictions.confident_mistakes(MISTAKES),
        attributions=attributions or {},
        doubts=held_out and held_out.doubtful_labels(),
        classes=per_class(predictions),
        calibration=Markup(calibration_svg(*calibration(predictions))),
        selective=Markup(selective_svg(*selective(predictions))),
        accepted=content.unknown and _accepted(content.unknown[0]),
        shown_doubts=DOUBTS,
        changes=CHANGES,
        changed=CHANGED,
        small=SMALL,
    )


def write_page(page: Path, name: str, **content: object) -> None:
    """Write the page that the template of this name makes of its content."""
    html = template(name).render(content)
    with atomic_write(page) as part:
        part.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")


def template(name: str) -> Template:
    """Return a template of this package, which escapes markup and control characters."""
    loader = PackageLoader("bcnn.evaluation", "templates")
    environment = Environment(loader=loader, autoescape=True, finalize=_printable)
    environment.filters |= {"percent": "{:.1%}".format, "thumbnail": thumbnail}
    environment.globals |= {"as_text": as_text, "NAMES": NAMES, "common_parent": common_parent}
    return environment.get_template(name)


def thumbnail(picture: Image.Image | str, side: int = THUMBNAIL) -> str:
    """Return a data URI of a picture, or of the image at a path, its long side at most `side` px."""
    small = load_image(picture, side) if isinstance(picture, str) else picture.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _change(name: str, earlier: Predictions, after: Predictions) -> dict[str, Any] | None:
    """Return what differs between earlier and later predictions of the same images, for the template.

    None if they are of other images. Classes whose recall differs begin with the largest loss.
    """
    images, others = ((x.classes, x.paths, x.labels.tolist()) for x in (after, earlier))
    if images != others:
        return None
    now = displayed(after)
    pairs = zip(per_class(earlier), per_class(after), strict=True)
    moved = [pair for pair in pairs if pair[0].images and pair[0].recall != pair[1].recall]
    moved.sort(key=lambda pair: pair[1].recall.value - pair[0].recall.value)
    return {
        "before": name,
        "metrics": {key: estimate for key, estimate in displayed(earlier).items() if key in now},
        "classes": moved,
        "corrected": (earlier, earlier.corrected_by(after)),
        "lost": (after, after.corrected_by(earlier)),
    }


def _accepted(unknown: Predictions) -> list[int]:
    """Return the indices of unknown images that are not marked, the most confident first."""
    assert unknown.novelty is not None
    order = unknown.confidence.argsort(descending=True, stable=True)
    return order[unknown.novelty[order] <= 0][:ACCEPTED].tolist()


def _side(predictions: Predictions, one: int, other: int) -> dict[str, Any]:
    """Return one class of a confused pair, with its images that came closest to the other class."""
    members = (predictions.labels == one).nonzero()[:, 0]
    mistaken = predictions.predicted[members] == other
    score = predictions.probabilities[members, other] + mistaken
    closest = members[score.argsort(descending=True, stable=True)][:IMAGES]
    return {
        "name": predictions.classes[one],
        "images": len(members),
        "mistaken": int(mistaken.sum()),
        "examples": closest.tolist(),
    }


def _printable(value: object) -> object:
    return printable_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value
