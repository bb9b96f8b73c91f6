"""The notebook: its stored outputs are complete, and it runs from top to bottom on small data."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from kd_testing.paths import REPO

NOTEBOOK = REPO / "NLP" / "scripts" / "kdistill.ipynb"
SMALL = """
DATASET, TEACHER, STUDENT_LAYERS = "{dataset}", "tiny-bert", 2
EPOCHS, TEACHER_EPOCHS = 2, 3
ALPHA, TEMPERATURE, HIDDEN_WEIGHT = 0.1, 4.0, 5.0
OUTPUT = "{output}"
SEED = 0
"""


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def count_images(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_the_stored_notebook_has_its_plots_and_no_errors():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # executed once, from top to bottom
    assert count_images(notebook) == 3
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert str(Path.home()) + "/" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(small, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = SMALL.format(dataset=small, output=tmp_path / "run")
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    NotebookClient(notebook, timeout=600, kernel_name="python3", env=environment).execute(cwd=str(tmp_path))
    assert count_images(notebook) == 3
    assert (tmp_path / "run" / "results.json").exists() and (tmp_path / "run" / "onnx" / "model_int8.onnx").exists()
    predictions = [output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout"]
    assert "".join(predictions).count("\n") == 3
