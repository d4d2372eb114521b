"""The comparison: who takes turns when, what it reads off the runs, how it goes on."""

import functools
import importlib.util
import json
import math
import time
import webbrowser
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
from benchmarks.__main__ import main
from benchmarks.compare import SUITES
from benchmarks.harness import figure, machine, race, table
from benchmarks.harness.checkpoint import Checkpoints
from benchmarks.harness.history import Plan, Row, Run, RunFile, read
from benchmarks.harness.machine import Taken
from benchmarks.harness.race import Carry, Course, Racer
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.suites import images, sequences
from benchmarks.suites.curves import curves
from benchmarks.suites.problem import Kind, Summary, alone, everything, guarded

PROBLEMS = images.SUITE.problems
SUMMARY = Summary("Title", "f − floor", {"10": 10.0, "1": 1.0}, note="Floor: 50.")


@functools.cache
def tiny_problem(data_dir=""):
    del data_dir
    return images.reconstruction("Curves", curves(40), (784, 20, 4), 2)


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    """Float32 and JAX's own defaults; a problem that takes no time."""
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is the cost.
    tiny = Kind("tiny autoencoder", tiny_problem)
    monkeypatch.setitem(PROBLEMS, "tiny", tiny)
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def compare(folder, *words, optimizers="lbfgs", seconds="0.1"):
    options = ("--problem", "tiny", "--optimizers", optimizers, "--seconds", seconds)
    command = ("compare", "--suite", "images", *options, "--out", str(folder))
    return main([*command, *words])


def ended(optimizer, rate, seed, *rows, compiled=1.0):
    """Make up a run: `rows` are (seconds, excess, probe)."""
    plan = Plan("p", seed, optimizer, rate)
    its = [Row(s, n, 0, 50 + x, x, p) for n, (s, x, p) in enumerate(rows)]
    run = Run(its, startup_seconds=0.5, compile_seconds=compiled)
    return RunFile(plan, {}, True, run)


MADE_UP = [
    ended("a", 0.1, 0, (0, 90, 2.0), (3, 9, 2.0), (5, 4, 2.0)),
    ended("a", 0.2, 0, (0, 90, 3.0), (4, 9.9, 3.0), (6, 0.5, 3.0), (7, 2, 0.5)),
    ended("a", 0.1, 1, (0, 80, 2.0), (2, 9, 2.0), (5, 6, 2.0), compiled=3.0),
    ended("a", 0.2, 1, (0, 80, 2.0), (1, 10, 2.0), (5, 3, 2.0), compiled=3.0),
    ended("b", None, 0, (0, 90, 4.0), (9, 0.99, 4.0), (9.5, math.nan, 4.0)),
    ended("b", None, 1, (0, 80, 6.0), (8, 20, 4.0)),
]


def test_milestones_are_read_off_where_the_excess_is_first_below():
    a, b = table.lines(MADE_UP, SUMMARY)
    assert a.name == "a 0.2"  # 2 and 3 at the end, where 0.1 has 4 and 6.
    assert a.lost == {"a 0.1": 5}
    assert a.reached == {"10": [4, 5], "1": [6, math.inf]}
    assert b.reached == {"10": [9, math.inf], "1": [9, math.inf]}
    assert b.judged == [math.inf, 20]
    # From the start of Python: half a second to begin, and compiling.
    assert a.from_python("10") == [4 + 1.5, 5 + 3.5]
    # All its rates: 5 + 7 seconds with the one seed, 5 + 5 with the other.
    assert a.searched == 11
    # Turns are told apart by their probes: two of them, 3 and 0.5; then one, 2. Half a
    # second is the best of all.
    assert a.probe == 1.875 / 0.5
    assert b.probe == 4.5 / 0.5
    assert table.seconds_to(MADE_UP[0].run, 9.5) == 3
    assert table.seconds_to(MADE_UP[0].run, 0.1) == math.inf


def test_the_table_says_median_range_and_what_was_not_reached():
    found = table.lines(MADE_UP, SUMMARY)
    head, a, b = cells = table.cells(found, SUMMARY)
    # By the median over seeds, nobody reached 1.
    assert head[:5] == ["optimizer", "10", "1", "from Python to 10", "final f − floor"]
    assert a[:5] == ["a 0.2", "4 (4–5)", "6 (6––)", "5.5 (5.5–8.5)", "2 (2–3)"]
    assert b[-1] == "9.00 !"
    assert a[-3:-1] == ["2.0 s", "11 s"]
    text = table.markdown("Title", cells, table.caption(found, SUMMARY))
    assert "| a 0.2 | 4 (4–5) | 6 (6––) |" in text
    assert text.rstrip().endswith(
        "Floor: 50. Learning rates that lost, and their f − floor: a 0.1: 5."
    )


