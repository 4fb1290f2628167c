"""The jobs of a sweep, ranked: on the screen, as a table (`sweep.csv`) and as a page (`sweep.html`)."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

from markupsafe import Markup
from rich.table import Table

from bcnn.utils.console import console

METRICS = ("val_top1", "val_loss", "test_top1", "test_loss")


@dataclass
class Job:
    """One run of a sweep."""

    folder: Path  # its name is the job's number
    overrides: list[str]  # of the configuration
    metrics: dict[str, float] = field(default_factory=dict)  # empty if no stage has finished
    checkpoint: str = ""  # the best
    seconds: float | None = None  # None if the job has not finished
    failure: str = ""

    @property
    def succeeded(self) -> bool:
        return self.seconds is not None and not self.failure

    @property
    def options(self) -> dict[str, str]:
        """Values of the overrides, by the option's name."""
        pairs = (word.partition("=") for word in self.overrides)
        return {name.lstrip("+~"): value for name, _, value in pairs}

    @property
    def command(self) -> str:
        """The command that trains this job alone."""
        return shlex.join(["bcnn", "train", *self.overrides])


def swept_options(jobs: Sequence[Job]) -> list[str]:
    """Return the names of the options that differ between jobs."""
    names = dict.fromkeys(name for job in jobs for name in job.options)
    return [name for name in names if len({job.options.get(name) for job in jobs}) > 1]


def rank(jobs: Sequence[Job]) -> list[list[Job]]:
    """Group the jobs that succeeded and differ in the seed alone; return the best group first.

    Groups are ordered by the mean validation top-1 of their jobs, then by the mean validation loss, so
    that one lucky seed makes no group the best.
    """
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        if job.succeeded:
            groups.setdefault(frozenset((job.options | {"seed": ""}).items()), []).append(job)

    def order(group: list[Job]) -> tuple[bool, float, float]:
        top1 = mean("val_top1", group)
        return math.isnan(top1), -top1, mean("val_loss", group)

    return sorted(groups.values(), key=order)


def best_of(groups: Sequence[list[Job]]) -> list[Job]:
    """Return the first of the ranked groups; an empty list without validation figures."""
    return groups[0] if groups and not math.isnan(mean("val_top1", groups[0])) else []


def mean(metric: str, jobs: Sequence[Job]) -> float:
    """Return the mean of a metric over jobs; nan if a job lacks it."""
    return fmean(job.metrics.get(metric, math.nan) for job in jobs)


def shown(metric: str, jobs: Sequence[Job]) -> str:
    """Return the mean of a metric over jobs as text, with the standard deviation of several jobs."""
    if math.isnan(mean(metric, jobs)):
        return "–"
    digits = ".4f" if metric.endswith("loss") else ".1%"
    deviation = f" ± {stdev(job.metrics[metric] for job in jobs):{digits}}" if len(jobs) > 1 else ""
    return f"{mean(metric, jobs):{digits}}{deviation}"


def print_ranking(jobs: Sequence[Job]) -> None:
    """Print a row for each group of jobs (see `rank`), and how to train the best again."""
    if not (groups := rank(jobs)):
        return
    best, swept = best_of(groups), swept_options(jobs)
    options = [name for name in swept if name != "seed"]
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("job", "validation", *options, "loss", "test", "seconds"):
        name = heading.replace(".", ".\n")
        table.add_column(name, justify="right", no_wrap=heading not in options, overflow="fold")
    for group in groups:
        numbers = " ".join(job.folder.name for job in group)
        top1, *others = [shown(metric, group) for metric in METRICS[:3]]
        values = [group[0].options.get(name, "–") for name in options]
        table.add_row(numbers, top1, *values, *others, f"{sum(job.seconds or 0 for job in group):.1f}")
    order = "best validation top-1 first" if best else "no validation images to rank them by"
    seeds = "; mean ± standard deviation over seeds" if "seed" in swept else ""
    console.print(f"\njobs, {order}{seeds}:", table)
    if best:
        console.print(f"best checkpoint: {best[0].checkpoint}\ntrain it again: {best[0].command}")


def write_sweep(folder: Path, jobs: Sequence[Job]) -> tuple[Path, Path]:
    """Write `sweep.csv` and `sweep.html` in the sweep's folder; return their paths."""
    from bcnn.evaluation.plots import option_svg  # takes seconds
    from bcnn.evaluation.report import write_page
    from bcnn.evaluation.results import write_csv

    table, page = folder / "sweep.csv", folder / "sweep.html"
    groups, swept = rank(jobs), swept_options(jobs)
    failed = [job for job in jobs if not job.succeeded]
    rows = []
    for job in chain(*groups, failed):
        values = [*map(job.options.get, swept), *map(job.metrics.get, METRICS)]
        rows.append([job.folder.name, *values, job.seconds, job.checkpoint, job.command, job.failure])
    write_csv(table, ["job", *swept, *METRICS, "seconds", "checkpoint", "command", "failure"], rows)

    best, options = best_of(groups), [name for name in swept if name != "seed"]
    top1 = [mean("val_top1", group) for group in groups]
    values_of = {name: [group[0].options.get(name, "") for group in groups] for name in options if best}
    write_page(
        page,
        "sweep.html",
        jobs=jobs,
        swept=swept,
        options=options,
        groups=groups,
        best=best,
        pictures=[Markup(option_svg(name, each, top1)) for name, each in values_of.items()],
        failed=failed,
        shown=shown,
    )
    return table, page
