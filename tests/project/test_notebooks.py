"""Notebooks are what their scripts say, have been executed, and ask a question each."""

import json
import pathlib
import re

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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_asks_a_question_and_opens_with_two_sentences_and_its_time(script):
    kind, text = cells_of(script)[0]
    assert kind == "markdown"
    title, opening, *_ = text.split("\n\n")
    assert re.fullmatch(r"# [^\n]+\?", title), title
    assert len(re.findall(r"\.(?:\s|$)", opening)) == 2, opening
    assert re.search(r"\b(seconds|minutes?)\b", opening), opening
    every = "\n\n".join(text for kind, text in cells_of(script) if kind == "markdown")
    assert len(re.findall(r"^# ", every, re.MULTILINE)) == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_shows_a_picture(script):
    cells = json.loads(script.with_suffix(".ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_notebooks_are_numbered_from_one_without_gaps():
    numbers = sorted(int(path.stem.split("_")[0]) for path in SCRIPTS)
    assert numbers == list(range(1, len(SCRIPTS) + 1))
    assert len(SCRIPTS) > 10


def test_the_first_notebook_leads_to_all_others_in_order():
    text = min(SCRIPTS).read_text()
    others = [path.with_suffix(".ipynb").name for path in sorted(SCRIPTS)[1:]]
    assert re.findall(r"^# \| \[\d+\]\((.*)\)", text, re.MULTILINE) == others
    for path in sorted(SCRIPTS)[1:]:
        title = cells_of(path)[0][1].split("\n")[0].removeprefix("# ")
        assert f"| {title} |" in text
