"""The model card: the README of a model's repository on the Hugging Face Hub."""

import re

from markupsafe import Markup

from bcnn.evaluation.inference import what_sets_promise
from bcnn.evaluation.metrics import displayed
from bcnn.evaluation.predictions import COVERAGE, Predictions
from bcnn.evaluation.report import template
from bcnn.models.bilinear_cnn import BCNN
from bcnn.models.checkpoint import describe
from bcnn.utils.console import printable

MARKDOWN = re.compile(r"[\\`*_\[\]<>|~&$#]")  # what Markdown or HTML could take for markup


def model_card(name: str, model: BCNN, predictions: Predictions | None) -> str:
    """Return a card in Markdown, for the repository `name`.

    Args:
        predictions: of the images that the model was tested on; None: the card shows no figures.
    """
    backbone = model.chosen["backbone"]
    escaped = (MARKDOWN.sub(r"\\\g<0>", printable(each)) for each in model.classes)
    return template("card.md").render(
        name=name,
        model=model,
        classes=[Markup(each) for each in escaped],
        backbone=backbone.get("model", backbone["name"]),  # timm's name
        pooling=model.chosen["pooling"]["name"],
        preprocessing=describe(model)["preprocessing"],
        predictions=predictions,
        metrics=displayed(predictions) if predictions else {},
        promise=what_sets_promise(model, COVERAGE),
    )
