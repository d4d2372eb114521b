import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.flatten_util import ravel_pytree
from problems import every_problem, mlp, named, normal
from reference import quick_jit

import hfjax
from hfjax.curvature import ggn


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@functools.cache
def ggn_matrix(problem):
    """Return the matrix of hfjax's product, column by column."""
    objective = problem.objective()

    @quick_jit
    def columns(params):
        parameters, unravel = ravel_pytree(params)
        product = ggn(objective, params, problem.batch)
        return jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0], out_axes=1)(
            jnp.eye(parameters.size)
        )

    return np.asarray(columns(problem.params))


@every_problem
def test_product_equals_dense_ggn(problem):
    truth = reference.ggn(problem)
    np.testing.assert_allclose(
        ggn_matrix(problem), truth, rtol=1e-10, atol=1e-13 * np.max(np.abs(truth))
    )


@every_problem
def test_ggn_is_symmetric_and_positive_semidefinite(problem):
    matrix = ggn_matrix(problem)
    size = np.max(np.abs(matrix))
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-9, atol=1e-14)
    assert (
        np.min(np.linalg.eigvalsh(matrix))
        >= problem.weight_decay - 1e-13 - 1e-13 * size
    )


def test_product_of_a_frozen_layer_is_weight_decay_alone():
    problem = named("frozen")
    start = sum(leaf.size for leaf in problem.params["first"])  # Sorted by key.
    rows = ggn_matrix(problem)[start:]
    np.testing.assert_array_equal(rows, 0.05 * np.eye(len(rows) + start)[start:])


def written_out(outputs_fn, t, params):
    """Return the mean softmax cross-entropy of some outputs of flat parameters."""

    def f(flat):
        return jnp.mean(optax.softmax_cross_entropy(outputs_fn(flat), t))

    return quick_jit(jax.hessian(f))(params)


def test_ggn_of_a_linear_model_is_the_hessian():
    rng = np.random.default_rng(1)
    x, w = normal(rng, 5, 3), normal(rng, 3, 3)
    t = jnp.asarray(rng.dirichlet(np.ones(3), 5))
    objective = hfjax.Objective(
        lambda w, x: x @ w.reshape(3, 3), hfjax.losses.softmax_cross_entropy()
    )
    product = quick_jit(jax.vmap(ggn(objective, w.ravel(), (x, t))))
    truth = written_out(lambda w: x @ w.reshape(3, 3), t, w.ravel())
    np.testing.assert_allclose(product(jnp.eye(9)), truth, rtol=1e-10, atol=1e-15)


def test_ggn_is_the_hessian_of_the_loss_of_the_linearised_model():
    problem = named("mlp_softmax")
    x, t = problem.batch
    params, unravel = ravel_pytree(problem.params)
    jacobian = quick_jit(jax.jacfwd(lambda flat: mlp(unravel(flat), x)))(params)
    outputs = mlp(problem.params, x)
    truth = written_out(lambda step: outputs + jacobian @ step, t, 0 * params)
    decay = problem.weight_decay * np.eye(len(params))
    np.testing.assert_allclose(
        ggn_matrix(problem), truth + decay, rtol=1e-10, atol=1e-15
    )
    # The model is not linear: its Hessian is another matrix.
    hessian = written_out(lambda flat: mlp(unravel(flat), x), t, params)
    assert np.max(np.abs(hessian - truth)) > 1e-2


@pytest.mark.parametrize("loss", [optax.l2_loss, optax.log_cosh])
def test_ggn_of_a_wrapped_loss_uses_its_second_derivative(loss):
    rng = np.random.default_rng(2)
    x, t, w = normal(rng, 5, 3), normal(rng, 5, 2), normal(rng, 3, 2)
    objective = hfjax.Objective(lambda w, x: jnp.tanh(x @ w), loss)
    z = np.tanh(x @ w)
    slope = 1 - z**2
    second = np.ones_like(z) if loss is optax.l2_loss else 1 - np.tanh(z - t) ** 2
    v = np.cos(3 * w)
    truth = x.T @ (slope * second * slope * (x @ v)) / 5
    product = quick_jit(lambda w, v: ggn(objective, w, (x, t))(v))(w, v)
    np.testing.assert_allclose(product, truth, rtol=1e-10)


