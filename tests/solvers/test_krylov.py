"""Krylov subspace descent against dense spaces, quadratics and grids of λ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.flatten_util import ravel_pytree
from problems import named, symmetric
from reference import flat, quick_jit

import hfjax
from hfjax import krylov
from hfjax.solvers.cg import Reason, System

N, K = 10, 5
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


def system(seed, eigenvalues=np.geomspace(0.02, 1, N)):
    """Return A, b, P⁻¹ and a direction."""
    rng = np.random.default_rng(seed)
    a, b = symmetric(rng, np.asarray(eigenvalues)), rng.standard_normal(N)
    return a, b, symmetric(rng, np.geomspace(0.5, 4, N)), rng.standard_normal(N)


@functools.partial(quick_jit, static_argnames="dimension")
def basis(a, b, inverse=None, direction=None, *, dimension=K):
    return krylov.basis(
        lambda v: a @ v,
        b,
        dimension,
        preconditioner=None if inverse is None else lambda r: inverse @ r,
        direction=direction,
    )


def powers(a, b, inverse, count):
    """Return an orthonormal basis of P⁻¹b, (P⁻¹A) P⁻¹b, …; by QR of the powers."""
    columns = [inverse @ b]
    for _ in range(count - 1):
        last = columns[-1] / np.linalg.norm(columns[-1])
        columns.append(inverse @ a @ last)
    return np.linalg.qr(np.stack(columns, axis=1))[0]


def outside(x, q):
    """Return how much of `x` is not in the span of Q's orthonormal columns."""
    return np.linalg.norm(x - q @ (q.T @ x)) / np.linalg.norm(x)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("with_direction", [False, True])
@seeds
def test_the_basis_spans_the_space_of_powers_and_the_direction(
    seed, preconditioned, with_direction
):
    a, b, inverse, direction = system(seed)
    inverse = inverse if preconditioned else np.eye(N)
    options = (inverse if preconditioned else None,)
    if with_direction:
        options += (direction,)
    built = basis(a, b, *options)
    v = np.asarray(built.vectors).T
    np.testing.assert_allclose(v.T @ v, np.eye(K), atol=1e-13)
    np.testing.assert_allclose(built.matrix, v.T @ a @ v, atol=1e-13)
    truth = powers(a, b, inverse, K - with_direction)
    for column in truth.T:
        assert outside(column, v) < 1e-9
    for column in v.T[: K - with_direction]:
        assert outside(column, truth) < 1e-9
    if with_direction:
        assert outside(direction, v) < 1e-12
        assert outside(direction, truth) > 0.1


@seeds
def test_the_space_holds_every_damped_solution_of_conjugate_gradients(seed):
    a, b, _, direction = system(seed)
    v = np.asarray(basis(a, b, None, direction).vectors).T
    for damping in (0.0, 1e-3, 0.1, 10.0):
        iterates, _ = reference.pcg(a + damping * np.eye(N), b, iterations=K - 1)
        for x in iterates[1:]:
            assert outside(x, v) < 1e-9
        beyond, _ = reference.pcg(a + damping * np.eye(N), b, iterations=K)
        if damping < 1:
            assert outside(beyond[-1], v) > 1e-6


def test_one_vector_is_the_gradients_or_the_directions():
    a, b, inverse, direction = system(0)
    (v,) = basis(a, b, inverse, dimension=1).vectors
    np.testing.assert_allclose(v, inverse @ b / np.linalg.norm(inverse @ b))
    (v,) = basis(a, b, inverse, direction, dimension=1).vectors
    np.testing.assert_allclose(v, direction / np.linalg.norm(direction))


@seeds
def test_a_space_that_is_exhausted_is_spanned_by_its_first_vectors(seed):
    # Three distinct eigenvalues: the space has three dimensions. What follows is zero,
    # or rounding made orthonormal; either way the matrix is that of the vectors.
    a, b, _, direction = system(seed, [0.5] * 4 + [2.0] * 3 + [7.0] * 3)
    for extra in (None, direction, np.zeros(N), -3 * b):
        built = basis(a, b, None, extra)
        v = np.asarray(built.vectors).T
        gram = v.T @ v
        assert np.all(np.isin(np.round(np.diag(gram), 12), (0.0, 1.0)))
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)
        np.testing.assert_allclose(built.matrix, v.T @ a @ v, atol=1e-12)
        np.testing.assert_allclose(
            np.linalg.eigvalsh(built.matrix[:3, :3]), [0.5, 2, 7], rtol=1e-9
        )
        if extra is direction:
            assert outside(direction, v) < 1e-12
        elif extra is not None:  # Nothing new, and no noise in its stead.
            np.testing.assert_array_equal(v[:, -1], 0)


