"""The jobs of a sweep: in order, as a table, and as a page of what each option did."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from bcnn.evaluation.figures import table
from bcnn.evaluation.plots import option_svg
from bcnn.evaluation.report import write_page
from bcnn.utils.cells import harmless

FIGURES = ("val_top1", "val_loss", "test_top1", "test_loss")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        folder: of its own.
        words: the overrides that it was composed from.
        command: what trains it again.
        metrics: validation and test figures, by name.
        seconds: that it took; None where it has not ended.
        checkpoint: its best weights.
        failure: what went wrong, or empty.
    """

    folder: Path
    words: list[str]
    command: str
    metrics: dict[str, float]
    seconds: float | None
    checkpoint: Path | None
    failure: str

    @property
    def well(self) -> bool:
        """Whether it has ended, and without a failure."""
        return self.seconds is not None and not self.failure

    @property
    def options(self) -> dict[str, str]:
        """The text of each override, by the option's name."""
        return {key_of(word): word.partition("=")[2] for word in self.words}

    @property
    def ranked(self) -> bool:
        """Whether it has ended well, and there were validation images to rank it by."""
        return self.well and not math.isnan(self.metrics.get("val_top1", math.nan))

    def said(self, options: Sequence[str]) -> str:
        """Its values of these options."""
        return " ".join(f"{name}={self.options[name]}" for name in options if name in self.options)

    def shown(self, name: str) -> str:
        """A figure as text."""
        number = self.metrics.get(name, math.nan)
        if math.isnan(number):
            return "–"
        return f"{number:.4f}" if name.endswith("loss") else f"{number:.1%}"


def key_of(word: str) -> str:
    """The option's name in an override."""
    return word.partition("=")[0].lstrip("+~")


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """By validation top-1, then by validation loss; those that failed come last."""

    def order(job: Job) -> tuple[bool, float, float, int, str]:
        best = (-job.metrics["val_top1"], job.metrics["val_loss"]) if job.ranked else (0.0, 0.0)
        return not job.well, *best, len(job.folder.name), job.folder.name

    return sorted(jobs, key=order)


def swept_options(jobs: Sequence[Job]) -> list[str]:
    """The options that not all jobs have the same of."""
    names = dict.fromkeys(name for job in jobs for name in job.options)
    return [name for name in names if len({job.options.get(name) for job in jobs}) > 1]


def write_jobs(folder: Path, jobs: Sequence[Job]) -> tuple[Path, Path]:
    """`sweep.csv` and `sweep.html` of jobs in order, in the sweep's folder.

    Raises:
        UserError: one cannot be written.
    """
    options = swept_options(jobs)
    with table(folder / "sweep.csv") as writer:
        writer.writerow(["job", *options, *FIGURES, "seconds", "checkpoint", "command", "failure"])
        for job in jobs:
            values = [harmless(job.options.get(name, "")) for name in options]
            figures = [job.metrics.get(name, "") for name in FIGURES]
            seconds = "" if job.seconds is None else f"{job.seconds:.1f}"
            rest = [str(job.checkpoint or ""), harmless(job.command), harmless(job.failure)]
            writer.writerow([job.folder.name, *values, *figures, seconds, *rest])
    ranked = [job for job in jobs if job.ranked]
    shares = [job.metrics["val_top1"] for job in ranked]
    pictures = [
        Markup(option_svg(name, [job.options.get(name, "") for job in ranked], shares))
        for name in options
        if ranked
    ]
    common = [word for word in jobs[0].words if key_of(word) not in options]
    write_page(
        folder / "sweep.html",
        "sweep.html",
        title=f"Sweep of {len(jobs)} jobs",
        best=ranked[0] if ranked else None,
        jobs=[job for job in jobs if job.well],
        failed=[job for job in jobs if not job.well],
        options=options,
        common=common,
        pictures=pictures,
        seconds=sum(job.seconds or 0 for job in jobs),
    )
    return folder / "sweep.csv", folder / "sweep.html"
