"""A sweep's ranking: on the screen, as tables and as a page (`sweep.html`)."""

import math
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from bcnn.evaluation.ranking import Configuration, Job, best_of, rank, swept_options
from bcnn.evaluation.tables import console_table, write_csv, write_tables
from bcnn.utils.console import console

METRICS = ("val_top1", "val_loss", "test_top1", "test_loss")
FRACTION = "data.train_fraction"  # the option that a learning curve is drawn over


def ranking_table(jobs: Sequence[Job]) -> tuple[list[str], list[list[str]]]:
    """Return heading and rows of a table, a row for each configuration (see `rank`)."""
    options, seeds = _options(jobs)
    top1 = "top-1, % ± sd" if seeds else "top-1, % (95 % interval)"
    heading = ["job", f"validation {top1}", *options, *seeds, "loss", f"test {top1}", "seconds"]
    rows = []
    for each in rank(jobs):
        validated, loss, tested = map(each.shown, METRICS[:3])
        values = [each.options.get(name, "–") for name in options]
        count = [str(len(each.jobs))] * len(seeds)
        seconds = sum(job.seconds or 0 for job in each.jobs)
        rows.append([each.numbers, validated, *values, *count, loss, tested, f"{seconds:.1f}"])
    return heading, rows


def print_ranking(jobs: Sequence[Job]) -> None:
    """Print `ranking_table`, and how to train the best configuration again."""
    if not (ranked := rank(jobs)):
        return
    best = best_of(ranked)
    order = "best validation top-1 first" if best else "no validation images to rank them by"
    console.print(f"\njobs, {order}:", console_table(*ranking_table(jobs)))
    if best:
        label = "best checkpoint" if len(best.jobs) == 1 else "checkpoints, one of each seed"
        checkpoints = ", ".join(job.checkpoint for job in best.jobs)
        console.print(f"{label}: {checkpoints}\ntrain it again: {best.command}")


def write_sweep(folder: Path, jobs: Sequence[Job]) -> Path:
    """Write `sweep.{md,tex,csv}`, `jobs.csv` and `sweep.html`, whose path is returned."""
    from bcnn.evaluation.plots import option_svg  # takes seconds
    from bcnn.evaluation.report import write_page

    ranked, swept, page = rank(jobs), swept_options(jobs), folder / "sweep.html"
    options, seeds = _options(jobs)
    heading, rows = ranking_table(jobs)
    write_tables(folder / "sweep", heading, rows)
    _write_numbers(folder, jobs)
    best, top1 = best_of(ranked), [each.mean("val_top1") for each in ranked]
    drawn = [name for name in options if best and name != FRACTION]
    values_of = {name: [each.options.get(name, "") for each in ranked] for name in drawn}
    write_page(
        page,
        "sweep.html",
        jobs=jobs,
        constants={name: value for name, value in jobs[0].options.items() if name not in swept},
        seeds=seeds,
        options=options,
        heading=heading,
        rows=rows,
        best=best,
        pictures=[Markup(option_svg(name, each, top1)) for name, each in values_of.items()],
        learning=_learning_curve(jobs) if best and FRACTION in options else "",
        failed=[job for job in jobs if not job.succeeded],
    )
    return page


def _options(jobs: Sequence[Job]) -> tuple[list[str], list[str]]:
    """Return the names of the swept options but the seed, and ["seeds"] if that is swept too."""
    swept = swept_options(jobs)
    return [name for name in swept if name != "seed"], ["seeds"] * ("seed" in swept)


def _learning_curve(jobs: Sequence[Job]) -> Markup:
    """Plot top-1 of the test images, or of the validation images without any, over `FRACTION`."""
    from bcnn.evaluation.plots import learning_svg

    ranked, (options, seeds) = rank(jobs), _options(jobs)
    tested = all("test_top1" in job.metrics for each in ranked for job in each.jobs)
    metric, split = ("test_top1", "test") if tested else ("val_top1", "validation")
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for each in ranked:
        top1, deviation = each.mean(metric), each.deviation(metric)
        ends = (top1 - deviation, top1 + deviation) if seeds else each.interval(metric)
        others = (f"{name}={each.options.get(name, '–')}" for name in options if name != FRACTION)
        curves.setdefault(", ".join(others), []).append((float(each.options[FRACTION]), top1, *ends))
    return Markup(learning_svg(f"{split} top-1", curves))


def _write_numbers(folder: Path, jobs: Sequence[Job]) -> None:
    """Write unrounded figures: `sweep.csv` of each configuration, `jobs.csv` of each job."""
    swept, (options, _) = swept_options(jobs), _options(jobs)
    heading = ["job", *options, "seeds", *(f"{m}{end}" for end in ("", "_sd") for m in METRICS)]
    rows: list[list[object]] = []
    for each in rank(jobs):
        figures = [*map(each.mean, METRICS), *map(each.deviation, METRICS)]
        known = ["" if math.isnan(figure) else figure for figure in figures]
        rows.append([each.numbers, *map(each.options.get, options), len(each.jobs), *known])
    write_csv(folder / "sweep.csv", heading, rows)
    names, rows = [*METRICS, "images_val", "images_test"], []
    for job in jobs:
        values = [*map(job.options.get, swept), *map(job.metrics.get, names), job.seconds]
        command = Configuration([job]).command
        rows.append([job.folder.name, *values, job.checkpoint, command, job.failure])
    heading = ["job", *swept, *names, "seconds", "checkpoint", "command", "failure"]
    write_csv(folder / "jobs.csv", heading, rows)