def test_seconds_from_the_start_of_python_are_those_of_the_process(monkeypatch):
    since = machine.since_python_started()
    assert since.processor == pytest.approx(time.process_time(), abs=1)
    # The import of the benchmarks is what the clock falls back on.
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 1e-9)
    imported = time.perf_counter() - benchmarks.IMPORTED
    assert machine.since_python_started().wall == pytest.approx(imported, abs=1)


def walker(pace, clock, stop_at=None):
    """Return what builds a racer whose step takes `pace` seconds of a false clock."""

    def step(carry):
        if stop_at is not None and int(carry.updates) == stop_at:
            raise Stopped
        clock.now += pace
        return Carry(carry.params * 0.5, None, carry.updates + 1)

    def init(params):
        return Carry(params, None, jnp.int32(0))

    return lambda: Racer(init, step, Taken(0.5, 0.25))


class Stopped(BaseException):
    """What a kill is to a process."""


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def course(folder):
    return Course(
        params=jnp.ones(()),
        measure=lambda params, updates: (float(params) + 1, float(params)),
        pause=0.0,
        seconds=6.0,
        turn=2.0,
        clock="wall",
        startup=Taken(2.0, 1.0),
        goal=-math.inf,
        settings={"seconds": 6.0},
        recorded={"seconds": 6.0},
        folder=folder,
    )


@pytest.fixture
def still(monkeypatch):
    """A machine that nothing disturbs, and a checkpoint after every turn."""
    monkeypatch.setattr(machine, "probe", lambda: 0.25)
    monkeypatch.setattr(machine, "CLOCKS", dict(machine.CLOCKS))
    monkeypatch.setattr(Checkpoints, "_is_time", lambda self: True)


def walk(folder, stop_at=None, **changes):
    """Let two racers go, one of them three times as slow; return their turns."""
    clock, turns = Clock(), []
    machine.CLOCKS["wall"] = clock
    plans = [Plan("p", 0, name, None) for name in ("quick", "slow")]
    builders = [(plans[0], walker(1.0, clock, stop_at)), (plans[1], walker(3.0, clock))]

    def watch(entrant):
        turns.append((entrant.plan.optimizer, entrant.run.seconds))

    race.go(builders, course(folder)._replace(**changes), watch)
    return turns, [read(plan.file(folder)) for plan in plans]


def test_runs_take_turns_until_each_has_had_its_seconds(still, tmp_path):
    turns, (quick, slow) = walk(tmp_path)
    # As far as 2, 4 and 6 seconds; who has gone beyond waits.
    order = [("quick", 2), ("slow", 3), ("quick", 4), ("slow", 6), ("quick", 6)]
    assert turns == order
    assert [row.value for row in quick.run.rows] == [2.0**-n for n in range(7)]
    assert [row.seconds for row in slow.run.rows] == [0, 3, 6]
    assert {row.probe for row in quick.run.rows[1:]} == {0.25}
    assert quick.finished
    assert slow.finished
    assert quick.run.before_training == 2.0 + 0.5
    assert not list((tmp_path / "checkpoints").iterdir())


def test_runs_that_were_killed_end_with_the_same_rows(still, tmp_path):
    _, whole = walk(tmp_path / "whole")
    with pytest.raises(Stopped):
        walk(tmp_path / "killed", stop_at=3)
    turns, resumed = walk(tmp_path / "killed")
    # From the ends of their turns on, at 2 and at 3 seconds.
    assert turns == [("quick", 4), ("slow", 6), ("quick", 6)]
    assert [one.run.rows for one in resumed] == [one.run.rows for one in whole]


def test_a_run_ends_at_its_goal(still, tmp_path):
    turns, (quick, slow) = walk(tmp_path, goal=0.3)
    assert [one.run.last.value for one in (quick, slow)] == [0.25, 0.25]
    assert turns == [("quick", 2), ("slow", 3), ("slow", 6)]
    assert quick.finished
    assert slow.finished


