"""What is said on the terminal: names come from strangers, and act on nothing there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import rich.console
from rich.text import Text

# Control characters, line ends, the marks and overrides that turn the direction of writing, and bytes
# of file names that are no valid Unicode. What joins letters (U+200C, U+200D) stays.
ACTING = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text on one line, with escapes (`\\x1b`, `\\n`, `\\u202e`) for what terminals act on."""
    return ACTING.sub(_escape, text)


_logs: list[TextIO] = []


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print sentences, each on a line of its own, whatever names are in them."""
    for line in lines:
        print(printable(str(line)), file=file)
    log(*lines)


def log(*lines: object) -> None:
    """Write sentences where `logged` has what is said be written, too."""
    for file in _logs:
        for line in lines:
            print(printable(str(line)), file=file, flush=True)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Have what is said until the block ends appended to a file as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        _logs.append(file)
        try:
            yield
        finally:
            _logs.remove(file)


class Console(rich.console.Console):
    """rich's, for tables with names in them, which are neither markup nor emoji codes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(printable(text), **options)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
