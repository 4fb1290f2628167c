"""Names as cells of a CSV file, which spreadsheets must not take for formulas."""

# alias: removed at the merge (bcnn.evaluation.writers and bcnn.data.index take their own)

import re

FORMULA = re.compile(r"'*[=+\-@\t\r\n]")  # how a cell begins that a spreadsheet computes


def harmless(name: str) -> str:
    """The name with an apostrophe before it, where a spreadsheet would compute it: see `name_of`."""
    return f"'{name}" if FORMULA.match(name) else name


def name_of(cell: str) -> str:
    """Undo `harmless`."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
