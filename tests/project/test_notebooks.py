"""Notebooks are what their scripts say, and have been executed."""

import json
import pathlib

import pytest

pytestmark = pytest.mark.every

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
SCRIPTS = [path for path in FOLDER.glob("*.py") if path.name != "build.py"]


def cells_of(script):
    """Read the cells of a percent script: kind and text."""
    cells = []
    for line in script.read_text().splitlines():
        if line.startswith("# %%"):
            cells.append(("markdown" if "[markdown]" in line else "code", []))
        elif cells:
            kind, lines = cells[-1]
            lines.append(
                line.removeprefix("#").removeprefix(" ") if kind != "code" else line
            )
    return [(kind, "\n".join(lines).strip()) for kind, lines in cells]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script_executed(script):
    cells = json.loads(script.with_suffix(".ipynb").read_text())["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in cells]
    assert texts == cells_of(script)  # Else `make notebooks` is due.
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert outputs
    assert not any(output["output_type"] == "error" for output in outputs)


def test_there_are_notebooks():
    assert SCRIPTS
