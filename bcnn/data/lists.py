"""Lists of images: CSV and text as people and spreadsheets write them, and Parquet."""

import csv
import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from bcnn.data.urls import beside, member, open_file
from bcnn.utils.errors import UserError

COLUMNS = ("path", "label", "split")  # of a list without a heading
SUFFIXES = (".csv", ".parquet", ".tsv", ".txt")  # of files that are lists, where images may be named

Rows = Iterator[tuple[int, dict[str, str]]]  # line number, cell by column


def paths_of_list(file: str) -> Iterator[str]:
    """Yield the column path of a list; paths may begin at the list, and both may be URLs."""
    for _, row in read_rows(file)[1]:
        yield beside(file, row["path"])


def read_rows(file: str | Path) -> tuple[list[str], Rows]:
    """Return the columns of a list, and its rows; those of a Parquet file are read as they are needed.

    The first line may name the columns, among them `path` (or `file_name`); without names they are
    path, label and, if there are three, split. See `read_cells`.
    """
    parquet = member(str(file)).lower().endswith(".parquet")
    expected = "lines of path,label or path,label,split"
    rows = _parquet_cells(file) if parquet else iter(read_cells(file, expected))
    line, first = next(rows)
    names = ["path" if cell.lower() == "file_name" else cell.lower() for cell in first]
    if "path" in names:
        if twice := [name for name in (*COLUMNS, "group") if names.count(name) > 1]:
            raise UserError(
                f"{file}: two columns are read as {twice[0]} ({', '.join(first)}); rename one"
            )
    elif parquet:
        raise UserError(f"{file} has no column path, but {', '.join(first)}: rename one")
    else:
        names, rows = [*COLUMNS[: len(first)]], chain([(line, first)], rows)
    return names, _by_column(file, names, rows)


def _by_column(file: str | Path, names: list[str], rows: Iterator[tuple[int, list[str]]]) -> Rows:
    for line, cells in rows:
        if len(cells) != len(names):
            raise UserError(
                f"{file}, line {line}: {len(cells)} columns where {len(names)} are expected "
                f"({','.join(names)}); put a path with blanks or commas in double quotes"
            )
        yield line, dict(zip(names, cells, strict=True))


def _parquet_cells(file: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the names of the columns as row 0, and then (row number, cells); no value is ""."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(file) as content, pq.ParquetFile(content) as table:
            yield 0, table.schema_arrow.names
            rows = (zip(*batch.to_pydict().values(), strict=True) for batch in table.iter_batches())
            for line, cells in enumerate(chain.from_iterable(rows), 1):
                yield line, ["" if cell is None else str(cell) for cell in cells]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no readable Parquet file: {error}") from error


def read_cells(file: str | Path, expected: str) -> list[tuple[int, list[str]]]:
    """Return (line number, cells) of each row of a CSV or text file, of at least one.

    Tabs, commas, semicolons or blanks separate the columns: the first of these that divides the
    first line.
    """
    rows, line = [], 1
    try:
        with open_file(file) as content:
            text = content.read().decode("utf-8-sig")  # of spreadsheets, which begin with a mark
        delimiter = next((mark for mark in "\t,;" if len(_first_row(text, mark)) > 1), " ")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        for cells in reader:
            if any(cells := [cell.strip() for cell in cells]):
                rows.append((line, cells))
            line = reader.line_num + 1
    except (UnicodeDecodeError, csv.Error) as error:
        sentence = f"{file}, line {line}: {error}: expected UTF-8 text, quotes in pairs"
        raise UserError(sentence) from error
    if not rows:
        raise UserError(f"{file} is empty: expected {expected}")
    return rows


def _first_row(text: str, delimiter: str) -> list[str]:
    return next(filter(any, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)), [])
