"""Pictures of results show the numbers of the tables on their pages."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.__main__ import main
from benchmarks.micro import figures

pytestmark = pytest.mark.every

PAGE = """
| solver | right | time |
|---|---:|---:|
| **`ours`** | **54 of 54** | 8.73 s |
| … other | 1,014 | 5 ms |
| two numbers | 1.2, 0.4 | 3 s |
| … other | 7 | 2e-3 |

| thing | size |
|---|---|
| a | 1 |
"""


def test_rows_are_read_from_the_table_of_that_heading():
    assert list(figures.tables(PAGE)) == ["solver", "thing"]
    bars = figures.Bars("solver", 1), figures.Bars("solver", 2)
    found = figures.values(PAGE, bars)
    assert list(found.values()) == [[54.0, 8.73], [1014.0, 5.0], [7.0, 0.002]]
    assert [name.strip("\u200b") for name in found] == ["ours", "… other", "… other"]


def drawn(monkeypatch, tmp_path, panel):
    """Draw one panel, and return its bars and what is written in it."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *a, **k: (kept.append(self), save(self, *a, **k)),
    )
    figures.draw(PAGE, [panel], tmp_path / "x.png")
    axes = kept[0].axes[0]
    return (
        [(bar.get_x(), bar.get_width()) for bar in axes.patches],
        [text.get_text() for text in axes.texts],
    )


def test_bars_are_as_long_as_the_numbers_and_those_beyond_the_limit_say_so(
    monkeypatch, tmp_path
):
    panel = figures.Panel("T", "u", (figures.Bars("solver", 1),), limit=60)
    bars, texts = drawn(monkeypatch, tmp_path, panel)
    assert bars == [(0, 54), (0, 1014), (0, 7)]
    assert texts == ["54", "1.01e+03 →", "7"]


def test_stacked_bars_begin_where_the_one_before_ends(monkeypatch, tmp_path):
    both = figures.Bars("solver", 1, "a"), figures.Bars("solver", 2, "b")
    panel = figures.Panel("T", "u", both, stacked=True)
    bars, texts = drawn(monkeypatch, tmp_path, panel)
    expected = [(0, 54), (0, 1014), (0, 7), (54, 8.73), (1014, 5), (7, 0.002)]
    np.testing.assert_allclose(bars, expected)
    assert texts == ["62.7", "1.02e+03", "7"]


def test_every_panel_has_a_table_and_the_page_shows_its_picture(tmp_path, capsys):
    assert main(["figures", "--out", str(tmp_path)]) == 0
    for name, panels in figures.PICTURES.items():
        page = (figures.RESULTS / f"{name}.md").read_text()
        assert f"]({name}.png)" in page
        assert "python -m benchmarks figures" in page
        assert (figures.RESULTS / f"{name}.png").exists()
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        for panel in panels:
            assert len(figures.values(page, panel.bars)) >= 5, panel.title
            for each in panel.bars[1:]:
                rows = [
                    [row[0] for row in figures.tables(page)[table]]
                    for table in (panel.bars[0].table, each.table)
                ]
                assert rows[0] == rows[1]


def test_the_means_of_transformers_are_means_of_their_rows():
    page = (figures.RESULTS / "transformers.md").read_text()
    for panel in figures.PICTURES["transformers"]:
        for each in panel.bars:
            for row in figures.tables(page)[each.table]:
                first = 1 if each.column < 6 else 5
                numbers = [float(cell) for cell in row[first : each.column]]
                mean = sum(numbers) / len(numbers)
                assert abs(mean - float(row[each.column])) < 0.051, row


def test_a_page_of_results_has_a_picture():
    for path in figures.RESULTS.glob("*.md"):
        names = re.findall(r"!\[[^\]]+\]\((\w+\.png)\)", path.read_text())
        assert names, path.name
        assert all((figures.RESULTS / name).exists() for name in names)
