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
    client.execute()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # sockets live in it: their paths must be short
        monkeypatch.setenv("TMPDIR", folder)
        notebook = executed(path)
    text = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("top-1" in str(output.get("text", "")) for output in text)
    pictures = [output for output in text if "image/png" in output.get("data", {})]
    assert len(pictures) == PICTURES[path.stem]
