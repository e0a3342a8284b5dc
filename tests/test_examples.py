"""The examples run as printed, and the notebook is the one that its source makes."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("0*.py"))
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


def test_there_are_five_scripts_and_a_notebook():
    assert [path.name[:3] for path in SCRIPTS] == ["01_", "02_", "03_", "04_", "05_"]
    assert NOTEBOOKS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(script), "--quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_matches_its_source(notebook, tmp_path, monkeypatch):
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(notebook, as_version=4)
    source = jupytext.read(notebook.with_suffix(".py"))
    assert [cell.source for cell in book.cells] == [cell.source for cell in source.cells]
    monkeypatch.setenv("QUICKSTART_STEPS", "24")
    client = NotebookClient(book, timeout=400, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [out for cell in book.cells if cell.cell_type == "code" for out in cell.outputs]
    text = "".join(out.get("text", "") + str(out.get("data", "")) for out in outputs)
    assert "Measured on" in text
    assert "def __init__(self" in text
