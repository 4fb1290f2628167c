"""The console: results by `console.print`, the story of a run by `logger`, progress bars.

Names of files and classes come from strangers: control characters in them are shown as escapes.
"""

import logging
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import datetime
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
_last_line = -LINE_EVERY  # when a line was last written, for any task

logger = logging.getLogger("bcnn")
# Rank 0 alone tells the story; an error may be another rank's alone.
logger.addFilter(lambda record: record.levelno >= logging.ERROR or is_rank_zero())


def printable(text: str) -> str:
    """Return the text on one line, with escapes (`\\x1b`, `\\n`, `\\u202e`) for control characters."""
    return UNSAFE.sub(_escape, text)


class Console(rich.console.Console):
    """rich's, where names are neither markup nor emoji codes, and lines are not wrapped."""

    def __init__(self, **options: Any) -> None:
        plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
        super().__init__(soft_wrap=True, force_jupyter=False, **plain, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        lines = "\n".join(map(printable, text.split("\n")))
        return super().render_str(lines, **options)


console = Console()
error_console = Console(stderr=True)


def setup_logging() -> None:
    """Show the records of `logger` on the terminal; the commands call it once."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _StreamHandler) for handler in logger.handlers):
        handler = _StreamHandler()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append the command, the records of `logger` and what ends the block early to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Formatter())
    command = f"{datetime.now():%Y-%m-%d %H:%M:%S}: {shlex.join(sys.argv)}"
    handler.emit(logging.makeLogRecord({"msg": command, "levelno": logging.INFO}))
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        handler.emit(logging.makeLogRecord({"msg": f"{type(error).__name__}: {error}", "levelno": logging.INFO}))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


class Task:
    """A task of which parts are done.

    Args:
        what: its name.
        total: number of parts; None: unknown.
        unit: name of the parts, in the plural.
        left: returns the time left in words, "" while it is unknown; default: from the speed.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, left: Callable[[], str] | None = None
    ) -> None:
        self.what = what
        self.unit = unit
        self.left = left or (lambda: self.left_until(total))
        self.bar = Progress(*COLUMNS, console=console, transient=True, speed_estimate_period=PERIOD)
        self.bar.add_task(printable(what), total=total, status=self)
        self._rich = self.bar.tasks[0]

    @property
    def done(self) -> int:
        """Number of parts that are done."""
        return int(self._rich.completed)

    def advance(self, parts: int = 1) -> None:
        """Count parts as done."""
        self.bar.advance(self._rich.id, parts)

    def left_until(self, part: int | None) -> str:
        """Return the time left until so many parts are done, in words; "" while it is unknown."""
        speed = self._rich.speed
        if part is None or part <= self.done or not speed:
            return ""
        return f"about {span((part - self.done) / speed)} left"

    def __str__(self) -> str:
        total, speed = self._rich.total, self._rich.speed
        counts = f"{self.done} of {total:.0f} {self.unit}" if total else ""
        rate = f"{speed:{'.0f' if speed >= 10 else '.2g'}} {self.unit}/s" if speed else ""
        return ", ".join(filter(None, (counts, rate, self.left())))


@contextmanager
def progress(
    what: str,
    total: int | None = None,
    unit: str = "images",
    left: Callable[[], str] | None = None,
    show: bool = True,
) -> Iterator[Task]:
    """Show the progress of a task until the block ends; the block calls `advance`.

    A bar on a terminal; lines on standard error where it or standard output is none. Ranks other than
    zero show nothing. See `Task` for the arguments.
    """
    task = Task(what, total, unit, left)
    show = show and is_rank_zero()
    if show and sys.stdout.isatty() and sys.stderr.isatty():
        with task.bar:
            yield task
        return
    ended = threading.Event()
    if show:
        threading.Thread(target=_write_lines, args=(task, ended), daemon=True).start()
    try:
        yield task
    finally:
        ended.set()


def track(
    parts: Iterable[T], what: str, total: int | None = None, unit: str = "images", show: bool = True
) -> Iterator[T]:
    """Iterate over the parts of a task and show its `progress`; `total` defaults to their number."""
    if total is None and isinstance(parts, Sized):
        total = len(parts)
    with progress(what, total, unit, show=show) as task:
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
    if rank is None:
        names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # in Lightning's order
        rank = next((os.environ[name] for name in names if name in os.environ), 0)
    return int(rank) == 0


class _Formatter(logging.Formatter):
    """One line a record; warnings and errors begin with their level."""

    def format(self, record: logging.LogRecord) -> str:
        message = printable(record.getMessage())
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return level + message


class _StreamHandler(logging.StreamHandler):
    """Writes to the current standard output, or to standard error from `WARNING` on."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        super().emit(record)


def _write_lines(task: Task, ended: threading.Event) -> None:
    """Write a line every `LINE_EVERY` seconds if more parts are done than in the line before."""
    global _last_line
    written = None
    while not ended.wait(max(FIRST_LINE, _last_line + LINE_EVERY - time.monotonic())):
        if task.done != written:
            error_console.print(f"{task.what}: {task}".removesuffix(": "))
            written, _last_line = task.done, time.monotonic()


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
