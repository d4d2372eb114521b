"""The recurrent networks: the model, how it is trained, and what the command leaves."""

import argparse
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import rnn, rnn_network, rnn_report
from benchmarks import rnn_training as training
from benchmarks.__main__ import main
from benchmarks.checkpoint import Checkpoints
from benchmarks.history import Moment
from benchmarks.rnn_history import Ended, Plan, Row
from benchmarks.rnn_tasks import TASKS
from benchmarks.rnn_training import Sizes

TINY = ("rnn", "--length", "30", "--gradient-cases", "24", "--cases", "12")
TINY = (*TINY, "--max-iterations", "5")


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    """Benchmarks are an application: float32, and JAX's own defaults."""
    monkeypatch.setattr(training, "TEST_CASES", 200)
    monkeypatch.setattr(training, "_TEST_PART", 100)
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is the cost.
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def by_hand(params, steps):
    """Run one sequence through the network in float64: states and outputs."""
    params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    h, hidden = params["start"], []
    for x in steps:
        h = np.tanh(h @ params["recurrent"] + x @ params["input"])
        hidden.append(h)
    return np.stack(hidden), np.stack(hidden) @ params["output"]


@pytest.mark.parametrize("name", ["addition", "memorisation-5"])
def test_the_network_reads_each_sequence_to_its_own_end(name):
    task = TASKS[name]
    network = rnn_network.recurrent_network(task, units=20)
    params = network.init(jax.random.key(0))
    inputs, _ = task.generate(jax.random.key(1), 6, 30)
    beyond = jnp.arange(inputs.steps.shape[1]) >= inputs.lengths[:, None]
    noisy = inputs._replace(steps=inputs.steps + 9.0 * beyond[:, :, None])
    outputs, hidden = network.with_hidden(params, noisy)
    assert outputs.dtype == np.float32
    np.testing.assert_array_equal(network.model_fn(params, inputs), outputs)
    for case, own in enumerate(inputs.lengths):
        states, answers = by_hand(params, inputs.steps[case, :own])
        answer = answers if task.every_step else answers[-1]
        np.testing.assert_allclose(outputs[case], answer, atol=1e-5)
        np.testing.assert_allclose(hidden[case, :own], states, atol=1e-5)
        assert not hidden[case, own:].any()
    assert task.every_step or len(set(inputs.lengths.tolist())) > 1


def test_a_unit_starts_with_fifteen_weights_and_small_ones_from_the_inputs():
    network = rnn_network.recurrent_network(TASKS["permutation"])
    params = network.init(jax.random.key(0))
    for name, scale in (("recurrent", 1.0), ("output", 1.0), ("input", 0.25)):
        kernel = np.asarray(params[name])
        assert kernel.shape == (100, 100)
        assert ((kernel != 0).sum(axis=0) == 15).all()
        deviation = kernel[kernel != 0].std() * 15**0.5
        assert deviation == pytest.approx(scale, rel=0.1)
    start = np.asarray(params["start"])
    assert start.shape == (100,)
    assert start.std() * 15**0.5 == pytest.approx(1.0, rel=0.25)
    assert sum(leaf.size for leaf in params.values()) == 30_100


@pytest.mark.parametrize(
    ("name", "outputs", "steps"),
    [("temporal-order", 8, 1), ("memorisation-5", 2 * 5 * 30, 30)],
)
def test_the_start_is_sutskevers_on_the_scale_of_our_loss(name, outputs, steps):
    # His loss is a mean over target steps, ours a sum: λ and weight decay grow with it.
    problem = training.build(name, 30, seed=0)
    assert problem.objective.weight_decay == pytest.approx(2e-5 * steps)
    damping = training.initial_damping(problem)
    assert damping == pytest.approx(0.01 * outputs * steps)


@pytest.fixture(scope="module")
def addition():
    return training.build("addition", 30, seed=0)


def test_an_update_of_hf_takes_curvature_and_evaluation_from_the_gradients_data(
    addition,
):
    sizes = Sizes(gradient=24, curvature=8)
    key = jax.random.key(3)
    everything, batch, eval_batch = training.batches(addition, key, sizes)
    inputs, targets = addition.task.generate(key, 24, 30)
    for part, drawn in (
        (everything, slice(0, 24)),
        (batch, slice(0, 8)),
        (eval_batch, slice(8, 16)),
    ):
        np.testing.assert_array_equal(part[0].steps, inputs.steps[drawn])
        np.testing.assert_array_equal(part[0].lengths, inputs.lengths[drawn])
        np.testing.assert_array_equal(part[1], targets[drawn])


