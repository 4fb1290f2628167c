"""The console: results by `console.print`, a run's story by `logger.info`; names act on nothing there.

Names of files and classes come from strangers: control characters in them are shown as escapes.
"""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console
from rich.text import Text

# Control characters, line ends, the marks and overrides that turn the direction of writing, and bytes
# of file names that are no valid Unicode. What joins letters (U+200C, U+200D) stays.
UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

logger = logging.getLogger("bcnn")


def printable(text: str) -> str:
    """Return the text on one line, with escapes (`\\x1b`, `\\n`, `\\u202e`) for control characters."""
    return UNSAFE.sub(_escape, text)


class Console(rich.console.Console):
    """rich's, where names are neither markup nor emoji codes, and lines are not wrapped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        lines = "\n".join(map(printable, text.split("\n")))
        return super().render_str(lines, **options)


console = Console()
error_console = Console(stderr=True)


class _Formatter(logging.Formatter):
    """A sentence a line; warnings and errors begin with their level."""

    def format(self, record: logging.LogRecord) -> str:
        message = printable(record.getMessage())
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return level + message


class _StreamHandler(logging.StreamHandler):
    """Writes to the standard output of the moment, or to standard error from `WARNING` on."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        super().emit(record)


def setup_logging() -> None:
    """Show what `logger` is given on the terminal; called once, by the commands."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _StreamHandler) for handler in logger.handlers):
        handler = _StreamHandler()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append what `logger` is given to a file, too, until the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Formatter())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
