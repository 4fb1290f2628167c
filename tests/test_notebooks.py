"""Every notebook runs from its first cell to its last."""

import tempfile
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {"explore": 4, "quickstart": 3}


def executed(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client.execute()
    return notebook


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("top-1" in str(output.get("text", "")) for output in outputs)
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_came_out_is_stored_for_readers(path: Path) -> None:
    assert pictures(nbformat.read(path, as_version=4)) == PICTURES[path.stem]
    assert path.stat().st_size < 400_000
    assert str(Path.home()) not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # sockets live in it: their paths must be short
        monkeypatch.setenv("TMPDIR", folder)
        notebook = executed(path)
    assert pictures(notebook) == PICTURES[path.stem]
