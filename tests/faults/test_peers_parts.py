"""Faults of others' conjugate gradients, line search and λ; none of which is here.

Each test has the fault beside what is right, on data that tell them apart.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from reference import model, quick_jit

import hfjax
from hfjax import cg, iterates
from hfjax.globalization.damping import Verdict
from hfjax.solvers.cg import Reason

N = 30
LENGTH = 14


def textbook(a, b, inverse, *, inner=None, restart=0):
    """Return the iterates x₁, x₂, … of a run from 0.

    `inner` is `(i, r, y) -> rᵀy`, or what a fault has in its place; `restart`, after
    how many iterations a fault has p be the residual again.
    """
    inner = inner or (lambda i, r, y: r @ y)
    x, r = np.zeros_like(b), b
    y = inverse @ r
    p, before, found = y, inner(0, r, y), []
    for i in range(1, LENGTH + 1):
        alpha = before / (p @ a @ p)
        x, r = x + alpha * p, r - alpha * (a @ p)
        y = inverse @ r
        now = inner(i, r, y)
        p = y if restart and i % restart == 0 else y + now / before * p
        before = now
        found.append(x)
    return np.array(found)


def orthogonal(rng, n=N):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def system():
    """Return A, b and a P⁻¹ that is far from both A⁻¹ and I."""
    rng = np.random.default_rng(4)
    q, u = orthogonal(rng), orthogonal(rng)
    a = (q * np.geomspace(0.1, 1, N)) @ q.T
    return a, rng.standard_normal(N), (u * np.geomspace(0.5, 2, N)) @ u.T


@functools.partial(quick_jit, static_argnames="options")
def solve(a, b, inverse, options=()):
    options = {"max_iterations": LENGTH, "stopping": None} | dict(options)
    return cg.solve(lambda v: a @ v, b, preconditioner=lambda r: inverse @ r, **options)


@functools.cache
def run():
    """Return the iterates of `system`, every one of which is kept."""
    result = solve(*system(), options=(("keep", iterates.every(1)),))
    np.testing.assert_array_equal(result.kept.iterations, np.arange(1, LENGTH + 1))
    return np.asarray(result.kept.iterates)


def assert_is(found, right, fault):
    scale = np.max(np.abs(right))
    assert np.max(np.abs(fault - right)) > 1e-4 * scale
    np.testing.assert_allclose(found, right, atol=1e-9 * scale)


def test_the_first_step_has_r_p_inverse_r_where_a_fault_has_r_squared():
    fault = textbook(*system(), inner=lambda i, r, y: r @ (y if i else r))
    assert_is(run()[0], textbook(*system())[0], fault[0])


def test_every_later_step_has_r_p_inverse_r_where_a_fault_has_r_squared():
    fault = textbook(*system(), inner=lambda i, r, y: r @ (r if i else y))
    right = textbook(*system())
    np.testing.assert_allclose(fault[0], right[0], rtol=1e-12)
    assert_is(run()[1:], right[1:], fault[1:])


def test_directions_stay_conjugate_where_a_fault_resets_them_every_ten_iterations():
    fault, right = textbook(*system(), restart=10), textbook(*system())
    np.testing.assert_allclose(fault[9], right[9], rtol=1e-12)
    assert_is(run(), right, fault)


def test_negative_curvature_gives_a_step_of_the_gradient_and_no_gigantic_one():
    a, b, identity = np.diag([-1e-3, *np.ones(N - 1)]), np.eye(N)[0], np.eye(N)
    fault = b @ b / max(b @ a @ b, np.finfo(float).eps) * b
    assert np.linalg.norm(fault) > 1e15
    result = solve(a, b, identity)
    assert result.reason == Reason.NONPOSITIVE_CURVATURE
    np.testing.assert_allclose(result.x, b, rtol=1e-12)


def test_negative_curvature_met_later_leaves_the_iterate_before_it():
    # b has little of the eigenvector of −0.1.
    a, b = np.diag([-0.1, *np.linspace(1, 2, N - 1)]), np.r_[0.1, np.ones(N - 1)]
    x, r, p = np.zeros(N), b, b
    while p @ a @ p > 0:
        alpha = (r @ r) / (p @ a @ p)
        x, new = x + alpha * p, r - alpha * (a @ p)
        r, p = new, new + (new @ new) / (r @ r) * p
    fault = x + (r @ r) / np.finfo(float).eps * p
    result = solve(a, b, np.eye(N))
    assert result.num_iterations > 1
    assert result.reason == Reason.NONPOSITIVE_CURVATURE
    assert_is(result.x, x, fault)


def test_a_run_ends_by_the_mean_progress_where_a_fault_asks_ten_times_more():
    # The fault: relative to M(x_i) − M(x_0), a bound without the window's length k.
    n, most = 400, 250
    a = np.diag(np.geomspace(1e-3, 1, n))
    values, x, r = [0.0], np.zeros(n), np.ones(n)
    p = r
    for _ in range(most):
        alpha = (r @ r) / (p @ a @ p)
        x, new = x + alpha * p, r - alpha * (a @ p)
        r, p = new, new + (new @ new) / (r @ r) * p
        values.append(model(a, np.ones(n), x))

    def first(bound):
        for i in range(1, most + 1):
            k = max(int(np.ceil(i / 10)), 10)
            if i > k and (values[i] - values[i - k]) / values[i] < bound(k):
                return i
        return most

    right, fault = first(lambda k: 5e-4 * k), first(lambda k: 5e-4)
    assert right < fault
    found = quick_jit(lambda b: cg.solve(lambda v: jnp.diag(a) * v, b))(jnp.ones(n))
    assert found.num_iterations == right
    assert found.reason == Reason.STOPPING_RULE


def test_a_run_that_no_rule_ends_has_a_last_iteration():
    a = np.diag(np.geomspace(1e-12, 1, N))
    result = solve(a, np.ones(N), np.eye(N), options=(("max_iterations", 7),))
    assert result.num_iterations == 7
    assert result.reason == Reason.MAX_ITERATIONS


def test_a_long_run_keeps_few_iterates_where_a_fault_keeps_all():
    result = jax.eval_shape(lambda b: cg.solve(lambda v: v, b), jnp.ones(3))
    assert result.model_values.shape == (251,)
    assert result.kept.iterates.shape[0] <= 17  # log(250 / 5) / log 1.3, and the last


def test_an_iteration_runs_one_product_where_a_fault_runs_two():
    a, b, _ = system()
    products = []

    def matvec(v):
        jax.debug.callback(lambda: products.append(None))
        return a @ v

    found = quick_jit(lambda b, x0: cg.solve(matvec, b, x0=x0, max_iterations=20))
    result = found(b, np.zeros(N))
    jax.effects_barrier()
    assert result.num_iterations > 10
    assert len(products) == result.num_iterations + 1  # And that of x₀.


def test_f_is_evaluated_at_a_few_iterates_where_a_fault_does_so_at_each():
    a, b, _ = system()
    evaluations = []

    def value_fn(x):
        jax.debug.callback(lambda: evaluations.append(None))
        return 0.5 * x @ a @ x - b @ x

    options = {"stopping": None, "max_iterations": 20, "keep": iterates.best()}
    found = quick_jit(
        lambda b: cg.solve(lambda v: a @ v, b, value_fn=value_fn, **options)
    )
    result = found(b)
    jax.effects_barrier()
    assert result.num_iterations == 20
    assert len(evaluations) == 7  # At 5, 7, 9, 11, 15, 19 and the last.


def test_the_product_is_traced_no_more_often_for_more_iterations():
    def traces(most):
        products = []

        def matvec(v):
            products.append(None)
            return 2 * v

        run = functools.partial(cg.solve, matvec, max_iterations=most)
        jax.eval_shape(lambda b: run(b, x0=b), jnp.ones(3))
        return len(products)

    assert traces(1) == traces(250) <= 3  # That of x₀, and JAX's two of a loop's body.


def test_a_right_hand_side_whose_square_vanishes_gives_no_nan():
    a, b, inverse = (leaf.astype(np.float32) for leaf in system())
    tiny = np.float32(1e-30) * b
    assert tiny @ tiny == 0  # The fault: rᵀr / pᵀAp is 0 / 0.
    right = textbook(*system())[-1]
    found = np.float64(solve(a, tiny, inverse).x) / 1e-30
    assert np.linalg.norm(found - right) < 1e-3 * np.linalg.norm(right)


def search(lowest_success):
    """Search along an f that falls enough for α ≤ `lowest_success` alone."""
    return hfjax.linesearch.armijo().search(
        lambda alpha: jnp.where(alpha <= lowest_success, -1.0, 1.0),
        *jnp.array([0.0, -1.0, 1.0]),
        None,
    )


def test_a_line_search_that_fails_returns_no_step():
    found = search(0.0)
    assert not found.success
    assert found.step_size == 0  # The fault: 0.8⁶¹, as if it had succeeded.


def test_a_line_search_may_succeed_at_its_last_try():
    found = search(1.0001 * 0.8**59)
    assert found.success  # The fault: 0, as if it had failed.
    np.testing.assert_allclose(found.step_size, 0.8**59)
    assert not search(1.0001 * 0.8**60).success


def test_damping_is_frozen_at_no_floor():
    rule = hfjax.damping.levenberg_marquardt()
    for damping in (1e-4, 1e-8, 1e-30):  # Faults: λ moves only above one of these.
        for ratio, factor in ((1.0, 2 / 3), (-1.0, 3 / 2)):
            found = rule.update(jnp.array(damping), Verdict(jnp.array(ratio)))
            np.testing.assert_allclose(found, damping * factor)


def test_damping_grows_to_no_infinity_and_comes_down_again():
    rule = hfjax.damping.levenberg_marquardt()
    damping = jnp.float32(1)
    with np.errstate(over="ignore"):
        assert np.isinf(np.float32(1.5) ** np.float32(300))  # The fault.
    for _ in range(300):
        damping = rule.update(damping, Verdict(jnp.float32(-jnp.inf)))
    assert np.isfinite(damping * damping)
    assert rule.update(damping, Verdict(jnp.float32(1))) < damping
