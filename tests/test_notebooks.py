"""The notebooks hold their outputs, and run from the first cell to the last."""

import tempfile
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = {"explore": 4, "quickstart": 3}


def figures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("top-1" in str(output.get("text", "")) for output in outputs)
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored_for_readers(path: Path) -> None:
    assert figures(nbformat.read(path, as_version=4)) == FIGURES[path.stem]
    assert path.stat().st_size < 400_000
    assert str(Path.home()) not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    with tempfile.TemporaryDirectory() as folder:  # for sockets, whose paths must be short
        monkeypatch.setenv("TMPDIR", folder)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()
    assert figures(notebook) == FIGURES[path.stem]
