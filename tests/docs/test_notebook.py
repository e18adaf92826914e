"""The gallery's first script as a notebook, run top to bottom in a kernel of its own."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # the script takes most of a minute
def test_the_first_notebook_runs_from_top_to_bottom(monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, which pip install 'ttcfast[docs]' brings")
    pytest.importorskip("ipykernel", reason="needs ipykernel, which pip install 'ttcfast[docs]' brings")
    import nbformat

    spec = importlib.util.spec_from_file_location("gallery_build", ROOT / "docs" / "gallery" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    made = build.notebook(build.cells((ROOT / "docs" / "gallery" / f"{build.ORDER[0]}.py").read_text()))
    book = nbformat.from_dict(made)
    nbformat.validate(book)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any(output.output_type == "stream" for output in outputs) and not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture was drawn"
