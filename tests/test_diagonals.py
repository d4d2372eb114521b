import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.flatten_util import ravel_pytree
from problems import every_problem, layers, mlp, named, normal
from reference import quick_jit

import hfjax
from hfjax import _case_gradients, diagonals

SQUARED = hfjax.losses.squared_error()


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def fisher(problem, **options):
    objective = problem.objective(**options)
    diagonal = quick_jit(functools.partial(diagonals.empirical_fisher, objective))
    return diagonal(problem.params, problem.batch)


def held(objective, params, batch):
    """Return how many entries of a case's gradient have to be formed."""

    def gradient(case):
        one = jax.tree.map(lambda leaf: leaf[None], case)
        return jax.grad(lambda params: objective.case_values(params, one)[0])(params)

    return _case_gradients.held_entries(gradient, batch[:2])


@every_problem
def test_diagonal_equals_dense(problem):
    np.testing.assert_allclose(
        flat(fisher(problem)),
        reference.empirical_fisher(problem),
        rtol=1e-10,
        atol=1e-20,
    )


def test_diagonal_equals_squares_of_reverse_mode_case_gradients():
    problem = named("mlp_softmax")
    x, t = problem.batch

    def values(params):
        return -jnp.sum(t * jax.nn.log_softmax(mlp(params, x)), axis=1)

    gradients = quick_jit(jax.jacrev(values))(problem.params)
    truth = jax.tree.map(lambda leaf: jnp.mean(leaf**2, axis=0) + 0.02, gradients)
    np.testing.assert_allclose(flat(fisher(problem)), flat(truth), rtol=1e-10)


def test_dense_layers_are_not_formed_case_by_case():
    rng = np.random.default_rng(0)
    params = layers(rng, 30, 40, 20, 10)
    weights = sum(w.size for w, _ in params)
    objective = hfjax.Objective(mlp, SQUARED)
    batch = (jnp.ones((6, 30)), jnp.ones((6, 10)))
    # Biases are formed; they are few.
    assert held(objective, params, batch) == 40 + 20 + 10
    assert weights > 2000
    # Nor in a program under jit, in another notation, or with parts transposed.
    jitted = hfjax.Objective(jax.jit(mlp), SQUARED)
    assert held(jitted, params, batch) == 70

    def einsum(params, x):
        (w, _), (u, _), (out, _) = params
        hidden = jnp.tanh(jnp.einsum("bi,ij->bj", x, w))
        hidden = jnp.tanh(jnp.einsum("kj,bj->bk", u.T, hidden))
        return jax.lax.dot_general(hidden, out, (((1,), (0,)), ((), ())))

    assert held(hfjax.Objective(einsum, SQUARED), params, batch) == 70


def test_no_array_of_cases_by_weights_is_in_the_program():
    rng = np.random.default_rng(0)
    params = layers(rng, 30, 40, 10)
    objective = hfjax.Objective(mlp, SQUARED)
    batch = (jnp.ones((6, 30)), jnp.ones((6, 10)))
    program = jax.make_jaxpr(functools.partial(diagonals.empirical_fisher, objective))(
        params, batch
    )
    largest = max(
        var.aval.size for equation in program.eqns for var in equation.outvars
    )
    assert largest <= 30 * 40


def test_shared_and_convolved_weights_are_formed():
    for name in ("convolution", "recurrent"):
        problem = named(name)
        kept = held(problem.objective(), problem.params, problem.batch)
        assert kept >= 16  # The kernel, the recurrent and input weights.


@pytest.mark.parametrize(("name", "cases_at_once"), [("convolution", 3), ("frozen", 1)])
def test_chunks_of_cases_change_nothing(name, cases_at_once, monkeypatch):
    problem = named(name)
    entries = held(problem.objective(), problem.params, problem.batch)
    monkeypatch.setattr(diagonals, "_HELD_ENTRIES", cases_at_once * entries)
    seen = []
    sum_of_squares = _case_gradients.sum_of_squares

    def spy(case_gradient, data, weights):
        seen.append(len(weights))
        return sum_of_squares(case_gradient, data, weights)

    monkeypatch.setattr(_case_gradients, "sum_of_squares", spy)
    np.testing.assert_allclose(
        flat(fisher(problem)),
        reference.empirical_fisher(problem),
        rtol=1e-10,
        atol=1e-20,
    )
    assert max(seen) <= cases_at_once