def test_five_bits_are_learned_from_all_strings_at_once():
    problem = training.build("memorisation-5", 30, seed=0)
    sizes = problem.sizes(Sizes(gradient=2000, curvature=500))
    assert sizes == (32, 32)
    everything, batch, eval_batch = training.batches(problem, jax.random.key(0), sizes)
    np.testing.assert_array_equal(everything[0].steps, batch[0].steps)
    assert len(np.unique(np.asarray(batch[0].steps), axis=0)) == 32
    assert eval_batch is None


def test_measuring_counts_wrong_answers_on_other_sequences_each_time(addition):
    measure = training.measurer(addition, addition.params)(7)
    row = measure(Moment(1.5, 2, 3), addition.params)
    assert row[:4] == (1.5, 2, 3, 14)
    keys = jax.random.split(jax.random.fold_in(addition.test_key, 2), 2)
    wrong, losses = [], []
    for key in keys:
        inputs, targets = addition.task.generate(key, 100, 30)
        for case, own in enumerate(inputs.lengths):
            _, answers = by_hand(addition.params, inputs.steps[case, :own])
            error = answers[-1, 0] - targets[case, 0]
            wrong.append(abs(error) > 0.04)
            losses.append(0.5 * error**2)
    assert row.wrong == pytest.approx(np.mean(wrong))
    assert row.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert measure(Moment(1.5, 3, 3), addition.params).loss != row.loss