def test_a_space_of_one_dimension_is_followed_by_zeros():
    for b in (np.eye(N)[2], 0 * np.eye(N)[2]):
        built = basis(np.eye(N), b)
        np.testing.assert_array_equal(built.vectors[0], b)
        np.testing.assert_array_equal(built.vectors[1:], 0)


def test_vectors_are_orthogonal_where_rounding_would_undo_them():
    # The whole space of a matrix of condition 10⁶: a short recurrence loses it.
    for dtype, bound in ((np.float64, 1e-12), (np.float32, 1e-5)):
        a, b, _, _ = system(0, np.geomspace(1e-6, 1, N))
        v = np.asarray(basis(a.astype(dtype), b.astype(dtype), dimension=8).vectors)
        assert v.dtype == dtype
        gram = v.astype(float) @ v.T
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=bound)
        assert np.all((np.abs(np.diag(gram) - 1) < bound) | (np.diag(gram) == 0))


@pytest.mark.slow
def test_trees_give_the_space_of_their_flat_vectors():
    a, b, inverse, direction = system(0)
    f64 = jnp.float64

    def tree(x):
        x = jnp.asarray(x)
        return {"a": x[:4].reshape(2, 2), "b": [(x[4:5], x[5:].astype(f64))]}

    def joined(t):
        return jnp.concatenate([t["a"].ravel(), *t["b"][0]])

    built = quick_jit(
        lambda b, direction: krylov.basis(
            lambda v: tree(a @ joined(v)),
            b,
            K,
            preconditioner=lambda r: tree(inverse @ joined(r)),
            direction=direction,
        )
    )(tree(b), tree(direction))
    truth = basis(a, b, inverse, direction)
    vectors = jax.vmap(joined)(built.vectors)
    np.testing.assert_allclose(vectors, truth.vectors, atol=1e-12)
    np.testing.assert_allclose(built.matrix, truth.matrix, atol=1e-12)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="`dimension` must be at least 1"):
        krylov.basis(lambda v: v, jnp.ones(2), 0)
    with pytest.raises(ValueError, match="`dimension` must be at least 2"):
        krylov.subspace_descent(dimension=1)
    with pytest.raises(ValueError, match="`max_iterations` must be at least 1"):
        krylov.subspace_descent(max_iterations=0)
    for floor in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"`floor` must be above 0\.0"):
            krylov.subspace_descent(floor=floor)


# Descent. f(x) = ½xᵀA x − bᵀx + Σ softening of C x, made NaN beyond some length.


def bent(x, a, b, c, strength, wall, numpy=jnp):
    """Bend a quadratic; its curvature and slope at 0 stay A and −b."""
    quartic = strength * numpy.sum((c @ x) ** 4)
    cubic = strength * numpy.sum((c @ x) ** 3)
    f = 0.5 * x @ a @ x - b @ x + quartic + cubic + 3.0
    return numpy.where(x @ x > wall**2, numpy.nan, f)


@quick_jit
def descend(a, b, inverse, direction, c, strength, wall):
    def value_fn(x):
        return bent(x, a, b, c, strength, wall)

    def never(x):
        return jnp.full((), jnp.nan, x.dtype)

    given = System(
        matvec=lambda v: a @ v,
        b=b,
        scalar=jnp.zeros((), b.dtype),
        count=jnp.int32(0),
        value=value_fn,
        batch_value=never,
        value_and_grad=jax.value_and_grad(value_fn),
        preconditioner=lambda: lambda r: inverse @ r,
    )
    return krylov.subspace_descent(dimension=K).solve(given, direction)


def best_damped(a, b, v, value, grid):
    """Return the least f of the damped steps in the span of V."""
    projected, slope = v.T @ a @ v, v.T @ b
    steps = [
        v @ np.linalg.solve(projected + t * np.eye(len(slope)), slope) for t in grid
    ]
    return np.nanmin([value(x) for x in steps])


def space(a, b, inverse, direction):
    """Return an orthonormal basis, built anew."""
    columns = [powers(a, b, inverse, K - 1), direction]
    return np.linalg.qr(np.column_stack(columns))[0]


