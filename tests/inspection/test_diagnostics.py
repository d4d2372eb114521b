import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
import rich.progress
from reference import quick_jit
from tqdm.std import tqdm

import hfjax
from hfjax import diagnostics
from hfjax.update._bookkeeping import record_of

OBJECTIVE = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())


def make_history(updates=6):
    row = diagnostics.scalars(hfjax.hessian_free(OBJECTIVE).init(jnp.zeros(1)))
    return [
        row
        | {
            "count": k + 1,
            "damping": 2.0**-k,
            "value_after": 1.0 / (k + 1),
            "accepted": k != 3,
            "rejection": "no decrease" if k == 3 else "none",
            "cg_reason": "stopping rule",
        }
        for k in range(updates)
    ]


def test_scalars_are_python_numbers_found_inside_a_chain():
    tx = optax.chain(hfjax.hessian_free(OBJECTIVE), optax.scale(0.5))
    read = diagnostics.scalars(tx.init(jnp.zeros(1)))
    assert read["count"] == 0
    assert read["damping"] == 1.0
    assert read["rejection"] == "none"
    assert {type(value) for value in read.values()} <= {int, float, bool, str}
    assert set(hfjax.HessianFreeInfo._fields) <= set(read)


def test_state_without_or_with_two_optimizers_is_refused():
    with pytest.raises(KeyError, match="found 0"):
        diagnostics.scalars(optax.sgd(0.1).init(jnp.zeros(1)))
    tx = hfjax.hessian_free(OBJECTIVE)
    with pytest.raises(KeyError, match="found 2"):
        diagnostics.scalars(optax.chain(tx, tx).init(jnp.zeros(1)))


def test_table_has_a_line_per_update_and_names_rejections():
    lines = diagnostics.table(make_history()).splitlines()
    assert len(lines) == 7
    assert [k for k, line in enumerate(lines) if "rejected: no decrease" in line] == [4]