def files_of(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_a_table_is_left_goes_on_after_an_interrupt_and_does_nothing_twice(
    tmp_path, capsys, monkeypatch
):
    first, second, adam = (
        f"addition-30-{racer}-0.json" for racer in ("hf-0.03", "hf-0", "adam-0.001")
    )
    options = ("--structural", "0.03,0", "--updates", "3", "--rates", "1e-3")
    command = [*TINY, *options, "--out", str(tmp_path)]
    show, begun = rnn.Live.show, []

    def interrupted(self, run, seconds, **options):
        show(self, run, seconds, **options)
        if run.name == "hf" and run.last.updates == 2:
            begun.extend(row._asdict() for row in run.rows)
            raise KeyboardInterrupt

    # A checkpoint after every update; the one after the last that is shown is missing.
    monkeypatch.setattr(Checkpoints, "_is_time", lambda self: True)
    with monkeypatch.context() as patch:
        patch.setattr(rnn.Live, "show", interrupted)
        assert main(command) == 130
    files = files_of(tmp_path)
    assert {name: file["finished"] for name, file in files.items()} == {
        first: True,
        second: False,
    }
    assert "goes on from here" in capsys.readouterr().out
    (before,) = files[first]["runs"]

    assert main(command) == 0
    files = files_of(tmp_path)
    assert {name: file["finished"] for name, file in files.items()} == {
        first: True,
        second: True,
        adam: True,
    }
    assert (tmp_path / "addition-30.png").stat().st_size > 5000
    with_mu, without, rival = (files[name]["runs"][0] for name in (first, second, adam))
    assert with_mu == before
    assert without["rows"][:2] == begun[:2]  # Seconds too: it went on.
    assert not (tmp_path / "checkpoints" / second.removesuffix(".json")).exists()
    for run in (with_mu, without):
        assert [row["updates"] for row in run["rows"]] == [0, 1, 2, 3]
        assert [row["sequences"] for row in run["rows"]] == [0, 24, 48, 72]
        assert len(run["updates"]) == 3
        assert 0 < run["rows"][-1]["cg_iterations"] <= 15
    # The same start, but another way; and as long as HF took.
    assert with_mu["rows"][0]["loss"] == without["rows"][0]["loss"]
    assert with_mu["rows"][1]["loss"] != without["rows"][1]["loss"]
    assert rival["rows"][0]["loss"] == with_mu["rows"][0]["loss"]
    end = rival["rows"][-1]
    assert end["seconds"] >= with_mu["rows"][-1]["seconds"]
    assert end["sequences"] == 100 * end["updates"] > 0
    printed = capsys.readouterr().out

    def must_not_run(*_):
        pytest.fail("what is finished ran again")

    monkeypatch.setattr(rnn, "race_on", must_not_run)
    assert main(command) == 0
    again = capsys.readouterr().out
    for word in ("addition", "hf μ 0.03", "adam 0.001", "0/1"):
        assert word in printed
        assert word in again


def test_a_run_of_memorisation_draws_all_its_strings(tmp_path, capsys):
    options = ("--task", "memorisation-5", "--structural", "0", "--optimizers", "hf")
    assert main([*TINY, *options, "--updates", "1", "--out", str(tmp_path)]) == 0
    (file,) = files_of(tmp_path).values()
    (run,) = file["runs"]
    assert [row["sequences"] for row in run["rows"]] == [0, 32]
    assert run["rows"][1]["loss"] < run["rows"][0]["loss"]
    assert "memorisation-5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--task", "division"), "among addition,multiplication,"),
        (("--length", "20"), "--length must be at least 21, got 20"),
        (("--structural", "-1"), "at least 0, got '-1'"),
        (("--rates", "1e-3,0"), "above 0, got '0'"),
        (("--optimizers", "lbfgs"), "among hf,adam, got 'lbfgs'"),
        (("--cases", "20"), "at least twice --cases, got 24 and 20"),
        (("--updates", "3", "--optimizers", "adam"), "--updates is for HF"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(words, complaint, capsys, tmp_path):
    try:
        status = main([*TINY, "--out", str(tmp_path), *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    message = capsys.readouterr().err
    assert complaint in message
    assert message.count("\n") == 1


def write(path, *, settings=None, rows=((0.0, 0, 0, 0, 1.0, 1.0),)):
    plan = Plan("addition", 30, 0, "hf", 0.03)
    settings = {
        "seconds": 240.0,
        "updates": None,
        "stop": 0.01,
        "clock": "wall",
        "cases": 12,
        "gradient_cases": 24,
        "max_iterations": 5,
        **(settings or {}),
    }
    rows = [Row(*row)._asdict() for row in rows]
    document = {
        "plan": plan._asdict(),
        "finished": True,
        "settings": settings,
        "runs": [{"rows": rows}],
    }
    (path / plan.file).write_text(json.dumps(document))


def test_runs_of_other_settings_are_not_mixed_in(tmp_path, capsys):
    write(tmp_path, settings={"cases": 7})
    options = ("--optimizers", "hf", "--out", str(tmp_path))
    assert main([*TINY, *options]) == 2
    message = capsys.readouterr().err
    assert "cases 7, not 12: choose another --out" in message
    # Seconds of another clock are other seconds.
    assert main([*TINY, *options, "--cases", "7", "--clock", "processor"]) == 2
    assert "clock wall, not processor" in capsys.readouterr().err
    # Nor are those of another seed, which the table would put into the same line.
    assert main([*TINY, *options, "--seed", "1"]) == 2
    capsys.readouterr()
    write(tmp_path)
    assert main([*TINY, *options]) == 0


def test_adam_gets_the_time_that_hf_took_where_none_is_given(tmp_path):
    write(tmp_path, rows=[(0.0, 0, 0, 0, 1.0, 1.0), (12.5, 3, 15, 72, 1.0, 0.9)])
    plan = Plan("addition", 30, 0, "adam", 1e-3)
    first = tmp_path / plan._replace(family="hf", setting=0.03).file
    args = argparse.Namespace(seconds=None, updates=3, stop=0.01)
    assert rnn._limits(args, plan, first) == (12.5, None, 0.01)
    args = argparse.Namespace(seconds=7.0, updates=3, stop=0.01)
    assert rnn._limits(args, plan, first) == (7.0, None, 0.01)
    hf = plan._replace(family="hf")
    assert rnn._limits(args, hf, first) == (7.0, 3, 0.01)


def test_a_file_that_holds_no_run_is_one_clear_error(tmp_path, capsys):
    (tmp_path / "addition-30-hf-0.03-0.json").write_text("{")
    assert main([*TINY, "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "does not hold a run" in message
    assert message.count("\n") == 1


def ended(seed, wrong, updates):
    plan = Plan("addition", 30, seed, "hf", 0.0)
    row = Row(10.0 * updates, updates, 100 * updates, 2000 * updates, 0.1, wrong)
    return Ended(plan, {"stop": 0.01}, True, [row], wrong < 0.01)


def cells(table):
    return [list(column.cells) for column in table.columns]


def test_the_table_has_medians_of_the_solved_runs():
    runs = [ended(0, 0.005, 8), ended(1, 0.9, 50), ended(2, 0.009, 4)]
    runs.append(ended(3, 0.001, 5))
    columns = cells(rnn_report.table(runs))
    row = [column[0] for column in columns]
    assert row == ["addition 30", "hf", "3/4", "0.5%", "5", "500", "10,000", "50 s"]
    unsolved = cells(rnn_report.table([ended(0, 0.5, 8), ended(1, 0.9, 6)]))
    assert [column[0] for column in unsolved][2:5] == ["0/2", "70.0%", "7"]


def test_the_widest_table_fits_into_80_columns():
    plan = Plan("temporal-order-3", 1000, 0, "adam", 3e-4)
    row = Row(36_000.0, 999_999, 999_999, 123_456_789, 0.1, 1.0)
    console = Console(width=80, file=io.StringIO())
    console.print(rnn_report.table([Ended(plan, {"stop": 0.01}, True, [row], False)]))
    printed = console.file.getvalue()
    assert "…" not in printed
    for word in ("temporal-order-3 1000", "adam 0.0003", "999,999", "123.5M", "36000"):
        assert word in printed


def test_a_run_without_an_update_has_no_picture(tmp_path):
    assert rnn_report.draw([ended(0, 0.5, 0)], tmp_path) == []
