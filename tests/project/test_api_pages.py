"""Each page of the reference leads with an example, which prints what it says."""

import contextlib
import io
import pathlib
import re

import jax
import pytest

import hfjax

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "api"
# `fit` shows a whole run, and has a test of its own.
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.stem != "fit")
SLOW = {
    *("flax", "initializers", "least_squares", "sample_space", "spectrum"),
    *("state", "transform", "verify"),
}


def example_of(page):
    """Return the program with which a page leads."""
    found = re.match(
        r"# .*\n\nUse this when ([^`]|`\w+`)*\.\n\n```python\n((.|\n)*?)```",
        page.read_text(),
    )
    assert found, f"{page.name} should begin with `Use this when …` and an example"
    return found[2]


@pytest.mark.every
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_leads_with_a_short_example_above_the_reference(page):
    lines = [line for line in example_of(page).splitlines() if line.strip()]
    assert 4 <= len(lines) <= 10
    assert any("print(" in line for line in lines)
    assert page.stem == "index" or "```{eval-rst}" in page.read_text()


@pytest.fixture
def quick_parts(monkeypatch):
    """Give the optimizer parts that compile quickly, where the example names none."""

    def hessian_free(objective, **options):
        if not options:
            options = {
                "damping": hfjax.damping.levenberg_marquardt(init=0.1),
                "preconditioner": None,
            }
        return build(objective, **options)

    build = hfjax.hessian_free
    monkeypatch.setattr(hfjax, "hessian_free", hessian_free)


@pytest.mark.every
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.stem in SLOW), id=page.stem)
        for page in PAGES
    ],
)
def test_an_example_prints_what_its_comments_say(page, request):
    program = example_of(page)
    if "flax" in program:
        pytest.importorskip("flax.nnx")
    if page.stem != "diagnostics":  # It shows the λ that the default starts from.
        request.getfixturevalue("quick_parts")
    printed = io.StringIO()
    # As users run it, and not as the tests do.
    with (
        jax.enable_x64(False),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        contextlib.redirect_stdout(printed),
    ):
        exec(program, {})
    found = printed.getvalue().splitlines()
    said = re.findall(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)
    assert len(said) == len(found)
    for comment, line in zip(said, found, strict=True):
        # What follows the number explains it: `2.5 = the mean of 1² and 2²`.
        assert comment.split(" = ")[0] == line
