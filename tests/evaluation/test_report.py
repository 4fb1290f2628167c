"""The report: its plots, what it shows, and how it behaves in a browser."""

import re
from dataclasses import replace
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, watched, write_images
from PIL import Image

from bcnn.evaluation.plots import curves_svg, plot_curves
from bcnn.evaluation.predictions import Predictions, confusion_order
from bcnn.evaluation.report import MISTAKES, ReportContent, write_report

pytestmark = pytest.mark.figures

LOG = """epoch,step,train_loss,train_top1,val_loss,val_top1
0,0,,,1.4,0.4
0,0,1.5,0.3,,
1,1,,,1.0,0.6
1,1,1.1,0.5,,
"""

CONVEX = """gradient_norm,l2,step,train_loss,train_top1,val_loss,val_top1
1e-08,1e-4,0,0.9,0.9,0.5,0.8
1e-08,2.5e-5,1,0.3,1.0,0.4,0.9
1e-08,1e-6,2,0.1,1.0,0.6,0.8
"""


def grouped(classes: int, group: int, images: int = 6, seed: int = 0) -> tuple[Predictions, list[int]]:
    """Predictions that confuse the classes of a group among themselves; and each class's group."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randperm(classes, generator=generator) // group
    labels = torch.arange(classes).repeat_interleave(images)
    logits = torch.randn(len(labels), classes, generator=generator)
    logits += 4.0 * (groups[labels][:, None] == groups)
    names = [f"class {k:03}" for k in range(classes)]
    paths = [f"{k}.png" for k in range(len(labels))]
    return Predictions(names, paths, labels, logits.softmax(1)), groups.tolist()


@pytest.mark.parametrize(("classes", "group"), [(6, 3), (17, 4), (100, 5), (1200, 4)])
def test_confused_classes_stand_side_by_side(classes: int, group: int) -> None:
    made, groups = grouped(classes, group)
    order = confusion_order(made)
    assert sorted(order) == list(range(classes))
    changes = sum(groups[a] != groups[b] for a, b in pairwise(order))
    assert changes == len(set(groups)) - 1


def test_each_stage_has_a_panel_over_its_epochs_or_lambdas(tmp_path: Path) -> None:
    last, finetune = tmp_path / "last.csv", tmp_path / "finetune.csv"
    last.write_text(CONVEX)
    finetune.write_text(LOG)
    alone = curves_svg([("last", last)], "loss")
    assert re.findall(r">([\d.e-]+)</text>", alone)[:3] == ["0.0001", "2.5e-05", "1e-06"]
    assert ">λ, weight of" in alone and "epoch" not in alone
    both = curves_svg([("last", last), ("finetune", finetune)], "top1")
    assert ">λ, weight of" in both and both.count(">epoch<") == 1
    epochs = curves_svg([("last", finetune), ("finetune", finetune)], "loss")
    assert re.findall(r">(\d)</text>", epochs) == ["1", "2", "1", "2"]


@pytest.mark.parametrize(
    "log", [None, "", "epoch,step,train_loss\n0,0,1.5\n", "epoch,step,test_top1\n,3,0.9\n"]
)
def test_curves_of_what_was_logged(log: str | None, mistaken: Predictions, tmp_path: Path) -> None:
    first, page = tmp_path / "first.csv", tmp_path / "report.html"
    if log is not None:
        first.write_text(log)
    trained = "train_loss" in str(log)
    assert bool(curves_svg([("last", first)], "loss")) == trained
    assert curves_svg([("last", first)], "top1") == ""
    write_report(page, ReportContent(mistaken, "Title", [("last", first)]))
    assert ("<h2>Training</h2>" in page.read_text()) == trained
    plot_curves(first, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists() == trained


@pytest.fixture
def mistaken(tmp_path: Path) -> Predictions:
    """24 images of three classes, some misclassified; one name tries to be markup."""
    write_images(tmp_path / "images", 8)
    paths = sorted(map(str, (tmp_path / "images").glob("*/*.png")))
    labels = torch.arange(3).repeat_interleave(8)
    logits = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(24), labels] += 1.0
    assert 0 < int((logits.argmax(1) != labels).sum()) < 24
    names = ["<b onclick=alert(1)>blue & co", *list(COLOURS)[1:]]
    return Predictions(names, paths, labels, logits.softmax(1))


def text_of(page: Path) -> str:
    """Return the text of a page on one line, without its markup."""
    shown = re.sub("(?s)<(style|script|svg).*?</\\1>", "", page.read_text())
    return " ".join(re.sub("<[^>]*>", " ", shown).split())


def test_names_act_on_nothing(mistaken: Predictions, tmp_path: Path) -> None:
    names = ["<img src=x>", "evil\x1b[2J\x1b]0;title\a", "right\u202eto left\u2066\n\udcff"]
    made, page = replace(mistaken, classes=names), tmp_path / "report.html"
    write_report(page, ReportContent(made, names[2], configuration="a: 1\nb: 2"))
    text = page.read_text()
    assert not set("\x1b\a\u202e\u2066") & set(text) and r"evil\x1b[2J\x1b]0;title\x07" in text
    assert "<h1>right\\u202eto left\\u2066\n\\xff</h1>" in text and "<pre>a: 1\nb: 2" in text
    assert "<img src=x>" not in text and "&lt;img src=x&gt;" in text


def test_two_stages_are_compared(mistaken: Predictions, tmp_path: Path) -> None:
    page, right = tmp_path / "report.html", mistaken.correct
    predicted = mistaken.labels.clone()  # all correct, but for two that `last` has correct
    lost = right.nonzero()[:2, 0]
    predicted[lost] = (predicted[lost] + 1) % 3
    after = replace(mistaken, probabilities=0.7 * torch.eye(3)[predicted] + 0.1)
    stages = [("last", tmp_path / "none"), ("finetune", tmp_path / "none")]
    write_report(page, ReportContent(after, "A", stages, before=("last", mistaken)))
    text, corrected = text_of(page), int((~right).sum())
    assert "From last to finetune Both on the same 24 images" in text
    assert f" {right.float().mean():.1%} " in text and f" {22 / 24:.1%} " in text
    assert f"{corrected} images that finetune classifies correctly and last does not" in text
    assert "2 images that last classifies correctly and finetune does not:" in text
    truth, wrong = (mistaken.classes[k] for k in (mistaken.labels[lost[1]], predicted[lost[1]]))
    assert f"{escape(truth)}, not {escape(wrong)} (80.0%)" in page.read_text()

    elsewhere = replace(mistaken, paths=[f"other/{path}" for path in mistaken.paths])
    for others in (elsewhere, replace(mistaken, labels=mistaken.labels.flip(0))):
        write_report(page, ReportContent(after, "A", stages, before=("last", others)))
        assert "From last" not in page.read_text()


@pytest.fixture
def page(mistaken: Predictions, tmp_path: Path) -> Path:
    """A report with all its parts."""
    log, path = tmp_path / "metrics.csv", tmp_path / "report.html"
    log.write_text(LOG)
    picture, wrong = Image.new("RGB", (40, 40), "grey"), mistaken.confident_mistakes(MISTAKES)
    content = ReportContent(
        mistaken,
        "A <title>",
        [("last", log), ("finetune", log)],
        "seed: 0",
        held_out=replace(mistaken, probabilities=mistaken.probabilities.roll(2, 0)),
        facts={"command": f"bcnn <b>train</b> data.root={'folder/' * 30}", "training took": ""},
        before=("last", replace(mistaken, probabilities=mistaken.probabilities.roll(1, 0))),
        nearest={index: [(mistaken.paths[0], "green", 0.25)] for index in wrong},
    )
    write_report(path, content, {index: (picture, picture) for index in wrong})
    return path


def test_the_page_is_one_file_with_every_part(page: Path, mistaken: Predictions) -> None:
    html, wrong = page.read_text(), int((~mistaken.correct).sum())
    text, mistakes = text_of(page), min(MISTAKES, wrong)
    addresses = re.findall(r'\b(?:src|href)="([^"]*)"', html)
    assert all(re.match("data:|#", address) for address in addresses)
    assert 4 * mistakes < sum(address.startswith("data:image/jpeg") for address in addresses) <= 100
    assert ", ".join(re.findall("<h2>(.*?)</h2>", html)) == (
        "From last to finetune, Training, Confusion, Most confused pairs, Most confident mistakes, "
        "Possibly wrong labels, Classes, Calibration, Configuration"
    )
    assert html.count('<div class="near">') == text.count("green 0.25") == mistakes
    assert f"24 images, 3 classes, {wrong} images misclassified" in text
    assert "Of the 24 training images" in text
    assert "command bcnn &lt;b&gt;train&lt;/b&gt;" in text and "training took" not in text
    assert f"top-1 {(24 - wrong) / 24:.1%}" in text and "top-5" not in text  # of three classes


def test_the_page_in_a_browser(browser: Any, page: Path, mistaken: Predictions) -> None:
    tab, said, fetched = watched(browser)
    tab.goto(page.as_uri())
    assert tab.title() == "A <title>"
    assert [url for url in fetched if not url.startswith("data:")] == [page.as_uri()]
    widths = tab.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
    assert len(widths) > 10 and min(widths) > 0

    # the table sorts, by number and by name, both ways
    def column(index: int) -> list[str]:
        return tab.eval_on_selector_all(
            f"#classes tbody tr:not([hidden]) td:nth-child({index})",
            "all => all.map(one => one.dataset.value ?? one.textContent)",
        )

    assert column(1) == mistaken.classes
    for _ in range(2):
        tab.click("#classes th:nth-child(3) button")
        recalls = [float(value) for value in column(3)]
        up = tab.get_attribute("#classes th:nth-child(3)", "aria-sort") == "ascending"
        assert len(set(recalls)) > 1 and recalls == sorted(recalls, reverse=not up)
    tab.click("#classes th:nth-child(1) button")
    assert column(1) == mistaken.classes  # which are in the order of the alphabet
    tab.fill("#filter", "GREE")
    assert column(1) == ["green"]
    assert tab.inner_text("#shown") == "1 of 3"

    # a cell of the confusion matrix can be read
    tab.locator("#matrix rect.miss").first.click()
    assert re.fullmatch(r".+ predicted as .+: \d+ of 8", tab.inner_text("#cell"))

    light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != light

    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    cells = "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left, box.right])"
    edges = np.array(tab.eval_on_selector_all(":is(td, th):not(:empty)", cells))
    assert len(edges) > 20 and edges.min() >= 0 and edges.max() <= 390
    assert said == []


def test_a_large_matrix_zooms_to_where_one_clicks(
    browser: Any, mistaken: Predictions, tmp_path: Path
) -> None:
    made, _ = grouped(150, group=3)
    made = replace(made, paths=(mistaken.paths * 38)[: len(made.paths)])
    write_report(tmp_path / "report.html", ReportContent(made, "150 classes"))
    tab = browser.new_page(viewport={"width": 1000, "height": 800})
    tab.goto((tmp_path / "report.html").as_uri())
    box = tab.locator("#matrix")
    assert box.evaluate("box => box.scrollWidth <= box.clientWidth + 1")
    cell = tab.locator("#matrix rect.hit").nth(100)
    cell.click()
    assert box.evaluate("box => box.scrollWidth > box.clientWidth && box.scrollLeft > 0")
    frame, shown = box.bounding_box(), cell.bounding_box()
    assert frame["x"] < shown["x"] < frame["x"] + frame["width"]
    assert frame["y"] < shown["y"] < frame["y"] + frame["height"]
    names = tab.locator("#rows rect").bounding_box()
    assert names["x"] == pytest.approx(frame["x"], abs=2)  # the names of the rows stay in sight
