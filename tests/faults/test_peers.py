"""Faults of other implementations of the method, none of which is here.

Each test has the fault beside what is right, on data that tell them apart. Faults of
conjugate gradients, line search and λ's rule are in `test_peers_parts.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.flatten_util import ravel_pytree
from problems import Problem, layers, mlp, normal, uneven
from reference import flat, quick_jit

import hfjax

RNG = np.random.default_rng(5)
PROBLEM = Problem(
    "classes",
    layers(RNG, 3, 4, 3),
    mlp,
    "softmax_cross_entropy",
    (normal(RNG, 9, 3), jnp.eye(3)[jnp.arange(9) % 3], jnp.linspace(0.5, 2, 9)),
    weight_decay=0.05,
)


def assert_is(found, right, fault):
    """Assert that a quantity is right, and the fault not near it."""
    scale = np.max(np.abs(right))
    assert np.max(np.abs(fault - right)) > 1e-3 * scale
    np.testing.assert_allclose(found, right, rtol=1e-7, atol=1e-9 * scale)


def softmax(z):
    return np.exp(z) / np.sum(np.exp(z))


def test_the_hessian_of_softmax_is_taken_in_the_logits_and_not_in_the_probabilities():
    z, t, v = np.array([1.0, -0.5, 0.2]), np.eye(3)[1], np.array([0.3, 1.0, -2.0])
    p = softmax(z)
    right = np.diag(p) - np.outer(p, p)
    # The fault, −log p differentiated twice in p: the empirical Fisher matrix.
    fault = right @ np.diag(t / p**2) @ right
    np.testing.assert_allclose(fault, np.outer(t - p, t - p), rtol=1e-12)
    hessian = hfjax.losses.softmax_cross_entropy().hessian
    assert_is(hessian(z[None], t[None])(v[None])[0], right @ v, fault @ v)
    # It is infinite, too, where a probability vanishes.
    z = np.array([[0.0, -2000.0, 1.0]])
    with np.errstate(divide="ignore"):
        assert np.isinf(1 / softmax(z)[0, 1])
    assert np.all(np.isfinite(hessian(z, t[None])(v[None])))


def test_products_with_the_hessian_of_softmax_form_no_matrix():
    units, loss = 2000, hfjax.losses.softmax_cross_entropy()
    z = jnp.zeros((3, units))
    program = jax.make_jaxpr(lambda z, t, v: loss.hessian(z, t)(v))(z, z, z)
    sizes = [out.aval.size for line in program.eqns for out in line.outvars]
    assert max(sizes) == 3 * units  # The fault: 3 · units², 78 GB for a vocabulary.


def test_the_curvature_of_squared_error_knows_no_softmax():
    z, v = np.array([1.0, -0.5, 0.2]), np.array([0.3, 1.0, -2.0])
    p = softmax(z)
    found = hfjax.losses.squared_error().hessian(z[None], z[None])(v[None])[0]
    assert_is(found, v, (np.diag(p) - np.outer(p, p)) @ v)


@functools.cache
def product():
    """Return G v."""
    ggn = functools.partial(hfjax.curvature.ggn, PROBLEM.objective())
    compiled = quick_jit(lambda params, batch, v: ggn(params, batch)(v))
    return flat(compiled(PROBLEM.params, PROBLEM.batch, PROBLEM.direction))


def test_outputs_are_not_summed_over_in_the_product():
    v = flat(PROBLEM.direction)
    right = reference.ggn(PROBLEM) @ v
    # The fault: Jv summed over outputs. Rows of diag(p) − ppᵀ sum to 0: so does G v.
    fault = PROBLEM.weight_decay * v
    assert_is(product(), right, fault)


def test_weight_decay_is_in_the_curvature_as_it_is_in_the_gradient():
    v = flat(PROBLEM.direction)
    right = reference.ggn(PROBLEM) @ v
    fault = reference.ggn(dataclasses.replace(PROBLEM, weight_decay=0.0)) @ v
    assert_is(product(), right, fault)


def test_a_product_does_not_run_the_model_again():
    # As a fault does, which differentiates the model anew in each.
    def loop(params, batch, v):
        product = hfjax.curvature.ggn(PROBLEM.objective(), params, batch)
        return jax.lax.fori_loop(0, 5, lambda i, v: product(v), v)

    arguments = PROBLEM.params, PROBLEM.batch, PROBLEM.direction
    program = jax.make_jaxpr(loop)(*arguments)
    (body,) = (
        line for line in program.eqns if line.primitive.name in ("scan", "while")
    )
    assert "tanh" in str(program)
    assert "tanh" not in str(body)


def test_the_fisher_diagonal_squares_cases_and_not_their_mean():
    gradients, weights = reference.dense(PROBLEM).gradients, PROBLEM.batch[2]
    right = reference.empirical_fisher(PROBLEM)
    fault = reference.mean(gradients, weights) ** 2 + PROBLEM.weight_decay
    parts = [slice(0, 3), slice(3, 6), slice(6, 9)]  # Another: means of microbatches.
    means = [reference.mean(gradients[part], weights[part]) for part in parts]
    another = np.mean(np.square(means), axis=0) + PROBLEM.weight_decay
    for size in (None, 3):
        objective = PROBLEM.objective(microbatch_size=size)
        estimate = functools.partial(hfjax.diagonals.empirical_fisher, objective)
        found = flat(quick_jit(estimate)(PROBLEM.params, PROBLEM.batch))
        assert_is(found, right, fault)
        assert_is(found, right, another)


def compiled(objective, tx):
    def update(params, state, batch):
        grads = objective.value_and_grad(params, batch)[1]
        return tx.update(grads, state, params, batch=batch)

    return quick_jit(update)


@functools.cache
def two_updates():
    """Run two updates of three iterations, without backtracking and line search."""
    objective = PROBLEM.objective()
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(0.3),
        solver=hfjax.cg.conjugate_gradient(
            max_iterations=3, stopping=None, warm_start_decay=0.95
        ),
        preconditioner=hfjax.preconditioners.diagonal(),
        backtracking=None,
        line_search=None,
    )
    update = compiled(objective, tx)
    params, state, seen = PROBLEM.params, tx.init(PROBLEM.params), []
    for _ in range(2):
        problem, before = dataclasses.replace(PROBLEM, params=params), state
        updates, state = update(params, before, problem.batch)
        assert state.info.accepted
        params = optax.apply_updates(params, updates)
        seen.append((problem, float(before.damping), flat(updates), state.info))
    return seen


def solution(problem, damping, *, x0=None, preconditioned=True):
    """Return the third iterate, of dense matrices."""
    gradient = reference.gradient(problem)
    a = reference.ggn(problem) + damping * np.eye(len(gradient))
    diagonal = (reference.empirical_fisher(problem) + damping) ** 0.75
    inverse = np.diag(1 / diagonal) if preconditioned else None
    return reference.pcg(a, -gradient, x0, inverse, iterations=3)[0][-1]


def moved(problem, step):
    params = ravel_pytree(problem.params)[1](flat(problem.params) + step)
    return dataclasses.replace(problem, params=params)


def test_the_preconditioner_reaches_conjugate_gradients_where_a_fault_drops_it():
    problem, damping, step, _ = two_updates()[0]
    fault = solution(problem, damping, preconditioned=False)
    assert_is(step, solution(problem, damping), fault)


def test_a_warm_start_is_decayed():
    (_, _, first, _), (problem, damping, step, _) = two_updates()
    right = solution(problem, damping, x0=0.95 * first)
    assert_is(step, right, solution(problem, damping, x0=first))


def test_the_reduction_ratio_starts_at_zero_and_not_at_the_warm_start():
    (_, _, first, _), (problem, _, step, info) = two_updates()
    gradient, ggn = reference.gradient(problem), reference.ggn(problem)

    def change(x):
        return reference.value(moved(problem, x))

    def predicted(x):
        return gradient @ x + 0.5 * x @ ggn @ x

    x0 = 0.95 * first
    right = (change(step) - change(0 * step)) / predicted(step)
    fault = (change(step) - change(x0)) / (predicted(step) - predicted(x0))
    assert_is(info.reduction_ratio, right, fault)


def test_what_an_update_found_is_recorded_without_being_asked_for():
    for problem, _, step, info in two_updates():
        before, after = reference.value(problem), reference.value(moved(problem, step))
        np.testing.assert_allclose(info.value_before, before, rtol=1e-10)
        np.testing.assert_allclose(info.value_after, after, rtol=1e-10)


@functools.cache
def linear_updates():
    """Run two updates on linear least squares, with a parameter that has no use."""
    objective = hfjax.Objective(
        lambda params, x: x @ params["used"], hfjax.losses.squared_error()
    )
    tx = hfjax.hessian_free(
        objective,
        learning_rate=lambda count: 1 / (1 + count),
        damping=hfjax.damping.levenberg_marquardt(1e-7),
        solver=hfjax.cg.conjugate_gradient(stopping=hfjax.stopping.martens2010()),
        line_search=None,
    )
    x, t = normal(np.random.default_rng(6), 8, 2), jnp.arange(8.0) ** 2
    params = {"used": jnp.ones(2), "unused": jnp.ones(3)}
    state, update, seen = tx.init(params), compiled(objective, tx), []
    for _ in range(2):
        updates, state = update(params, state, (x, t))
        seen.append((updates, state))
    return x, t, seen


def test_the_quadratic_term_of_the_predicted_change_has_its_sign():
    x, t, ((updates, state), _) = linear_updates()
    gradient, ggn = x.T @ (x.sum(axis=1) - t) / 8, x.T @ x / 8
    step = -np.linalg.solve(ggn, gradient)
    np.testing.assert_allclose(updates["used"], step, rtol=1e-5)
    curved = 0.5 * step @ ggn @ step
    change = gradient @ step + curved
    np.testing.assert_allclose(change / (gradient @ step - curved), 1 / 3)  # The fault.
    np.testing.assert_allclose(state.info.reduction_ratio, 1, rtol=1e-5)
    np.testing.assert_allclose(state.damping, 2 / 3 * 1e-7, rtol=1e-6)


def test_a_parameter_that_the_model_does_not_use_stays_and_breaks_nothing():
    for updates, state in linear_updates()[2]:
        assert state.info.accepted
        np.testing.assert_array_equal(updates["unused"], 0)


def test_what_depends_on_the_count_is_read_anew_in_each_compiled_update():
    (_, first), (_, second) = linear_updates()[2]
    assert (float(first.info.step_size), float(second.info.step_size)) == (1, 0.5)


def test_a_bad_step_is_not_kept_and_its_solution_does_not_start_the_next_run():
    # Newton's method for arctan p = 0 overshoots from beyond 1.39.
    objective = hfjax.Objective(
        lambda p, x: x * jnp.arctan(p)[None], hfjax.losses.squared_error()
    )
    rule = hfjax.damping.levenberg_marquardt(1e-9)
    solver = hfjax.cg.conjugate_gradient(warm_start_decay=0.95)
    tx = hfjax.hessian_free(objective, damping=rule, solver=solver, line_search=None)
    batch, update = (jnp.ones(1), jnp.zeros(1)), compiled(objective, tx)
    _, state = update(jnp.array(0.5), tx.init(jnp.array(0.5)), batch)
    assert state.info.accepted
    assert state.direction != 0
    fault = 2 - np.arctan(2) * (1 + 2**2)
    assert np.abs(np.arctan(fault)) > np.arctan(2)
    step, after = update(jnp.array(2.0), state, batch)
    assert not after.info.accepted
    assert after.info.cg_iterations > 0
    assert (step, after.direction) == (0, 0)
    np.testing.assert_allclose(after.damping, 1.5 * state.damping)


@pytest.mark.slow
def test_uneven_devices_share_one_mean_where_faults_mean_the_means():
    problem = uneven([1.0, 2.0, 0.5, 0.0, 0.0, 0.1])
    weights = problem.batch[2]
    folded = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), problem.batch)

    def on_devices(fn):
        mapped = jax.vmap(fn, in_axes=(None, 0), axis_name="cases", out_axes=None)
        return quick_jit(mapped)(problem.params, folded)

    objective = problem.objective(axis_name="cases")
    value, gradient = on_devices(objective.value_and_grad)
    dense = reference.dense(problem)
    means = [
        reference.mean(dense.values[i : i + 2], weights[i : i + 2]) for i in (0, 4)
    ]
    decay = reference.value(problem) - reference.mean(dense.values, weights)
    assert_is(value, reference.value(problem), np.mean([means[0], 0, means[1]]) + decay)

    def summed(params, batch):
        shard = problem.objective()
        total, weight = shard.value(params, batch) * batch[2].sum(), batch[2].sum()
        return jax.lax.psum(total, "cases") / jax.lax.psum(weight, "cases")

    # Another fault: each device differentiates through the sum over all of them.
    alone = jax.vmap(jax.grad(summed), in_axes=(None, 0), axis_name="cases")
    fault = flat(jax.tree.map(lambda x: x[0], alone(problem.params, folded)))
    assert_is(flat(gradient), reference.gradient(problem), fault)