FINE = np.concatenate([[0.0], np.geomspace(1e-9, 1e6, 1501)])


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.02, 0.1, 1.0])
@seeds
def test_f_is_at_most_that_of_the_best_damped_step(seed, strength):
    a, b, inverse, direction = system(seed)
    c = np.random.default_rng(seed + 10).standard_normal((4, N))
    result = descend(a, b, inverse, direction, c, strength, np.inf)

    def value(x):
        return float(bent(np.asarray(x), a, b, c, strength, np.inf, np))

    v = space(a, b, inverse, direction)
    assert outside(np.asarray(result.last.direction), v) < 1e-9
    # Lower than any damping leads to, and a minimum in the space.
    assert value(result.last.direction) < best_damped(a, b, v, value, FINE) - 1e-6
    gradient = jax.grad(bent)(
        jnp.asarray(result.last.direction), a, b, c, strength, np.inf
    )
    assert np.linalg.norm(v.T @ gradient) < 1e-3 * np.linalg.norm(v.T @ b)
    np.testing.assert_allclose(
        result.stats.model_values[-1],
        reference.model(a, b, result.last.direction),
        rtol=1e-9,
    )
    assert result.iterates is None


@pytest.mark.parametrize("wall", [3.0, 0.3, 0.03])
@seeds
def test_where_f_is_not_finite_nothing_ends_up(seed, wall):
    # And no higher than any λ of the grid that descent starts from.
    a, b, inverse, direction = system(seed)
    c = np.random.default_rng(seed + 10).standard_normal((4, N))
    result = descend(a, b, inverse, direction, c, 0.02, wall)

    def value(x):
        return float(bent(np.asarray(x), a, b, c, 0.02, wall, np))

    v = space(a, b, inverse, direction)
    largest = np.max(np.linalg.eigvalsh(v.T @ a @ v))
    grid = [0.0, *(largest * 10.0 ** np.arange(-6, 4))]
    assert value(result.last.direction) <= best_damped(a, b, v, value, grid) + 1e-12
    assert value(result.last.direction) < value(np.zeros(N))


@pytest.mark.parametrize("size", [1.0, 1e-6])
@seeds
def test_a_quadratic_is_minimised_exactly_over_the_space(seed, size):
    a, b, inverse, direction = system(seed)
    b = size * b
    v = space(a, b, inverse, direction)
    truth = v @ np.linalg.solve(v.T @ a @ v, v.T @ b)
    result = descend(a, b, inverse, direction, np.zeros((4, N)), 0.0, np.inf)
    # f near 3 shows the last 1e-8 of a step no more.
    scale = np.max(np.abs(truth))
    np.testing.assert_allclose(result.last.direction, truth, atol=1e-6 * scale + 1e-8)
    np.testing.assert_allclose(
        result.stats.model_values[-1],
        reference.model(a, b, result.last.direction),
        rtol=1e-9,
    )


