"""Tables of text: what is written can be read back, and nothing in a name is markup."""

from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bcnn.evaluation.tables import console_table, latex, markdown, write_tables
from bcnn.evaluation.writers import FORMATS, Prediction, write_rows
from bcnn.models.bilinear_cnn import BCNN

HEADING = ["run", "top-1, %", "last.optimizer.weight_decay"]
ROWS = [
    ["a_b & co 50% #1 {x}", "90.0 ± 2.8", "1e-5"],
    ["<b>~|^$\\\x1b\n\udcff`*", "−1.5 (1–2)", "[0,1]"],
]


def test_markdown_keeps_every_cell_in_its_column() -> None:
    lines = markdown(HEADING, ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS) and lines[1] == "|---|--:|--:|"
    assert all(line.replace(r"\|", "").count("|") == 4 for line in lines)
    assert lines[2] == r"| a\_b \& co 50% #1 {x} | 90.0 ± 2.8 | 1e-5 |"
    assert r"\<b\>\~\|^\$\\\\x1b\\n\\xff\`\*" in lines[3]


def test_latex_escapes_what_it_would_act_on() -> None:
    text = latex(HEADING, ROWS)
    assert r"a\_b \& co 50\% \#1 \{x\} & 90.0 $\pm$ 2.8 & 1e-5 \\" in text
    assert r"$-$1.5 (1--2) & {[}0,1] \\" in text


def test_both_files_are_written(tmp_path: Path) -> None:
    write_tables(tmp_path / "new" / "table", HEADING, ROWS)
    assert (tmp_path / "new" / "table.md").read_text() == markdown(HEADING, ROWS)
    assert (tmp_path / "new" / "table.tex").read_text() == latex(HEADING, ROWS)


@pytest.mark.parametrize("name", ["a/very/long/path/of/a/run/in/a/folder", "outputs/14-03-52"])
def test_the_console_folds_names_and_no_figures(name: str) -> None:
    table = console_table(HEADING, [[name, "90.0 ± 2.8", "1e-5"]])
    assert [column.no_wrap for column in table.columns] == [False, True, True]
    assert table.columns[2].header == "last.\noptimizer.\nweight_decay"


def test_parquet_escapes_the_bytes_of_names_that_are_no_unicode(tiny: BCNN, tmp_path: Path) -> None:
    found = [Prediction("x\udcff.png", [("b\udcff", 0.9)], set=["b\udcff"])]
    [*write_rows(tmp_path / "rows.parquet", [], found, partial(FORMATS["parquet"], model=tiny, top=1))]
    (row,) = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert (row["image"], *row["prediction_set"]) == (r"x\udcff.png", r"b\udcff")
