"""The notebooks run from the first cell to the last, in one process of their own; they are kept without outputs."""

import os
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
BOOKS = sorted(NOTEBOOKS.glob("*.ipynb"))
ROOT = str(NOTEBOOKS.parent)


def test_they_are_kept_without_outputs() -> None:
    import nbformat

    assert len(BOOKS) == 4
    for path in BOOKS:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the notebook's own machinery
def test_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel for all: the libraries are imported once. A cell that raises, an assertion too, fails here."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]))
    whole = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    )
    for path in BOOKS:
        whole.cells += [nbformat.v4.new_code_cell("%reset -f"), *nbformat.read(path, as_version=4).cells]
    NotebookClient(whole, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
