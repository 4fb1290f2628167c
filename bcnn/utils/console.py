"""The console: results by `console.print`, the story of a run by `logger`, progress bars.

Names of files and classes come from strangers: control characters in them are shown as escapes.
"""

import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from logging.handlers import MemoryHandler
from operator import length_hint
from pathlib import Path
from typing import Any, TypeVar

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

T = TypeVar("T")

# Control characters, line ends, marks that change the direction of writing, and bytes of file names
# that are not valid Unicode. Joiners of letters (U+200C, U+200D) are harmless.
UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

COLUMNS = (
    TextColumn("{task.description}", markup=False),
    BarColumn(30),
    TextColumn("{task.fields[status]}", markup=False),
)
FIRST_LINE = 2.0  # seconds until the first line of a task
LINE_EVERY = 15.0  # seconds between two lines, at least
PERIOD = 600.0  # seconds that the speed is averaged over

logger = logging.getLogger("bcnn")
# Only rank 0 logs, but an error may be another rank's alone.
logger.addFilter(lambda record: record.levelno >= logging.ERROR or is_rank_zero())


def printable(text: str) -> str:
    """Return the text on one line, with escapes (`\\x1b`, `\\n`, `\\u202e`) for control characters."""

    def escape(found: re.Match[str]) -> str:
        if "\udc80" <= found[0] <= "\udcff":  # a byte that is not valid Unicode
            return f"\\x{ord(found[0]) - 0xDC00:02x}"
        return found[0].encode("unicode_escape").decode()

    return UNSAFE.sub(escape, text)


class Console(rich.console.Console):
    """rich's, where names are neither markup nor emoji codes, and lines are not wrapped."""

    def __init__(self, **options: Any) -> None:
        options |= {"markup": False, "emoji": False, "highlight": False}
        super().__init__(soft_wrap=True, force_jupyter=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


console = Console()
error_console = Console(stderr=True)


def setup_logging() -> None:
    """Show the records of `logger` on the terminal; the commands call it once."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(_terminal)


@contextmanager
def log_file(path: Path) -> Iterator[Callable[[], None]]:
    """Collect the command, the records of `logger` and what ends the block early.

    Give a function to call once: it appends them to a file from then on. Without it nothing is written.
    """
    memory = MemoryHandler(0)  # which keeps the records until it has a target, then keeps none

    def note(text: str) -> None:
        memory.handle(logging.makeLogRecord({"msg": text, "levelno": logging.INFO}))

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(_Formatter())
        memory.setTarget(file)
        memory.flush()

    if is_rank_zero():  # the others append to the same file
        note(f"{datetime.now():%Y-%m-%d %H:%M:%S}: {shlex.join(sys.orig_argv)}")
    logger.addHandler(memory)
    try:
        yield begin
    except BaseException as error:
        note(f"{type(error).__name__}: {error}")
        raise
    finally:
        logger.removeHandler(memory)
        if memory.target:
            memory.target.close()


class Task:
    """A task of which parts are done; as text: how many, how fast, and the time left."""

    last_line = -math.inf  # when a line was last written, for any task

    def __init__(self, what: str, total: int | None, unit: str, lines: bool) -> None:
        self.what, self.unit, self.lines = what, unit, lines
        self.bar = Progress(*COLUMNS, console=console, transient=True, speed_estimate_period=PERIOD)
        self.bar.add_task(printable(what), total=total, status=self)
        self.state = self.bar.tasks[0]
        self.begun = time.monotonic()

    def advance(self, parts: int = 1) -> None:
        """Count parts as done; write a line if it is time for one."""
        self.bar.advance(self.state.id, parts)
        now = time.monotonic()
        if self.lines and now >= max(self.begun + FIRST_LINE, Task.last_line + LINE_EVERY):
            Task.last_line = now
            error_console.print(f"{self.what}: {self}".removesuffix(": "))

    def __str__(self) -> str:
        done, total, speed = self.state.completed, self.state.total, self.state.speed
        of_total = f" of {total:.0f}" if total else ""
        counts = f"{done:.0f}{of_total} {self.unit}" if total or done else ""
        rate = f"{speed:{'.0f' if speed >= 10 else '.2g'}} {self.unit}/s" if speed else ""
        left = f"about {span(self.state.time_remaining)} left" if self.state.time_remaining else ""
        return ", ".join(filter(None, (counts, rate, left)))


@contextmanager
def progress(
    what: str, total: int | None = None, unit: str = "images", show: bool = True
) -> Iterator[Task]:
    """Show, on rank zero, the progress of a task of `total` parts; the block calls `advance`.

    A bar on a terminal; lines on standard error where it or standard output is none.
    """
    show = show and is_rank_zero()
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    task = Task(what, total, unit, lines=show and not terminal)
    with task.bar if show and terminal else nullcontext():
        yield task


def track(parts: Iterable[T], what: str, total: int | None = None, unit: str = "images") -> Iterator[T]:
    """Iterate over the parts of a task and show its `progress`; `total` defaults to their number."""
    with progress(what, total or length_hint(parts) or None, unit) as task:
        for part in parts:
            yield part
            task.advance()


def span(seconds: float) -> str:
    """Return a duration to about two figures: `2.4 s`, `48 s`, `12 min`, `3 h 05 min`."""
    if seconds < 99.5:
        return f"{seconds:.{int(seconds < 9.95)}f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def is_rank_zero() -> bool:
    """Return whether this is the first, or the only, process of a run."""
    lightning = sys.modules.get("lightning_utilities.core.rank_zero")  # takes a while to import
    rank = getattr(lightning.rank_zero_only, "rank", None) if lightning else None
    variables = map(os.environ.get, ("RANK", "LOCAL_RANK", "SLURM_PROCID"))  # in Lightning's order
    return int(next(each for each in (rank, *variables, 0) if each is not None)) == 0


class _Formatter(logging.Formatter):
    """One line a record; warnings and errors begin with their level."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return level + printable(record.getMessage())


class _StreamHandler(logging.StreamHandler):
    """Writes to the current standard output, or to standard error from `WARNING` on."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        super().emit(record)


_terminal = _StreamHandler()
_terminal.setFormatter(_Formatter())
