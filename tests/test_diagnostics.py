import jax.numpy as jnp
import optax
import pytest

import hfjax
from hfjax import diagnostics

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
