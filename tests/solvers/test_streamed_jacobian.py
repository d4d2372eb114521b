"""A Jacobian that is never stored: the same steps, in the memory of its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from reference import flat, quick_jit

import hfjax
from hfjax import damping, sample_space
from hfjax.curvature.jacobian import jacobian
from hfjax.curvature.streamed_jacobian import StreamedJacobian, bounded_jacobian

SQUARED_ERROR = hfjax.losses.squared_error()
SPACES = ("samples", "parameters")
CASES = 23


def model_fn(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


def problem(cases=CASES, units=5):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(3, units))),
        "b": jnp.zeros(units),
        "v": jnp.asarray(rng.normal(size=(units, 2))),
        "none": jnp.zeros((0, 4)),
    }
    x = jnp.asarray(rng.normal(size=(cases, 3)))
    targets = jnp.stack([jnp.sin(x[:, 0]), jnp.cos(x[:, 1])], axis=1)
    return params, (x, targets, jnp.asarray(rng.uniform(size=cases)))


def update(f, params, batch, space, stored):
    """Return what a corrected step adds, and its state."""
    solver = sample_space.cholesky(space=space, stored=stored)
    rule = damping.constant(0.01)
    tx = hfjax.hessian_free(f, damping=rule, solver=solver, line_search=None)
    return training.one_update(f, tx, params, batch)


@pytest.mark.parametrize("most", [100, 250])
def test_products_and_matrices_are_those_of_the_stored_rows(most):
    """Of chunks of one and of three cases, the last one filled up."""
    params, batch = problem()
    f = hfjax.Objective(model_fn, SQUARED_ERROR)
    whole = jacobian(f, params, batch)
    parts = bounded_jacobian(f, params, batch, most)
    assert isinstance(parts, StreamedJacobian)
    v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    j = np.asarray(whole.matrix())

    def found(v):
        u = parts.product(v)
        return u, parts.transpose(u), parts.of_parameters(), parts.squares()

    u, transposed, matrix, squares = quick_jit(found)(v)
    # The order of the rows differs, and rows of zeros may have been added.
    np.testing.assert_allclose(np.sort(u[u != 0]), np.sort(j @ flat(v)), rtol=1e-10)
    np.testing.assert_allclose(flat(transposed), j.T @ (j @ flat(v)), rtol=1e-10)
    np.testing.assert_allclose(matrix, j.T @ j, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(flat(squares), np.diag(j.T @ j), rtol=1e-10)
    eigenvalues = np.linalg.eigvalsh(quick_jit(lambda: parts.of_samples())())
    rank = len(flat(params))
    truth = np.linalg.eigvalsh(j.T @ j)
    np.testing.assert_allclose(eigenvalues[-rank:], truth, rtol=1e-7, atol=1e-12)
    there = whole.residuals_at(v), parts.residuals_at(v)
    residuals = whole.residuals, parts.residuals
    for stored, streamed in (there, residuals):
        np.testing.assert_allclose(
            np.sort(streamed[streamed != 0]), np.sort(stored), rtol=1e-10
        )


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_a_corrected_step_does_not_depend_on_whether_rows_are_stored(space):
    params, batch = problem()
    f = hfjax.Objective(model_fn, SQUARED_ERROR, weight_decay=0.1)
    whole, _ = update(f, params, batch, space, 10**6)
    parts, state = update(f, params, batch, space, 200)
    assert float(state.info.value_after) < float(state.info.value_before)
    np.testing.assert_allclose(flat(parts), flat(whole), rtol=1e-7, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("opaque", [False, True])
def test_a_model_without_forward_derivatives_will_do(space, opaque):
    """Of a backward rule that can be transposed, or, from a callback, cannot."""

    def pull(y, u):
        if not opaque:
            return ((1 - y * y) * u,)
        like = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return (
            jax.pure_callback(
                lambda y, u: (1 - np.square(y)) * u,
                like,
                y,
                u,
                vmap_method="expand_dims",
            ),
        )

    @jax.custom_vjp
    def tanh(x):
        return jnp.tanh(x)

    tanh.defvjp(lambda x: (jnp.tanh(x),) * 2, pull)

    def same_fn(params, x):
        return tanh(x @ params["w"] + params["b"][None]) @ params["v"]

    params, batch = problem()
    expected, _ = update(
        hfjax.Objective(model_fn, SQUARED_ERROR), params, batch, space, 10**6
    )
    found, _ = update(
        hfjax.Objective(same_fn, SQUARED_ERROR), params, batch, space, 200
    )
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-7, atol=1e-10)


@pytest.mark.slow
def test_memory_is_that_of_a_part_and_of_the_matrix():
    """Of 20,000 rows and 300 parameters, the rows alone are 48 MB."""
    params, batch = problem(cases=10_000, units=50)
    f = hfjax.Objective(model_fn, SQUARED_ERROR)

    def bytes_of(stored):
        solver = sample_space.cholesky(stored=stored)
        tx = hfjax.hessian_free(f, solver=solver, backtracking=None)
        step = jax.jit(
            lambda params, state, grads: tx.update(grads, state, params, batch=batch)
        )
        lowered = step.lower(params, tx.init(params), params)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    rows = 20_000 * 300 * 8
    assert bytes_of(10**7) > rows
    assert bytes_of(10**5) < rows / 4


def test_what_fits_is_stored_and_a_single_example_is_not_split():
    params, batch = problem()
    f = hfjax.Objective(model_fn, SQUARED_ERROR)
    numbers = 2 * CASES * len(flat(params))
    assert not isinstance(bounded_jacobian(f, params, batch, numbers), StreamedJacobian)
    assert isinstance(bounded_jacobian(f, params, batch, numbers - 1), StreamedJacobian)
    one = jax.tree.map(lambda leaf: leaf[:1], batch)
    assert not isinstance(bounded_jacobian(f, params, one, 1), StreamedJacobian)
