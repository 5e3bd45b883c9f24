"""The notebooks run from top to bottom, in the order in which they build on each other."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT

NOTEBOOKS = ("scans-to-embeddings", "run-to-atoms")


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "docs/notebooks" / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(name: str) -> None:
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow(80)
@pytest.mark.timeout(900)
def test_the_notebooks_run_in_order(tmp_path: Path) -> None:
    for name in NOTEBOOKS:
        NotebookClient(read(name), timeout=600,
                       resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "atoms/report.html").stat().st_size > 10_000
