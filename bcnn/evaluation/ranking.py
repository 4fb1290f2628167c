"""The jobs of a sweep, by configuration, ranked by validation top-1."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev


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
    def counts(self) -> bool:
        """Whether it is ranked: one that ended worse than it started is, by what it kept."""
        return self.succeeded or (self.seconds is not None and bool(self.metrics))

    @property
    def options(self) -> dict[str, str]:
        """Values of the overrides, by the option's name."""
        pairs = (word.partition("=") for word in self.overrides)
        return {name.lstrip("+~"): value for name, _, value in pairs}


@dataclass
class Configuration:
    """Jobs that count and differ in the seed alone, one of each seed: repetitions of one run."""

    jobs: list[Job]

    @property
    def options(self) -> dict[str, str]:
        return {name: value for name, value in self.jobs[0].options.items() if name != "seed"}

    @property
    def numbers(self) -> str:
        return " ".join(job.folder.name for job in self.jobs)

    @property
    def command(self) -> str:
        """The command that trains these jobs alone."""
        words = self.jobs[0].overrides
        if len(self.jobs) > 1:
            seeds = ",".join(job.options.get("seed", "0") for job in self.jobs)
            words = ["-m", *(word for word in words if not word.startswith("seed=")), f"seed={seeds}"]
        return shlex.join(["bcnn", "train", *words])

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over the seeds; nan if a job lacks it."""
        return fmean(self._figures(metric))

    def deviation(self, metric: str) -> float:
        """Return the standard deviation over seeds; nan for one seed, or if a job lacks the metric."""
        figures = self._figures(metric)
        return math.nan if len(figures) == 1 or math.isnan(sum(figures)) else stdev(figures)

    def interval(self, metric: str) -> tuple[float, float]:
        """Return the ends of the 95 % interval of one seed's top-1; nan for others."""
        from bcnn.evaluation.metrics import proportion  # imports torch, which takes seconds

        images = self.jobs[0].metrics.get(f"images_{metric.removesuffix('_top1')}")
        if len(self.jobs) > 1 or not images:
            return math.nan, math.nan
        found = proportion(round(self.mean(metric) * images), int(images))
        return found.low, found.high

    def shown(self, metric: str) -> str:
        """Return the mean as text, ± the deviation of several seeds; top-1 in percent."""
        scale, digits = (1, ".4f") if metric.endswith("loss") else (100, ".1f")
        mean, deviation, (low, high) = self.mean(metric), self.deviation(metric), self.interval(metric)
        if math.isnan(mean):
            return "–"
        spread = "" if math.isnan(deviation) else f" ± {scale * deviation:{digits}}"
        interval = "" if math.isnan(low) else f" ({scale * low:{digits}}–{scale * high:{digits}})"
        return f"{scale * mean:{digits}}{spread}{interval}"

    def _figures(self, metric: str) -> list[float]:
        return [job.metrics.get(metric, math.nan) for job in self.jobs]


def swept_options(jobs: Sequence[Job]) -> list[str]:
    """Return the names of the options that differ between jobs."""
    names = dict.fromkeys(name for job in jobs for name in job.options)
    return [name for name in names if len({job.options.get(name) for job in jobs}) > 1]


def rank(jobs: Sequence[Job]) -> list[Configuration]:
    """Return the configurations of the jobs that count, the best first.

    They are ordered by the mean validation top-1 of their seeds, then by the mean validation loss.
    Those with fewer seeds than others, because jobs failed or did not end, come last: no lucky seed
    makes a configuration the best.
    """
    groups: dict[object, dict[str, Job]] = {}
    for job in jobs:
        if job.counts:
            options = job.options
            seed = options.pop("seed", "")
            groups.setdefault(frozenset(options.items()), {}).setdefault(seed, job)
    found = [Configuration([*group.values()]) for group in groups.values()]
    seeds = max((len(each.jobs) for each in found), default=0)

    def order(each: Configuration) -> tuple[bool, bool, float, float]:
        top1 = each.mean("val_top1")
        return len(each.jobs) < seeds, math.isnan(top1), -top1, each.mean("val_loss")

    return sorted(found, key=order)


def best_of(ranked: Sequence[Configuration]) -> Configuration | None:
    """Return the first of the ranked configurations; None without validation figures."""
    return ranked[0] if ranked and not math.isnan(ranked[0].mean("val_top1")) else None
