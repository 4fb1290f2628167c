"""Rows of a list of images: CSV or text."""

import csv
import io
from pathlib import Path

from bcnn.utils.errors import UserError

COLUMNS = ("path", "label", "split")


def read_rows(file: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the columns of a list, and (line number, cell by column) of each row.

    Tabs, commas, semicolons or blanks separate the columns: the first of these that divides the
    first line, which may name the columns, among them `path` (or `file_name`) and `label`; without
    names they are path, label and, if there are three, split.

    Raises:
        UserError: the file is empty, is not UTF-8, or a row has another number of cells than the first.
    """
    rows, line = [], 1
    try:
        text = file.read_bytes().decode("utf-8-sig")  # of spreadsheets, which begin with a mark
        delimiter = next((mark for mark in "\t,;" if len(_first_row(text, mark)) > 1), " ")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        for cells in reader:
            if any(cells := [cell.strip() for cell in cells]):
                rows.append((line, cells))
            line = reader.line_num + 1
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{file}, line {line}: {error}: expected UTF-8 text, quotes in pairs"
        ) from error
    if not rows:
        raise UserError(f"{file} is empty: expected lines of path,label or path,label,split")
    names = ["path" if cell.lower() == "file_name" else cell.lower() for cell in rows[0][1]]
    if {"path", "label"} <= set(names):
        rows = rows[1:]
    else:
        names = [*COLUMNS[: len(rows[0][1])]]
    for line, cells in rows:
        if len(cells) != len(names):
            raise UserError(
                f"{file}, line {line}: {len(cells)} columns where {len(names)} are expected "
                f"({','.join(names)}); put a path with blanks or commas in double quotes"
            )
    return names, [(line, dict(zip(names, cells, strict=True))) for line, cells in rows]


def _first_row(text: str, delimiter: str) -> list[str]:
    return next(filter(any, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)), [])
