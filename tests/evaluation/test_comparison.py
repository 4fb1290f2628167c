"""Models compared on the same images: which images those are, and what is said of the difference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import COLOURS, read_csv, watched, write_images

from bcnn.data.integrity import inspect
from bcnn.evaluation.comparison import open_runs, write
from bcnn.evaluation.predictions import Predictions, on_common_images
from bcnn.utils.errors import UserError

CLASSES = sorted(COLOURS)


def predictions(paths: list[str], wrong: set[int], digests: bool = True) -> Predictions:
    """Of images in class folders, of which some are taken for the next class."""
    labels = torch.tensor([CLASSES.index(Path(path).parent.name) for path in paths])
    shift = torch.tensor([int(k in wrong) for k in range(len(paths))])
    probabilities = 0.7 * torch.eye(3)[(labels + shift) % 3] + 0.1
    known = [inspect(path).digest for path in paths] if digests else []
    return Predictions(CLASSES, paths, labels, probabilities, known, "test")


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    write_images(tmp_path / "images", 10)
    return sorted(map(str, (tmp_path / "images").glob("*/*.png")))


def save(tmp_path: Path, **runs: Predictions) -> list[Path]:
    for name, each in runs.items():
        each.save(tmp_path / name / "predictions.npz")
    return [tmp_path / name for name in runs]


def test_what_is_saved_is_loaded(paths: list[str], tmp_path: Path) -> None:
    for made in (predictions(paths, {1}), predictions(paths, {1}, digests=False)):
        made.save(tmp_path / "predictions.npz")
        found = Predictions.load(tmp_path / "predictions.npz")
        for name, value in vars(made).items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(getattr(found, name), value), name


def test_the_table_counts_right_and_wrong(paths: list[str], tmp_path: Path) -> None:
    """30 images: 22 both right, 2 only the first, 5 only the second, 1 neither."""
    first, second = predictions(paths, {0, 1, 2, 3, 4, 5}), predictions(paths, {5, 6, 7})
    runs = open_runs(save(tmp_path, a=first, b=second))
    assert runs[0].cells[1:] == ["80.0 (62.7–90.5)", *"––––––"]
    top1, *counts, difference, p = runs[1].cells[1:]
    assert (top1, counts) == ("90.0 (74.4–96.5)", ["22", "2", "5", "1"])
    assert (difference, p) == ("+10.0 (−8.7 to +27.5)", "0.453")
    write(tmp_path / "out", runs)
    rows, differ = (read_csv(tmp_path / "out" / name) for name in ("compare.csv", "images.csv"))
    assert [row["only_this_right"] for row in rows] == ["", "5"]
    assert float(rows[1]["difference"]) == pytest.approx(0.1) and float(rows[1]["p"]) == 58 / 128
    assert [row["image"] for row in differ] == [paths[k] for k in (0, 1, 2, 3, 4, 6, 7)]
    assert [*differ[0].values()] == [paths[0], "blue", "green", "blue"]
    for name in ("compare.md", "compare.tex"):
        assert "only first right" in (tmp_path / "out" / name).read_text()


def test_images_are_matched_by_content_wherever_they_are(paths: list[str], tmp_path: Path) -> None:
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = [path.replace("/images/", "/moved/") for path in paths]
    second = predictions(moved[::-1], {0, 9})
    (tmp_path / "moved").rename(tmp_path / "images")
    _, run = open_runs(save(tmp_path, a=predictions(paths, {0}), b=second))
    assert sum(run.counts) == 30 and run.counts[2:] == [1, 0]
    assert run.predictions.paths == moved


def test_only_common_images_count_and_a_sentence_says_so(
    paths: list[str], tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """Of another split, with another label for one image, of other classes, and not of test."""
    first = predictions(paths[:20], {0, 19})
    second = replace(predictions(paths[5:], set()), split="val")
    second.labels[0] = 2
    second = replace(second, classes=[*CLASSES, "yellow"], probabilities=torch.eye(4)[second.labels])
    _, run = open_runs(save(tmp_path, a=first, b=second))
    assert run.first.paths == paths[6:20] and run.counts == [13, 0, 1, 0]
    assert f"14 of 20 images of {tmp_path / 'a'} are compared" in logged.text
    assert f"14 of 25 images of {tmp_path / 'b'} are compared" in logged.text
    assert f"{tmp_path / 'b'} has predictions of val images" in logged.text
    assert f"{tmp_path / 'b'} chooses from other classes" in logged.text


def test_runs_that_record_no_content_are_matched_by_path(
    paths: list[str], tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    runs = save(tmp_path, a=predictions(paths, {0}), b=predictions(paths[::-1], {0}, digests=False))
    assert sum(open_runs(runs)[1].counts) == 30 and "matched by path" in logged.text


def test_copies_of_an_image_are_paired_one_to_one(paths: list[str]) -> None:
    first = predictions([*paths[:3], paths[0]], set())
    second = predictions([paths[0], paths[2]], set())
    assert [each.paths for each in on_common_images([first, second])] == [[paths[0], paths[2]]] * 2
    third = predictions([paths[0], paths[1], paths[0], paths[0]], set())
    assert [len(each.paths) for each in on_common_images([first, third])] == [3, 3]


def test_nothing_is_said_of_runs_without_common_images(paths: list[str], tmp_path: Path) -> None:
    folders = save(tmp_path, a=predictions(paths[:10], set()), b=predictions(paths[10:], set()))
    with pytest.raises(UserError, match="no image of the same class in common"):
        open_runs(folders)
    file = tmp_path / "b" / "predictions.npz"
    content = file.read_bytes()
    for damaged in (b"PK damaged", content[:200] + bytes(50) + content[250:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"b/predictions\.npz is damaged"):
            open_runs(folders)
    with pytest.raises(UserError, match=r"has no predictions\.npz"):
        open_runs([folders[0], tmp_path])


def test_the_page_shows_the_images_that_are_still_the_same(
    paths: list[str], tmp_path: Path, browser: object
) -> None:
    folders = save(tmp_path, a=predictions(paths, {0, 1, 2, 3}), b=predictions(paths, {4}))
    Path(paths[0]).unlink()
    Path(paths[1]).write_bytes(Path(paths[9]).read_bytes())  # another image in its place
    page = write(tmp_path / "out", open_runs([*folders, folders[0]]))
    text = page.read_text()
    assert text.count("<img") == 3 and all(f"<br>{path}" in text for path in paths[:2])
    assert "4 images that this run classifies correctly and the first does not:" in text
    assert "1 image that the first classifies correctly and this run does not:" in text
    assert "No image" not in text.partition(str(folders[1]))[0] and "No images that" in text
    tab, said, fetched = watched(browser)
    tab.goto(page.as_uri())
    assert [url for url in fetched if not url.startswith("data:")] == [page.as_uri()]
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert tab.inner_text(".rows td:nth-child(1)") == str(folders[0]) and said == []
