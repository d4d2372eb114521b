"""A figure that is drawn while a run goes on: how often, where, and what is in it."""

import numpy as np
import pytest

from hfjax.inspection import _figures, diagnostics, live


def row(update, **more):
    found = {"update": update, "value": 2.0**-update, "damping": 0.5, "step": 0.1}
    return found | {"params": {"w": np.zeros(3)}, "rejection": "none"} | more


def test_a_file_is_drawn_at_most_once_a_second_and_at_the_end(tmp_path, monkeypatch):
    now, drawn = 100.0, []

    def plot(rows):
        nonlocal now
        now += 0.02
        drawn.append([row["update"] for row in rows])
        return _figures.plot_live(rows)

    monkeypatch.setattr(live, "plot_live", plot)
    monkeypatch.setattr(live.time, "perf_counter", lambda: now)
    path = tmp_path / "run.png"
    callback = diagnostics.live_plot(path)
    for update in range(1, 8):
        assert callback(row(update)) is None
        now += 0.4
    assert drawn == [[1], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]
    path.unlink()
    callback.close()
    assert not path.exists()  # The last update has been drawn.
    callback(row(8))
    callback.close()
    assert drawn[-1] == [*range(1, 9)]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_drawing_takes_at_most_a_tenth_of_the_time(tmp_path, monkeypatch):
    now, drawn = 0.0, 0

    def plot(rows):
        nonlocal now, drawn
        now, drawn = now + 0.5, drawn + 1
        return _figures.plot_live(rows[:1])

    monkeypatch.setattr(live, "plot_live", plot)
    monkeypatch.setattr(live.time, "perf_counter", lambda: now)
    callback = diagnostics.live_plot(tmp_path / "run.png")
    for update in range(1, 601):
        callback(row(update))
        now += 0.1
    assert 0.05 * now < 0.5 * drawn <= 0.1 * now


def test_a_notebook_shows_one_figure_and_replaces_it(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []

    class Handle:
        def update(self, image):
            shown.append(("update", image.data))

    def show(image, *, display_id):
        shown.append(("display", image.data))
        return Handle()

    callback = diagnostics.live_plot(seconds=0)
    monkeypatch.setattr(live, "_SHARE", 1e9)
    callback(row(1))
    assert not shown  # Outside of a notebook.
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setattr(display, "display", show)
    for update in (2, 3):
        callback(row(update))
    assert [kind for kind, _ in shown] == ["display", "update"]
    assert all(data.startswith(b"\x89PNG") for _, data in shown)


def test_another_run_has_a_figure_of_its_own_in_a_folder_that_is_made(
    tmp_path, monkeypatch
):
    drawn = []

    def plot(rows):
        drawn.append([row["update"] for row in rows])
        return _figures.plot_live(rows)

    monkeypatch.setattr(live, "plot_live", plot)
    callback = diagnostics.live_plot(tmp_path / "new" / "run.png", seconds=0)
    monkeypatch.setattr(live, "_SHARE", 1e9)
    for update in (1, 2, 1):
        callback(row(update))
    assert drawn == [[1], [1, 2], [1]]
    assert (tmp_path / "new" / "run.png").exists()


def test_the_figure_has_what_the_rows_have():
    nan = float("nan")
    rows = [row(1, damping=nan, validation=1.0), row(2, damping=nan, validation=2.0)]
    figure = _figures.plot_live([*map(diagnostics.numbers, rows)])
    values, steps = figure.axes
    assert [line.get_label() for line in values.lines] == ["training", "validation"]
    np.testing.assert_array_equal(values.lines[1].get_ydata(), [1.0, 2.0])
    assert values.get_yscale() == "log"
    assert steps.get_ylabel() == "step"
    figure = _figures.plot_live([diagnostics.numbers(row(1, value=-3.0))])
    assert figure.axes[0].get_yscale() == "linear"
    assert len(figure.axes) == 3
    figure = _figures.plot_live([diagnostics.numbers(row(1, validation=-1.0))])
    assert figure.axes[0].get_yscale() == "linear"  # Both lines can be seen.
