"""A sweep's configurations: seeds are repetitions, nothing lucky is first, and all tables agree."""

import re
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from conftest import read_csv
from scipy.stats import binomtest

from bcnn.evaluation.plots import learning_svg, option_svg
from bcnn.evaluation.ranking import Job, rank
from bcnn.evaluation.sweep_page import print_ranking, ranking_table, write_sweep

pytestmark = pytest.mark.figures


def job(name: str, top1: float | None, loss: float = 1.0, failure: str = "", **options: str) -> Job:
    overrides = ["stage=last", *(f"{key}={value}" for key, value in options.items())]
    metrics = {} if top1 is None else {"val_top1": top1, "val_loss": loss}
    return Job(Path(name), overrides, metrics, f"{name}/best.ckpt", 1.0, failure)


def repeated(**figures: list[float]) -> list[Job]:
    """Jobs of each lr, with seeds from 0."""
    pairs = [(lr, seed, top1) for lr, each in figures.items() for seed, top1 in enumerate(each)]
    return [job(str(k), t, lr=lr, seed=str(seed)) for k, (lr, seed, t) in enumerate(pairs)]


def test_jobs_are_ranked_by_validation_top1_then_by_its_loss() -> None:
    figures = {"2": (0.5, 0.3), "3": (None,), "5": (0.5, 0.2), "6": (0.7, 9.0), "10": (0.5, 0.3)}
    jobs = [job(name, *metrics, lr=name) for name, metrics in figures.items()]
    jobs.append(job("4", None, failure="the disk is full", lr="4"))
    jobs.append(job("7", 0.6, failure="it ended worse than it started", lr="7"))
    assert [each.numbers for each in rank(jobs)] == ["6", "7", "5", "2", "10", "3"]


def test_a_row_is_a_configuration_and_a_lucky_seed_is_not_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = repeated(high=[0.95, 0.65], steady=[0.92, 0.88])
    heading, rows = ranking_table(jobs)
    assert heading[:4] == ["job", "validation top-1, % ± sd", "lr", "seeds"]
    assert [row[:4] for row in rows] == [
        ["2 3", "90.0 ± 2.8", "steady", "2"],  # sample standard deviation: 0.04 / √2
        ["0 1", "80.0 ± 21.2", "high", "2"],
    ]
    print_ranking(jobs)
    printed = capsys.readouterr().out
    assert printed.index("90.0 ± 2.8") < printed.index("80.0 ± 21.2") and "95.0" not in printed
    assert "checkpoints, one of each seed: 2/best.ckpt, 3/best.ckpt" in printed
    assert "train it again: bcnn train -m stage=last lr=steady seed=0,1" in printed
    write_sweep(tmp_path, jobs)
    for name in ("sweep.html", "sweep.md", "sweep.tex"):
        text = (tmp_path / name).read_text().replace(r"$\pm$", "±")
        assert text.index("90.0 ± 2.8") < text.index("80.0 ± 21.2") and "95.0" not in text
    first, other = read_csv(tmp_path / "sweep.csv")
    assert (first["job"], first["lr"], first["seeds"]) == ("2 3", "steady", "2")
    assert float(first["val_top1"]) == mean([0.92, 0.88]) and first["test_top1"] == ""
    assert float(other["val_top1_sd"]) == pytest.approx(stdev([0.95, 0.65]))
    assert [row["val_top1"] for row in read_csv(tmp_path / "jobs.csv")] == [
        "0.95",
        "0.65",
        "0.92",
        "0.88",
    ]


def test_a_sweep_of_seeds_alone_has_one_row_and_no_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(str(k), 0.5 + k / 10, seed=str(k)) for k in range(3)]
    print_ranking(jobs)
    write_sweep(tmp_path, jobs)
    page = (tmp_path / "sweep.html").read_text()
    assert "60.0 ± 10.0" in capsys.readouterr().out and "70.0" not in page
    assert "best validation top-1" not in page and "Train it again" in page
    assert len(read_csv(tmp_path / "sweep.csv")) == 1


def test_a_seed_that_survived_alone_comes_after_complete_configurations() -> None:
    jobs = repeated(a=[0.7, 0.6, 0.8], b=[0.9, 0.9, 0.9])
    jobs[3].failure = jobs[4].failure = "diverged"
    jobs[3].metrics = jobs[4].metrics = {}
    assert [each.numbers for each in rank(jobs)] == ["0 1 2", "5"]
    jobs[4].failure, jobs[4].seconds = "", None  # not finished
    assert [each.numbers for each in rank(jobs)] == ["0 1 2", "5"]