@pytest.mark.parametrize("vector", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_product_keeps_the_dtype_of_the_vector(dtype, microbatch_size, vector):
    problem = named("mlp_softmax")
    params, batch = jax.tree.map(
        lambda leaf: leaf.astype(dtype), (problem.params, problem.batch)
    )
    objective = problem.objective(microbatch_size=microbatch_size)
    v = jax.tree.map(lambda leaf: leaf.astype(vector), problem.direction)
    shapes = jax.eval_shape(lambda v: ggn(objective, params, batch)(v), v)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(vector)}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 3e-6), (jnp.bfloat16, 0.05)]
)
def test_product_in_short_floats_is_near_the_truth(dtype, tolerance):
    problem = named("mlp_softmax")
    params, batch, v = jax.tree.map(
        lambda leaf: leaf.astype(dtype),
        (problem.params, problem.batch, problem.direction),
    )
    objective = problem.objective()
    product = quick_jit(lambda params, v: ggn(objective, params, batch)(v))(params, v)
    truth = reference.ggn(problem) @ flat(problem.direction)
    error = np.linalg.norm(flat(product).astype(float) - truth)
    assert error <= tolerance * np.linalg.norm(truth)


def counted(problem):
    calls = []

    def model_fn(params, x):
        calls.append(x)
        return problem.model_fn(params, x)

    loss = hfjax.losses.softmax_cross_entropy()
    return hfjax.Objective(model_fn, loss), calls


def test_the_product_runs_the_model_no_more():
    problem = named("mlp_softmax")
    objective, calls = counted(problem)
    product = ggn(objective, problem.params, problem.batch)
    assert len(calls) == 1
    product(problem.direction)
    again = str(jax.make_jaxpr(product)(problem.direction))
    assert len(calls) == 1
    assert "tanh" not in again
    assert "exp" not in again  # Neither is the softmax taken again.
    # Two hidden layers, one output layer: J v costs 2 · 2 + 1 products with data or
    # weights less one (the input is constant), Jᵀ as many.
    assert again.count("dot_general") <= 2 * 5


def test_the_product_in_a_loop_runs_the_model_outside_of_it():
    problem = named("mlp_softmax")
    objective, calls = counted(problem)

    def power_iteration(params, v):
        product = ggn(objective, params, problem.batch)
        return jax.lax.fori_loop(0, 5, lambda _, v: product(v), v)

    program = jax.make_jaxpr(power_iteration)(problem.params, problem.direction)
    assert len(calls) == 1
    (loop,) = (
        equation
        for equation in program.eqns
        if equation.primitive.name in ("scan", "while")
    )
    assert "tanh" not in str(loop)


def test_microbatches_run_the_model_once_in_a_product():
    problem = named("mlp_softmax")
    objective, calls = counted(problem)
    ggn(objective.with_microbatches(2), problem.params, problem.batch)
    assert not calls


def test_product_is_linear_and_the_same_when_jitted():
    rng = np.random.default_rng(3)
    x, t = normal(rng, 4, 3), normal(rng, 4, 2)
    w, u, v = (normal(rng, 3, 2) for _ in range(3))
    objective = hfjax.Objective(lambda w, x: x @ jnp.tanh(w), optax.log_cosh)
    product = ggn(objective, w, (x, t))
    eager = product(2 * u - 3 * v)
    np.testing.assert_allclose(eager, 2 * product(u) - 3 * product(v), rtol=1e-12)
    jitted = quick_jit(lambda w, v: ggn(objective, w, (x, t))(v))(w, 2 * u - 3 * v)
    np.testing.assert_allclose(jitted, eager, rtol=1e-12)
