"""How far something that takes long has come: a bar on a terminal, a line every so often elsewhere.

It goes to standard error; what was asked for goes to standard output.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

T = TypeVar("T")

FLICKER = 0.5  # seconds that anything may take without a bar
SILENT = 2.0  # or without a line
EVERY = 15.0  # seconds from a line to the next, at least

_screen = Console(stderr=True)
_last_line = -EVERY  # when it was written


class Task:
    """Something that takes long.

    Args:
        what: it is.
        total: number of its parts; None: nobody knows.
        unit: what its parts are called.
        left: says how long it still takes, "" where that is not known; default: from the parts done.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, left: Callable[[], str] | None = None
    ) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.left = left or (lambda: self.left_until(self.total))
        self.done = 0
        self.began = time.monotonic()
        self._counted: list[tuple[float, int]] = []  # when, and how many were done: first and latest

    def advance(self, parts: int = 1) -> None:
        """Count parts as done."""
        self.done += parts
        # From the first on: it may have waited for processes to start.
        self._counted = [*self._counted[:1], (time.monotonic(), self.done)]

    @property
    def rate(self) -> float:
        """Parts a second; 0 where that is not known yet."""
        if len(self._counted) < 2:
            return 0.0
        (first, some), (latest, more) = self._counted
        return (more - some) / (latest - first) if latest - first > 1 else 0.0

    def left_until(self, part: int | None) -> str:
        """How long it takes until so many parts are done, in words; "" where that is not known yet."""
        if part is None or not self.rate or part <= self.done:
            return ""
        seconds = (part - self.done) / self.rate - (time.monotonic() - self._counted[-1][0])
        return f"about {span(max(0.0, seconds))} left"

    def __str__(self) -> str:
        """How far it has come."""
        counts = f"{self.done} of {self.total} {self.unit}" if self.total else ""
        number = f"{self.rate:.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
        speed = f"{number} {self.unit}/s" if self.rate else ""
        return ", ".join(filter(None, (counts, speed, self.left())))


@contextmanager
def progress(
    what: str,
    total: int | None = None,
    unit: str = "images",
    left: Callable[[], str] | None = None,
    show: bool = True,
) -> Iterator[Task]:
    """Show how far a task has come until the block ends; the block calls `advance`.

    A bar where standard output and error are a terminal (a bar is in the way of what reaches it through
    a pipe); else lines. Nothing in processes of other ranks than zero.

    Args:
        what, total, unit, left: of the `Task`.
        show: False: nothing.
    """
    from lightning_utilities.core.rank_zero import rank_zero_only  # not for --help

    task = Task(what, total, unit, left)
    if not show or getattr(rank_zero_only, "rank", None):
        yield task
    elif sys.stdout.isatty() and sys.stderr.isatty():
        with Live(get_renderable=partial(_bar, task), console=_screen, transient=True):
            yield task
    else:
        ended = threading.Event()
        threading.Thread(target=_write_lines, args=(task, ended), daemon=True).start()
        try:
            yield task
        finally:
            ended.set()


def track(
    parts: Iterable[T], what: str, total: int | None = None, unit: str = "images", show: bool = True
) -> Iterator[T]:
    """Go through the parts of a task, and show how far that has come.

    Args:
        parts: are done when the next one is asked for.
        total: default: their number, where they have one.
        what, unit, show: as for `progress`.
    """
    if total is None and isinstance(parts, Sized):
        total = len(parts)
    with progress(what, total, unit, show=show) as task:
        for part in parts:
            yield part
            task.advance()


def span(seconds: float) -> str:
    """A duration, to two figures or so: `2.4 s`, `48 s`, `12 min`, `3 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _bar(task: Task) -> RenderableType:
    if time.monotonic() - task.began < FLICKER:
        return Group()
    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(task.total, task.done, width=30, pulse=task.total is None)
    row.add_row(task.what, bar, str(task))
    return row


def _write_lines(task: Task, ended: threading.Event) -> None:
    global _last_line
    pause = SILENT
    while not ended.wait(pause):
        pause = _last_line + EVERY - time.monotonic()
        if pause <= 0:
            print(f"{task.what}: {task}".removesuffix(": "), file=sys.stderr, flush=True)
            _last_line, pause = time.monotonic(), EVERY