def test_a_trial_drawn_twice_is_no_repetition() -> None:
    jobs = [job("0", 0.6, lr="1"), job("1", 0.6, lr="1"), job("2", 0.7, lr="2")]
    assert [each.numbers for each in rank(jobs)] == ["2", "0"]
    assert ranking_table(jobs)[1][1][1] == "60.0"  # not ± 0.0


def test_a_single_figure_has_the_interval_of_its_images() -> None:
    jobs = [job("0", 0.9, lr="1"), job("1", 0.5, lr="2")]
    jobs[0].metrics |= {"test_top1": 0.8, "images_val": 50, "images_test": 200}
    first, second = ranking_table(jobs)[1]
    for cell, (hits, images) in ((first[1], (45, 50)), (first[4], (160, 200))):
        interval = binomtest(hits, images).proportion_ci(method="wilson")
        assert cell == f"{100 * hits / images:.1f} ({100 * interval.low:.1f}–{100 * interval.high:.1f})"
    assert second[1] == "50.0"  # of images that nobody counted


def test_only_numbers_are_joined_by_a_line() -> None:
    line, top1 = "stroke: var(--soft)", [0.9, 0.8, 0.7, 0.6]
    assert line in option_svg("x", ["1", "2", "1", "2"], top1)
    assert line not in option_svg("x", ["a", "b", "a", "b"], top1)


def test_a_sweep_of_the_share_of_training_images_has_a_learning_curve(tmp_path: Path) -> None:
    def jobs(**more: str) -> list[Job]:
        shares = {"0.25": 0.6, "0.5": 0.7, "1.0": 0.8}
        return [job(k, t, **{"data.train_fraction": k}, **more) for k, t in shares.items()]

    write_sweep(tmp_path / "one", jobs())
    page = (tmp_path / "one" / "sweep.html").read_text()
    assert "Learning curve" in page and "share of the training images" in page
    assert "validation top-1" in page and "Effect of each option" not in page
    both = jobs(pooling="bilinear") + jobs(pooling="sqrt")
    write_sweep(tmp_path / "two", both)
    page = (tmp_path / "two" / "sweep.html").read_text()
    assert "pooling=bilinear</text>" in page and "pooling=sqrt</text>" in page
    for each in both:
        each.metrics["test_top1"] = 0.5
    write_sweep(tmp_path / "two", both)
    assert "test top-1</text>" in (tmp_path / "two" / "sweep.html").read_text()


def test_a_learning_curve_is_drawn_from_the_smallest_share_to_the_largest() -> None:
    points = [(1.0, 0.8, 0.7, 0.9), (0.5, 0.6, 0.5, 0.7), (0.25, 0.5, np.nan, np.nan)]
    svg = learning_svg("test top-1", {"": points})
    (line,) = re.findall(r'<path d="(M [^"]*L [^"]*L [^"]*)" clip-path', svg)
    x, y = np.array(re.findall(r"([\d.]+) ([\d.]+)", line), float).T
    assert (np.diff(x) > 0).all() and (np.diff(y) < 0).all()  # y points downward
    assert re.findall(r">([\d.]+)</text>", svg) == ["0.25", "0.5", "1"]


def test_the_page_shows_markup_as_text(tmp_path: Path) -> None:
    jobs = [job("0", 0.5, a="a,b"), job("1", 0.75, a="<script>"), job("2", None, failure="<b>", a="c")]
    write_sweep(tmp_path, jobs)
    page = (tmp_path / "sweep.html").read_text()
    assert "<script" not in page and "<b>" not in page and "75.0" in page
    assert page.index("&lt;script&gt;") < page.index("a,b</td>")
    found = [(row["job"], row["a"], row["failure"]) for row in read_csv(tmp_path / "jobs.csv")]
    assert found == [("0", "a,b", ""), ("1", "<script>", ""), ("2", "c", "<b>")]
    assert "options of all jobs: stage=last" in page


def test_without_validation_images_no_job_is_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job("0", None, lr="1"), job("1", None, lr="2")]
    print_ranking(jobs)
    write_sweep(tmp_path, jobs)
    printed, page = capsys.readouterr().out, (tmp_path / "sweep.html").read_text()
    assert "no validation images to rank them by" in printed and "train it again" not in printed
    assert "no validation images" in page and "Train the best again" not in page