def test_a_jitted_model_has_the_same_diagonal():
    problem = named("mlp_sigmoid")

    @jax.jit
    def half(layer, x):
        w, b = layer
        return jnp.tanh(x @ w + b[None])

    @jax.jit
    def model_fn(params, x):
        first, second, (w, b) = params
        return jax.jit(half)(second, half(first, x)) @ w + b[None]

    objective = hfjax.Objective(model_fn, hfjax.losses.sigmoid_cross_entropy())
    diagonal = quick_jit(functools.partial(diagonals.empirical_fisher, objective))
    np.testing.assert_allclose(
        flat(diagonal(problem.params, problem.batch)),
        reference.empirical_fisher(problem),
        rtol=1e-10,
    )


def tied(w, x):
    return jnp.tanh(x @ w) @ w.T


def outer_inside(w, x):
    # A product over the cases that is no gradient, and is used further.
    pairs = jnp.einsum("bi,bj->bij", x, jnp.sin(x))
    return jnp.einsum("bij,jk->bik", pairs, w)


def scaled(w, x):
    return x @ (0.5 * jnp.square(w))


def checkpointed(w, x):
    return jax.checkpoint(lambda w: jnp.tanh(x @ w))(w)


def branching(w, x):
    return jax.lax.cond(w[0, 0] > 0, lambda: x @ w, lambda: x @ (2 * w))


def with_its_own_derivative(w, x):
    return jax.nn.relu(x @ w) + jax.nn.silu(x) @ w


def twice_in_short_floats(w, x):
    short = (x.astype(jnp.float32) @ w.astype(jnp.float32)).astype(x.dtype)
    return short + jnp.sin(x) @ w


def scaled_in_short_floats(w, x):
    return (x.astype(jnp.float32) @ (0.5 * w).astype(jnp.float32)).astype(x.dtype)


@pytest.mark.parametrize(
    "model_fn",
    [
        tied,
        outer_inside,
        scaled,
        checkpointed,
        branching,
        with_its_own_derivative,
        twice_in_short_floats,
        scaled_in_short_floats,
    ],
)
def test_products_that_are_used_further_are_formed(model_fn):
    rng = np.random.default_rng(4)
    x, w = normal(rng, 5, 3), normal(rng, 3, 3)
    objective = hfjax.Objective(model_fn, SQUARED)
    t = jnp.zeros(jax.eval_shape(model_fn, w, x).shape)
    diagonal = quick_jit(functools.partial(diagonals.empirical_fisher, objective))

    def values(w):
        return jnp.sum(0.5 * model_fn(w, x).reshape(5, -1) ** 2, axis=1)

    truth = np.mean(np.square(quick_jit(jax.jacrev(values))(w)), axis=0)
    tolerance = 1e-5 if "short" in model_fn.__name__ else 1e-10
    np.testing.assert_allclose(diagonal(w, (x, t)), truth, rtol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_diagonal_is_in_float32_or_wider(dtype):
    problem = named("mlp_sigmoid")
    params, batch = jax.tree.map(
        lambda leaf: leaf.astype(dtype), (problem.params, problem.batch)
    )
    diagonal = quick_jit(
        functools.partial(diagonals.empirical_fisher, problem.objective())
    )(params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(diagonal)} == {jnp.dtype("float32")}
    truth = reference.empirical_fisher(problem)
    error = np.linalg.norm(flat(diagonal) - truth) / np.linalg.norm(truth)
    assert error < (1e-5 if dtype == jnp.float32 else 0.1)
    assert np.min(flat(diagonal)) >= 0
