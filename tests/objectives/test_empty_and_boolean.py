"""Parameters without entries, and targets that are no floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import quick_jit

import hfjax
from hfjax.objectives.plain import terms_of

X, T = jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[1.0], [2.0]])
PARAMS = {"w": jnp.zeros((2, 1)), "none": jnp.zeros((2, 0)), "flat": jnp.zeros(0)}
PARAMS |= {"nothing": None}
LOSSES = hfjax.losses
KEY = jax.random.key(0)


def model_fn(p, x):
    return x @ p["w"] + jnp.sum(x @ p["none"], axis=1, keepdims=True)


def objective(size=None):
    return hfjax.Objective(model_fn, LOSSES.squared_error(), microbatch_size=size)


RIGHT = jnp.linalg.solve(X.T @ X / 2 + jnp.eye(2), X.T @ T / 2)


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("space", ["samples", "parameters"])
def test_a_parameter_without_entries_leaves_the_exact_step(space, size):
    f = objective(size)
    tx = hfjax.hessian_free(
        f,
        solver=hfjax.sample_space.cholesky(space=space),
        damping=hfjax.damping.constant(1.0),
        backtracking=None,
    )

    @quick_jit
    def step():
        grads = f.value_and_grad(PARAMS, (X, T))[1]
        return tx.update(grads, tx.init(PARAMS), PARAMS, batch=(X, T))[0]

    found = step()
    np.testing.assert_allclose(found["w"], RIGHT, rtol=1e-6)
    assert found["none"].shape == (2, 0)


def test_a_parameter_without_entries_has_an_empty_block():
    f = objective()
    sentences = hfjax.preconditioners.layers(f, PARAMS, (X, T))
    assert sentences["['none']"] == "diagonal: it has no entries"
    rule = hfjax.preconditioners.kronecker(damping_share=1.0)
    build = (f, PARAMS, (X, T), jnp.ones(()), KEY)
    found = quick_jit(lambda: rule.build(*build)(PARAMS | {"w": X.T @ T / 2}))()
    assert found["w"].shape == (2, 1)
    assert np.all(np.isfinite(found["w"]))
    assert found["none"].shape == (2, 0)


def test_outputs_of_a_sum_are_counted_term_by_term():
    f = hfjax.objective.weighted_sum([(1.0, objective()), (1.0, objective())])
    batch = ((X, T), (X, T))
    assert [len(term.columns(PARAMS)) for term in terms_of(f, batch)] == [1, 1]


Z = jnp.array([[0.3, -1.0, 0.5], [1.0, 0.2, -0.7]])
ONE_HOT = jnp.eye(3)[:2]


@pytest.mark.parametrize("dtype", [bool, jnp.uint8, jnp.int32])
@pytest.mark.parametrize(
    "make",
    [LOSSES.squared_error, LOSSES.sigmoid_cross_entropy, LOSSES.softmax_cross_entropy],
)
def test_targets_of_booleans_and_integers_are_those_of_floats(make, dtype):
    loss, targets = make(), ONE_HOT.astype(dtype)
    for name in ("hessian", "factor"):
        ours, theirs = (getattr(loss, name)(Z, t)(Z) for t in (targets, ONE_HOT))
        np.testing.assert_array_equal(ours, theirs)
    value = loss.value(Z, targets)
    np.testing.assert_array_equal(value, loss.value(Z, ONE_HOT))
    assert value.dtype == Z.dtype
