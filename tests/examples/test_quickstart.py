"""The notebook is a notebook, is kept without outputs, and runs from top to bottom."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.examples.run_example import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_kept_without_outputs() -> None:
    found = notebook()
    nbformat.validate(found)
    cells = [cell for cell in found.cells if cell.cell_type == "code"]
    assert len(cells) > 4
    for cell in cells:
        ast.parse(cell.source)
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = notebook()
    NotebookClient(found, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    lists, metrics = found.cells[6].outputs[0].data["text/plain"], found.cells[9].outputs[0].data["text/plain"]
    assert "Jazz track" in lists
    assert "sbr" in metrics
    assert (tmp_path / "music" / "model" / "bundle.json").is_file()
