"""Tables of text on the console, in Markdown and in LaTeX; and CSV files."""

import csv
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from bcnn.utils.console import printable
from bcnn.utils.files import atomic_write

Cells = Sequence[str]
FIGURE = 24  # characters of a figure with its interval, at most

LATEX = str.maketrans(
    {mark: f"\\{mark}" for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}"}
    | {"±": r"$\pm$", "−": "$-$", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}"}
)


def console_table(heading: Cells, rows: Sequence[Cells]) -> Table:
    """Return a table for the console, where names and long cells are folded and figures are not."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name, *cells in zip(heading, *rows, strict=True):
        widest = max(map(len, cells))
        title = textwrap.fill(name, max(widest, 5), break_long_words=False).replace(".", ".\n")
        is_figure = bool(table.columns) and widest <= FIGURE
        table.add_column(title, no_wrap=is_figure, overflow="fold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def write_tables(stem: Path, heading: Cells, rows: Sequence[Cells]) -> None:
    """Write a table as `stem.md` and `stem.tex`."""
    for suffix, text in ((".md", markdown(heading, rows)), (".tex", latex(heading, rows))):
        with atomic_write(stem.with_suffix(suffix)) as part:
            part.write_text(text, encoding="utf-8")


def markdown(heading: Cells, rows: Iterable[Cells]) -> str:
    """Return a table of GitHub's Markdown; characters that would be markup are escaped."""

    def line(cells: Cells) -> str:
        escaped = (re.sub(r"([\\`*_<>|~$&\[\]])", r"\\\1", printable(cell)) for cell in cells)
        return f"| {' | '.join(escaped)} |\n"

    return line(heading) + "|---" + "|--:" * (len(heading) - 1) + "|\n" + "".join(map(line, rows))


def latex(heading: Cells, rows: Iterable[Cells]) -> str:
    """Return a tabular; characters that LaTeX would act on are escaped."""

    def line(cells: Cells) -> str:
        return " & ".join(printable(cell).translate(LATEX) for cell in cells) + " \\\\\n"

    return (
        "% needs \\usepackage{booktabs}\n"
        f"\\begin{{tabular}}{{l{'r' * (len(heading) - 1)}}}\n"
        f"\\toprule\n{line(heading)}\\midrule\n{''.join(map(line, rows))}\\bottomrule\n"
        "\\end{tabular}\n"
    )


def write_csv(path: Path, heading: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file; file names that are no valid Unicode are written as their bytes."""
    with (
        atomic_write(path) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file).writerows([heading, *rows])