def test_a_run_that_diverges_ends(still, tmp_path):
    turns, ends = walk(tmp_path, measure=lambda *_: (math.nan, math.nan))
    assert [seconds for _, seconds in turns] == [0.0, 0.0]
    assert all(one.finished for one in ends)


def test_a_comparison_leaves_numbers_tables_and_pictures(tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(webbrowser, "open", shown.append)
    words = ("--seeds", "0,1", "--show")
    assert compare(tmp_path, *words, optimizers="adam,lbfgs") == 0
    picture = tmp_path / "tiny-from-start.png"
    assert shown == [picture.resolve().as_uri()]
    document = json.loads((tmp_path / "compare.json").read_text())
    (problem,) = document["problems"]
    assert problem["name"] == "tiny"
    x = curves(40).astype(np.float64)
    x = x[(x > 0) & (x < 1)]
    entropy = -(x * np.log(x) + (1 - x) * np.log1p(-x)).sum() / 40
    assert problem["floor"] == pytest.approx(entropy, rel=1e-5)
    first = {}
    for run in problem["runs"]:
        assert run["finished"]
        assert run["rows"][-1]["seconds"] >= 0.1
        assert run["rows"][-1]["updates"] > 0
        for row in run["rows"]:
            assert row["value"] == row["loss"] - problem["floor"]
        first.setdefault(run["seed"], set()).add(run["rows"][0]["loss"])
    assert len(problem["runs"]) == 2 * 4  # Three rates of Adam, and L-BFGS.
    # One start for all with a seed, and others with another.
    assert [len(losses) for losses in first.values()] == [1, 1]
    assert first[0] != first[1]
    assert [line["optimizer"] for line in problem["lines"]] == ["adam", "lbfgs"]
    assert document["settings"]["seconds"] == 0.1
    assert document["settings"]["suite"] == "images"
    for line in problem["lines"]:
        before = line["compile_seconds"][0] + line["startup_seconds"][0]
        assert before > 0
        for name, (seconds, _) in line["reached"].items():
            if seconds is not None:
                whole = line["from_python"][name][0]
                assert whole == pytest.approx(seconds + before)
    assert (tmp_path / "tiny.png").stat().st_size > 5000
    assert picture.stat().st_size > 5000
    printed, written = capsys.readouterr().out, (tmp_path / "compare.md").read_text()
    assert f"The picture: {picture.resolve()}" in printed
    assert "tiny 1 adam 0.0001" in printed
    for text in (printed, written):
        assert "lbfgs" in text
        assert "2 seeds: median" in text


@pytest.mark.parametrize(
    "rows",
    [[(0.0, 0, 1.0), (1.0, 5, 0.0)], [(0.0, 0, math.nan)]],
    ids=["nothing_left", "diverged_at_its_start"],
)
def test_a_run_without_any_positive_value_has_a_picture(tmp_path, rows):
    fields = "seconds", "updates", "value"
    rows = [SimpleNamespace(**dict(zip(fields, row, strict=True))) for row in rows]
    run = SimpleNamespace(run=SimpleNamespace(rows=rows))
    summary = SimpleNamespace(
        milestones={"a": 0.1, "b": 0.01}, value="wrong", title="tiny"
    )
    run.run.before_training = 3.0
    lines = [SimpleNamespace(name="adam", optimizer="adam", runs=[run])]
    figure.draw(summary, lines, tmp_path / "tiny.png")
    figure.draw_from_start(summary, lines, "wall", tmp_path / "start.png")
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size > 5000


def test_what_is_finished_is_not_run_again_and_other_settings_are_refused(
    tmp_path, monkeypatch, capsys
):
    def refused(*_):
        raise AssertionError

    assert compare(tmp_path) == 0
    before = json.loads((tmp_path / "compare.json").read_text())["problems"]
    lbfgs = OPTIMIZERS["lbfgs"]._replace(build=refused)
    monkeypatch.setitem(OPTIMIZERS, "lbfgs", lbfgs)
    assert compare(tmp_path) == 0
    assert json.loads((tmp_path / "compare.json").read_text())["problems"] == before
    capsys.readouterr()
    assert compare(tmp_path, seconds="0.2") == 2
    message = capsys.readouterr().err
    assert "is of a run with seconds 0.1, not 0.2: choose another --out" in message
    assert message.count("\n") == 1


def test_an_interrupt_leaves_what_there_is(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    lbfgs = OPTIMIZERS["lbfgs"]._replace(build=interrupted)
    monkeypatch.setitem(OPTIMIZERS, "lbfgs", lbfgs)
    assert compare(tmp_path, optimizers="adam,lbfgs", seconds="0.05") == 130
    (problem,) = json.loads((tmp_path / "compare.json").read_text())["problems"]
    assert [run["rate"] for run in problem["runs"]] == [1e-2, 1e-3, 1e-4]
    assert "Interrupted: the same command goes on" in capsys.readouterr().out


def absent(monkeypatch):
    kfac = OPTIMIZERS["kfac"]._replace(module="absent_module")
    monkeypatch.setitem(OPTIMIZERS, "kfac", kfac)
    return "kfac: kfac-jax is not installed: pip install 'hfjax[peers]'"


def test_an_absent_package_is_skipped_with_a_message(tmp_path, monkeypatch, capsys):
    message = absent(monkeypatch)
    assert compare(tmp_path, optimizers="lbfgs,kfac", seconds="0.05") == 0
    output = capsys.readouterr()
    assert f"Skipped {message}" in output.out.splitlines()
    assert not output.err
    document = json.loads((tmp_path / "compare.json").read_text())
    assert "kfac" in document["skipped"]
    assert main(["compare", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "kfac-jax is not installed" in listed
    names = [name for suite in SUITES.values() for name in suite.problems]
    assert all(name in listed for name in (*SUITES, *names, *OPTIMIZERS))


def test_where_nothing_is_left_it_is_an_error(tmp_path, monkeypatch, capsys):
    message = absent(monkeypatch)
    assert compare(tmp_path, optimizers="kfac") == 2
    assert f"nothing is left to run: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--problem", "spirals"), "among curves1000, curves2000, curves20000"),
        (("--suite", "spirals"), "invalid choice: 'spirals'"),
        (("--optimizers", "sgd"), "got 'sgd'"),
        (("--seeds", "0,x"), "whole number of at least 0, got 'x'"),
        (("--seconds", "0"), "above 0, got '0'"),
        (("--problem", "mnist", "--data-dir", "nowhere"), "nothing is left to run"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(words, complaint, capsys):
    try:
        status = main(["compare", "--suite", "images", *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    message = capsys.readouterr().err
    assert complaint in message
    assert message.count("\n") == 1


REST = ("equations", "classifier", "transformers", "minibatch")


def test_a_suite_must_be_named(capsys):
    assert main(["compare"]) == 2
    message = capsys.readouterr().err
    assert f"--suite must be one of images, sequences, {', '.join(REST)}" in message


# The others run in the tests of their suites.
ELSEWHERE = {
    *("cg", "spring", "uncorrected", "balanced", "float32_first"),
    *("sutskever2011", "sutskever2011-without"),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - ELSEWHERE))
@pytest.mark.filterwarnings("ignore")  # Other packages have theirs.
def test_an_optimizer_lowers_f_and_keeps_its_start(name):
    optimizer = OPTIMIZERS[name]
    if importlib.util.find_spec(optimizer.module) is None:
        pytest.skip(f"{optimizer.package} is not installed")
    problem = tiny_problem()
    if optimizer.unfit(problem):
        problem = sequences.fixed(cases=20)
    params = problem.start(jax.random.key(0))
    racer = optimizer.build(problem, params, 0)
    if optimizer.rates:
        racer = racer(optimizer.rates[-1])
    carry = racer.init(params)
    for _ in range(4):
        carry = racer.step(carry)
    value = functools.partial(problem.objective.value, batch=problem.data(0))
    assert float(value(carry.params)) < float(value(params))  # Not donated either.
    assert int(carry.updates) >= 4


def test_cases_are_handed_in_turn_and_those_that_guard_are_others():
    cases = jnp.arange(8)
    for count in range(5):
        whole, own, other = guarded(4)(cases, jnp.int32(count))
        assert whole is cases
        np.testing.assert_array_equal(own, np.arange(2) + 2 * (count % 4))
        np.testing.assert_array_equal(other, np.arange(2) + 2 * ((count + 1) % 4))
        first, second, none = alone(4)(cases, jnp.int32(count))
        np.testing.assert_array_equal(first, own)
        np.testing.assert_array_equal(second, own)
        assert none is None
        _, part, evaluation = everything(4)(cases, jnp.int32(count))
        np.testing.assert_array_equal(part, own)
        assert evaluation is cases
