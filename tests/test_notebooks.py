"""Notebooks run as they stand, in an empty folder, and carry the outputs of a run like it."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
import warm
from launching import PYTHON
from nbclient import NotebookClient

BOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LONG = ("first_dpo", "losses_seen", "self_rewarding")
MINUTES = 20  # a guard against what hangs, not a measure


def test_the_five_are_there() -> None:
    names = {path.stem for path in BOOKS}
    assert names == {"first_dpo", "losses_seen", "your_data", "self_rewarding", "laptop_to_slurm"}


KERNEL = """
import matplotlib
from ipykernel import kernelapp
matplotlib.use("module://matplotlib_inline.backend_inline")
kernelapp.launch_new_instance()
"""


@pytest.fixture
def kernel(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a kernel whose process has NeMo imported, as those have that it starts as ranks."""
    folder = tmp_path_factory.mktemp("jupyter")
    place = folder / "kernels/warm"
    place.mkdir(parents=True)
    command = [*PYTHON, "-c", KERNEL, "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "warm", "env": {"PYTHON_EXEC": f"{warm.programs()}/python"}}
    (place / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(folder))
    return place.name


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in BOOKS]
)
def test_a_notebook_runs_and_has_its_outputs(path: Path, tmp_path: Path, kernel: str) -> None:
    book: Any = nbformat.read(path, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    stored = [output for cell in cells for output in cell.outputs]
    assert "error" not in {output.output_type for output in stored}, "stored by a run that failed"
    drawn = any("image/png" in output.get("data", {}) for output in stored)
    assert drawn or path.stem in ("your_data", "laptop_to_slurm")
    before = [len(cell.outputs) > 0 for cell in cells]
    where: Any = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, kernel_name=kernel, timeout=60 * MINUTES, resources=where).execute()
    assert [len(cell.outputs) > 0 for cell in cells] == before
