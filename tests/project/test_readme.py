"""The README's code runs as it stands, and says what is true."""

import contextlib
import io
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_is_short_and_its_pictures_are_there():
    assert len(README.splitlines()) <= 120
    pictures = re.findall(r"!\[[^]]+\]\((\S+\.png)\)", README)
    assert len(pictures) == 2
    assert all((ROOT / picture).stat().st_size > 5000 for picture in pictures)


def test_examples_reach_what_the_text_promises_in_twenty_lines():
    pytest.importorskip("flax.nnx")
    residuals, model, loop = BLOCKS
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 20
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(residuals, names)
    truth = {"height": 200, "lifetime": 1.5, "floor": 20}
    for line in printed.getvalue().splitlines():
        name, value, error = re.fullmatch(r"(\w+) = (\S+) ± (\S+)", line).groups()
        assert abs(float(value) - truth.pop(name)) < float(error)
    assert not truth
    with contextlib.redirect_stdout(io.StringIO()):
        exec(model, names)
    assert names["run"].value < 1e-5
    # The model has the parameters that were found.
    found = names["objective"].value(nnx_params(names["model"]), names["batch"])
    assert float(found) == pytest.approx(float(names["run"].value), rel=1e-6)
    exec(loop, names)
    params, state = names["run"].params, names["tx"].init(names["run"].params)
    _, state = names["train_step"](params, state, names["batch"])
    assert state.info.accepted


def nnx_params(model):
    from flax import nnx

    return nnx.state(model, nnx.Param)


def test_versions_named_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Python 3.11 or newer, jax 0.10.1 or newer" in README
    assert project["requires-python"] == ">=3.11"
    assert "jax>=0.10.1" in project["dependencies"]


def test_every_make_target_named_exists():
    targets = set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    named = set(re.findall(r"`make ([\w-]+)`", README))
    assert {"demo", "demo-pde", "test"} <= named <= targets


def test_every_test_that_the_table_of_faults_names_exists():
    page = (ROOT / "docs" / "faults.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 30
    assert named <= set(re.findall(r"def (test_\w+)\(", written))


def test_every_fault_that_is_tested_is_in_the_table():
    page = (ROOT / "docs" / "faults.md").read_text()
    folder = ROOT / "tests" / "faults"
    for name in ("test_numbers.py", "test_arguments.py"):
        tests = re.findall(r"def (test_\w+)\(", (folder / name).read_text())
        assert not [test for test in tests if f"`{test}`" not in page]