def test_plot_shows_every_quantity_and_marks_rejected_updates():
    figure = diagnostics.plot(make_history())
    labels = " ".join(axis.get_ylabel() for axis in figure.axes)
    for quantity in ("objective", "λ", "ρ", "CG", "α"):
        assert quantity in labels
    damping = figure.axes[1].lines[0]
    assert list(damping.get_ydata()) == [2.0**-k for k in range(6)]
    assert list(damping.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert [line.get_xdata()[0] for line in figure.axes[1].lines[1:]] == [4]


def test_plot_of_nothing_is_refused():
    with pytest.raises(ValueError, match="`history` is empty"):
        diagnostics.plot([])


def test_a_line_says_what_an_update_did_and_why_it_was_rejected():
    rows = make_history()
    line = diagnostics.line(rows[2])
    assert "f 0.33333" in line
    assert "λ 0.25" in line
    assert "rejected" not in line
    assert diagnostics.line(rows[3]).endswith("rejected: no decrease")
    state = hfjax.hessian_free(OBJECTIVE).init(jnp.zeros(1))
    assert diagnostics.line(state) == diagnostics.line(diagnostics.scalars(state))


def test_the_line_stands_in_the_bars_of_tqdm_and_rich():
    line, out = diagnostics.line(make_history()[2]), io.StringIO()
    with tqdm(total=2, file=out, ncols=120) as bar:
        bar.set_postfix_str(line)
    assert line in out.getvalue()
    console = rich.console.Console(file=io.StringIO(), width=120, force_terminal=True)
    with rich.progress.Progress(console=console) as bars:
        task = bars.add_task("compiling", total=2)
        bars.update(task, advance=1, description=line)
    assert "λ 0.25" in console.file.getvalue()


def test_a_history_has_seconds_and_what_was_measured():
    history = diagnostics.History()
    state = hfjax.hessian_free(OBJECTIVE).init(jnp.zeros(1))
    row = history.record(state, error=0.25)
    history.record(state, error=0.5)
    assert row is history[0]
    assert row == {
        **diagnostics.scalars(state),
        "seconds": row["seconds"],
        "error": 0.25,
    }
    assert 0 <= history[0]["seconds"] <= history[1]["seconds"]
    assert diagnostics.table(history).count("\n") == 2


def test_progress_is_drawn_against_seconds_and_summed_cg_iterations():
    rows = [
        row | {"seconds": 2.0 * k, "cg_iterations": k, "error": 0.5**k}
        for k, row in enumerate(make_history())
    ]
    figure = diagnostics.plot_progress(rows, floor=0.1)
    values = figure.axes[1].lines[0]
    np.testing.assert_allclose(values.get_xdata(), [0, 1, 3, 6, 10, 15])
    np.testing.assert_allclose(
        values.get_ydata(), [1 / (k + 1) - 0.1 for k in range(6)]
    )
    errors = figure.axes[2].lines[0]
    np.testing.assert_allclose(errors.get_xdata(), [0, 2, 4, 6, 8, 10])
    np.testing.assert_allclose(errors.get_ydata(), [0.5**k for k in range(6)])
    labels = [axis.get_xlabel() for axis in figure.axes[2:]]
    assert labels == ["seconds", "CG iterations"]
    assert len(diagnostics.plot_progress(rows[:1]).axes) == 4
    with pytest.raises(ValueError, match=r"diagnostics\.History"):
        diagnostics.plot_progress(make_history())
    with pytest.raises(ValueError, match="`history` is empty"):
        diagnostics.plot_progress([])


def network(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


@pytest.mark.slow
def test_a_run_of_cg_is_that_of_an_update_with_f_beside_it():
    objective = hfjax.Objective(
        network, hfjax.losses.squared_error(), weight_decay=1e-3
    )
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "hidden": jax.random.normal(keys[0], (3, 4)),
        "out": jax.random.normal(keys[1], (4, 2)),
    }
    x = jax.random.normal(keys[2], (20, 3))
    batch, other = (x, jnp.sin(x[:, :2])), (x[:5] + 1, x[:5, :2])
    x0 = jax.tree.map(lambda leaf: 0.1 * jnp.ones_like(leaf), params)

    @quick_jit
    def look(params, x0):
        return diagnostics.cg_run(
            objective,
            params,
            batch,
            damping=0.3,
            preconditioner=None,
            x0=x0,
            eval_batch=other,
            max_iterations=6,
            interval=2,
        )

    run = look(params, x0)
    # The same, written out.
    _, gradient = objective.value_and_grad(params, batch)
    product = hfjax.curvature.ggn(objective, params, batch)
    result = hfjax.cg.solve(
        lambda v: jax.tree.map(lambda a, b: a + 0.3 * b, product(v), v),
        jax.tree.map(jnp.negative, gradient),
        x0=x0,
        stopping=None,
        max_iterations=6,
        keep=hfjax.iterates.every(2),
    )
    np.testing.assert_allclose(run.model_values, result.model_values, rtol=1e-9)
    np.testing.assert_array_equal(run.iterations, [0, 2, 4, 6])
    iterates = [x0] + [
        jax.tree.map(lambda leaf, k=k: leaf[k], result.kept.iterates) for k in range(3)
    ]
    values = [objective.value(optax.apply_updates(params, x), other) for x in iterates]
    expected = np.array(values) - objective.value(params, other)
    np.testing.assert_allclose(run.objective_changes, expected, rtol=1e-7)

    figure = diagnostics.plot_cg_run(run)
    model, changes, best = figure.axes[0].lines[:3]
    np.testing.assert_allclose(model.get_ydata(), run.model_values)
    np.testing.assert_allclose(changes.get_ydata(), expected, rtol=1e-7)
    assert best.get_xdata() == [run.iterations[np.argmin(expected)]]


def test_a_picture_of_a_run_leaves_out_what_was_not_evaluated():
    run = diagnostics.CGRun(
        num_iterations=jnp.int32(2),
        model_values=jnp.array([0.0, -1.0, -2.0, -2.0]),
        iterations=jnp.array([0, 2, -1]),
        objective_changes=jnp.array([0.0, jnp.inf, 7.0]),
        coefficients=jnp.zeros((3, 2)),
    )
    model, changes = diagnostics.plot_cg_run(run).axes[0].lines[:2]
    assert list(model.get_xdata()) == [0, 1, 2]
    assert list(changes.get_xdata()) == [0, 2]


def test_a_spectrum_is_drawn_by_rank_and_sign():
    figure = diagnostics.plot_spectrum([3.0, -2.0, 0.0, 5.0], damping=0.1)
    positive, negative, damping = figure.axes[0].lines
    assert list(positive.get_ydata()) == [5.0, 3.0]
    assert list(negative.get_ydata()) == [2.0]
    assert list(negative.get_xdata()) == [4]
    assert list(damping.get_ydata()) == [0.1, 0.1]
    for eigenvalues, level, legend in (
        ([3.0], 0.1, 1),
        ([-3.0], None, 1),
        ([3.0], None, 0),
    ):
        (axis,) = diagnostics.plot_spectrum(eigenvalues, damping=level).axes
        assert (axis.get_legend() is not None) == legend
    with pytest.raises(ValueError, match="not zero"):
        diagnostics.plot_spectrum([])


def test_a_line_shows_ratios_down_to_minus_99():
    row = dict.fromkeys(hfjax.HessianFreeInfo._fields, 0) | {"damping": 1.0}
    row |= {"rejection": "none", "value_after": 1.0}
    shown = [
        diagnostics.line(row | {"reduction_ratio": rho}).split("ρ ")[1].split()[0]
        for rho in (-50.0, -1e9)
    ]
    assert shown == ["-50.00", "-99.00"]


def test_the_record_of_a_run_that_broke_is_finite():
    values = jnp.array([0.0, -1.0, jnp.nan, jnp.inf])
    run = hfjax.cg.solve(lambda v: v, jnp.ones(2), max_iterations=3)
    stats = hfjax.cg.as_run(run._replace(model_values=values)).stats
    record = record_of(stats, 3, jnp.float32)
    np.testing.assert_array_equal(record.model_values, [0, -1, 0, 0])