def test_the_last_step_is_part_of_the_space():
    # The solution itself is carried over: found in one update, however small K is.
    a, b, inverse, _ = system(0)
    solution = np.linalg.solve(a, b)
    result = descend(a, b, inverse, 0.3 * solution, np.zeros((4, N)), 0.0, np.inf)
    np.testing.assert_allclose(result.last.direction, solution, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_short_floats_descend_too():
    for seed in (0, 1, 2):
        a, b, inverse, direction = (x.astype(np.float32) for x in system(seed))
        c = np.random.default_rng(seed + 10).standard_normal((4, N))
        c = c.astype(np.float32)
        result = descend(a, b, inverse, direction, c, np.float32(0.02), np.float32(99))
        assert (
            result.last.direction.dtype == result.stats.model_values.dtype == np.float32
        )

        def value(x, seed=seed, c=c):
            a, b, _, _ = system(seed)
            return float(bent(np.asarray(x, float), a, b, c, 0.02, 99, np))

        v = space(*system(seed))
        assert (
            value(result.last.direction)
            <= best_damped(*system(seed)[:2], v, value, FINE) + 2e-6
        )


def test_a_product_that_is_not_finite_gives_no_step():
    a, b, inverse, direction = system(0)
    a = a.copy()
    a[0, 0] = np.nan
    result = descend(a, b, inverse, direction, np.zeros((4, N)), 0.0, np.inf)
    assert Reason(int(result.stats.reason)) is Reason.NONFINITE
    assert np.all(np.isfinite(result.last.direction))
    assert np.all(np.isfinite(result.stats.model_values))


@pytest.mark.slow
def test_one_product_that_is_not_finite_gives_no_step():
    # The last: that all of the matrix but a column is finite is not enough.
    a, b, _, direction = system(0)

    def solve(a, b, direction):
        def matvec(v):
            return jnp.where(jnp.all(v == last), jnp.nan, a @ v)

        vectors = krylov.basis(lambda v: a @ v, b, K, direction=direction).vectors
        last = vectors[-1]
        given = System(
            matvec=matvec,
            b=b,
            scalar=jnp.zeros((), b.dtype),
            count=jnp.int32(0),
            value=lambda x: 0.5 * x @ a @ x - b @ x,
            batch_value=lambda x: 0.5 * x @ a @ x - b @ x,
            value_and_grad=jax.value_and_grad(lambda x: 0.5 * x @ a @ x - b @ x),
        )
        return krylov.subspace_descent(dimension=K).solve(given, direction)

    # Eagerly, so that the basis is built twice by the same operations.
    b = b * 2.0 ** -np.floor(np.log2(np.max(np.abs(b))))
    result = solve(a, jnp.asarray(b), jnp.asarray(direction))
    assert Reason(int(result.stats.reason)) is Reason.NONFINITE
    np.testing.assert_array_equal(result.last.direction, 0)
    np.testing.assert_array_equal(result.stats.model_values, 0)


def test_f_that_is_finite_nowhere_gives_a_finite_step():
    a, b, inverse, direction = system(0)
    result = descend(a, b, inverse, direction, np.zeros((4, N)), 0.0, -1.0)
    assert np.all(np.isfinite(result.last.direction))


def test_negative_curvature_does_not_lead_uphill():
    for seed in (0, 1, 2):
        a, b, inverse, direction = system(seed, [-1, -0.5, *np.geomspace(0.02, 1, 8)])
        c = np.random.default_rng(seed + 10).standard_normal((N, N))
        result = descend(a, b, inverse, direction, c[:4], 0.1, np.inf)
        value = bent(np.asarray(result.last.direction), a, b, c[:4], 0.1, np.inf, np)
        assert value < 3.0 - 0.1


# What an update does with it.

PROBLEM = named("mlp_softmax")
OBJECTIVE = PROBLEM.objective()
TX = hfjax.hessian_free(
    OBJECTIVE,
    solver=krylov.subspace_descent(dimension=6),
    damping=hfjax.damping.constant(0.0),
    preconditioner=hfjax.preconditioners.diagonal(),
    backtracking=None,
    line_search=None,
)


@quick_jit
def step(params, state, batch, eval_batch):
    grads = OBJECTIVE.value_and_grad(params, batch)[1]
    updates, state = TX.update(grads, state, params, batch=batch, eval_batch=eval_batch)
    return optax.apply_updates(params, updates), updates, state


@pytest.mark.slow
def test_an_update_beats_every_damped_step_on_its_own_data():
    # f is that of other cases than those which gave gradient and curvature.
    x, t = PROBLEM.batch
    part, other = (x[:5], t[:5]), (x[2:], t[2:])
    params, state = PROBLEM.params, TX.init(PROBLEM.params)
    theta, unravel = ravel_pytree(params)
    _, updates, state = step(params, state, part, other)
    on_part = PROBLEM.__class__("part", params, PROBLEM.model_fn, PROBLEM.loss, part)
    a = reference.ggn(on_part) + 0.02 * np.eye(len(theta))
    b = -reference.gradient(on_part) - 0.02 * np.asarray(theta)
    fisher = reference.empirical_fisher(on_part) + 0.02
    v = powers(a, b, np.diag(fisher**-0.75), 5)
    delta = flat(updates)
    assert state.info.accepted
    assert outside(delta, v) < 1e-8

    value_on_other = quick_jit(lambda x: OBJECTIVE.value(unravel(theta + x), other))

    def value(step):
        return float(value_on_other(jnp.asarray(step)))

    projected, slope = v.T @ a @ v, v.T @ b
    candidates = [
        value(v @ np.linalg.solve(projected + t * np.eye(5), slope))
        for t in [0.0, *np.geomspace(1e-6, 1e3, 60)]
    ]
    np.testing.assert_allclose(state.info.value_after, value(delta), rtol=1e-12)
    assert value(delta) <= min(candidates) + 1e-10


@pytest.mark.slow
def test_training_lowers_f_in_every_update():
    params, state = PROBLEM.params, TX.init(PROBLEM.params)
    values = []
    for _ in range(12):
        params, _, state = step(params, state, PROBLEM.batch, PROBLEM.batch)
        values += [state.info.value_before, state.info.value_after]
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    assert np.all(np.diff(values) <= 1e-15)
    gradient = OBJECTIVE.value_and_grad(params, PROBLEM.batch)[1]
    first = OBJECTIVE.value_and_grad(PROBLEM.params, PROBLEM.batch)[1]
    assert optax.tree.norm(gradient) < 0.1 * optax.tree.norm(first)
    assert values[-1] < 0.6 * values[0]
